"""Exchanged entries of equal shape are noticed, correct ones raise no alarm."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from entropy_probe.checkpoints import inspect_checkpoint, load_checkpoint
from entropy_probe.checkpoints.evidence import check_movement
from entropy_probe.checkpoints.libraries import quiet
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer
from entropy_probe.checkpoints.optimizers import ADAM
from tests.checkpoints.conftest import edit_json, edit_optimizer
from tests.tiny import LORA_TARGETS, tiny_policy, train_grpo

SCHEDULES = {
    "constant": lambda k: 1.0,
    "warm-up": lambda k: min(1.0, k / 10),
    "linear": lambda k: 1 - k / 20,
    "warm-up, then linear": lambda k: min(1.0, k / 3) * (1 - k / 20),
}


def train_lora(seed: int, steps: int, schedule: str, rank: int = 4, weight_decay: float = 0.0):
    """A few policy-gradient steps with AdamW on random responses whose rewards carry no signal: the hardest case."""
    draw = torch.Generator().manual_seed(seed)
    model, _ = tiny_policy(seed=seed)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.default_generator.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS)).train()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-3, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULES[schedule])
    for _ in range(steps):
        ids = torch.randint(2, 98, (8, 12), generator=draw)
        rewards = torch.randn(8, generator=draw)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        logits = model(input_ids=ids).logits[:, 3:-1]
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, 4:, None])[..., 0]
        (-(advantages[:, None] * logprobs).mean()).backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return named, optimizer


def check(named, optimizer, swapped: dict[str, str] | None = None):
    """The movement check of a trained policy; ``swapped`` gives parameters the state of others."""
    names = tuple(named)
    states = {name: optimizer.state[p] for name, p in named.items()}
    state = {i: states[(swapped or {}).get(name, name)] for i, name in enumerate(names)}
    group = {"params": list(range(len(names))), "amsgrad": False}
    saved = SavedOptimizer(Path("optimizer.pt"), ADAM, (group,), state, 0)
    moved = {name: p.detach for name, p in named.items() if "lora_B" in name}
    return check_movement(saved, names, moved, "0, where lora_B starts")


def swap_layers(named, a: int = 0, b: int = 1) -> dict[str, str]:
    there = {n: n.replace(f"layers.{a}.", f"layers.{b}.") for n in named if f"layers.{a}." in n}
    return there | {other: name for name, other in there.items()}


def swap_two(named, seed: int) -> dict[str, str]:
    """Two lora_B of equal shape, chosen at random, with their lora_A where those agree too."""
    choose = random.Random(seed)
    first = choose.choice([n for n in named if "lora_B" in n])
    second = choose.choice([n for n in named if "lora_B" in n and n != first and named[n].shape == named[first].shape])
    return {first: second, second: first}


def rates(seeds, steps, ranks=(4, 8)):
    """False alarms on correct checkpoints; layers and single entries exchanged and detected."""
    false = layers = singles = 0
    for seed in seeds:
        schedule = list(SCHEDULES)[seed % len(SCHEDULES)]
        decay = 0.1 * (seed % 3 == 0)
        named, optimizer = train_lora(seed, steps(seed), schedule, ranks[seed % len(ranks)], decay)
        false += check(named, optimizer).status == "exchanged"
        layers += check(named, optimizer, swap_layers(named)).status == "exchanged"
        two = swap_two(named, seed)
        singles += any(set(cycle) == set(two) for cycle in check(named, optimizer, two).exchanged)
    return false, layers, singles


def test_swaps_are_detected_and_correct_checkpoints_raise_no_alarm():
    false, layers, singles = rates(range(12), lambda seed: 2 + seed % 7)
    assert false == 0
    assert layers == 12
    assert singles >= 10


@pytest.mark.slow
def test_swaps_are_detected_and_correct_checkpoints_raise_no_alarm_long():
    """100 runs of 2 to 12 steps over schedules, weight decay and ranks; then 30 longer ones, for false alarms."""
    false, layers, singles = rates(range(1000, 1100), lambda seed: 2 + seed % 11)
    assert false == 0
    assert layers >= 95
    assert singles >= 90
    assert rates(range(2000, 2030), lambda seed: 15 + seed % 6, ranks=(1, 2, 4))[0] == 0


def test_a_constant_rate_is_recognised_and_a_rate_of_zero_is_not_judged():
    assert check(*train_lora(5, 3, "constant")).status == "consistent"
    report = check(*train_lora(5, 1, "warm-up"))  # the first rate of a warm-up is 0
    assert (report.status, report.num_parameters, report.correlation) == ("inconclusive", 0, None)


@pytest.mark.parametrize("name", ["lora", "full"])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_real_runs(runs, copy_of, name, step):
    """Every swap of the two layers' state in a checkpoint of TRL, and the checkpoint as it is."""
    checkpoint = copy_of(name, step)
    base = runs(name).directory / "base"
    before = inspect_checkpoint(checkpoint, base)
    assert before.movement.status == "consistent"
    assert before.movement.correlation > 0.5 > 0.3 > before.movement.correlation_of_others
    names = [n for group in _names(checkpoint, base) for n in group]
    swap = {i: names.index(n.replace("layers.0", "layers.1")) for i, n in enumerate(names) if "layers.0" in n}

    def exchange(saved):
        for i, j in swap.items():
            saved["state"][i], saved["state"][j] = saved["state"][j], saved["state"][i]

    edit_optimizer(checkpoint, exchange)
    after = inspect_checkpoint(checkpoint, base)
    assert after.verdict == "suspicious"
    assert "seems exchanged" in after.reasons[0]
    found = {n for cycle in after.movement.exchanged for n in cycle}
    looked_at = {n for n in names if "layers" in n and ("lora_B" in n or name == "full")}
    assert len(found & looked_at) >= 0.7 * len(looked_at)
    assert not found - looked_at


@pytest.mark.parametrize("name", ["two adapters", "trl reference", "dora", "rslora", "modules_to_save", "biases"])
def test_adapters_of_every_kind(runs, copy_of, name):
    """lora_B starts at 0 in all of them; an exchange of two is found whatever the adapter is called."""
    needed = runs(name).needed
    checkpoint = copy_of(name, 3)
    before = inspect_checkpoint(checkpoint, **needed)
    state = load_checkpoint(checkpoint, **needed)
    by_id = {id(p): n for n, p in state.model.named_parameters()}
    names = [by_id[id(p)] for group in state.optimizer.param_groups for p in group["params"]]
    assert before.movement.status == "consistent"
    assert before.movement.num_parameters == sum("lora_B" in n for n in names)
    first = next(n for n in names if "layers.0" in n and "lora_B" in n)
    a, b = names.index(first), names.index(first.replace("layers.0", "layers.1"))

    def exchange(saved):
        saved["state"][a], saved["state"][b] = saved["state"][b], saved["state"][a]

    edit_optimizer(checkpoint, exchange)
    after = inspect_checkpoint(checkpoint, **needed)
    assert after.verdict == "suspicious"
    assert [set(cycle) for cycle in after.movement.exchanged] == [{names[a], names[b]}]


def test_a_frozen_part_leaves_the_rest_checked(runs):
    run = runs("frozen subset")
    report = run.load(3).report
    assert report.movement.status == "consistent"
    assert report.movement.num_parameters == report.optimizer_state.num_parameters


def _names(checkpoint, base):
    state = load_checkpoint(checkpoint, base)
    by_id = {id(p): n for n, p in state.model.named_parameters()}
    return [[by_id[id(p)] for p in group["params"]] for group in state.optimizer.param_groups]


@pytest.mark.slow
def test_trl_runs_over_schedules(tmp_path):
    """Ten short TRL runs: no alarm as they are, an alarm at every checkpoint once two layers are exchanged."""
    alarms = missed = 0
    for seed in range(10):
        directory = tmp_path / str(seed)
        schedule = ["constant", "linear", "cosine", "constant_with_warmup", "linear"][seed % 5]
        warm = {"warmup_steps": 2} if seed % 5 >= 3 else {}
        train_grpo(directory, lora=True, steps=6, seed=seed, lr_scheduler_type=schedule, weight_decay=0.1, **warm)
        for step in (3, 5):
            checkpoint = directory / f"checkpoint-{step}"
            alarms += inspect_checkpoint(checkpoint).movement.status == "exchanged"
            edit_optimizer(checkpoint, _exchange_layers)
            missed += inspect_checkpoint(checkpoint).movement.status != "exchanged"
    assert alarms == 0
    assert missed <= 2


def _exchange_layers(saved):
    for i in range(14):
        saved["state"][i], saved["state"][i + 14] = saved["state"][i + 14], saved["state"][i]


def test_full_weights_need_to_know_where_they_started(runs, copy_of):
    checkpoint = copy_of("full")
    alone = inspect_checkpoint(checkpoint)
    assert alone.movement is None
    assert "needs the model that training started from, and it was not given" in alone.movement_not_checked
    movement = inspect_checkpoint(checkpoint, runs("full").directory / "base").movement
    assert (movement.num_parameters, movement.reference) == (27, str(runs("full").directory / "base"))
    earlier = inspect_checkpoint(runs("full").checkpoint(3), runs("full").checkpoint(1)).movement
    assert earlier.status == "consistent"


def test_an_adapter_that_did_not_start_at_zero_is_not_judged(copy_of):
    checkpoint = copy_of("lora")
    edit_json(checkpoint / "adapter_config.json", init_lora_weights=False)
    report = inspect_checkpoint(checkpoint)
    assert report.movement is None
    assert report.movement_not_checked == "init_lora_weights is False, so where the adapter started is not known"
