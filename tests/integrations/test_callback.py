"""The callback inside real training runs of TRL: what it leaves alone, what it logs and writes, and how it gives up."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from entropy_probe import Rollouts
from entropy_probe.analyses import provenance
from entropy_probe.integrations import live_run
from entropy_probe.integrations.live_run import Budget
from entropy_probe.integrations.trl import EntropyProbeCallback, HeldOut
from entropy_probe.integrations.trl_batch import calling_trainer, columns_of, joined_rollouts
from entropy_probe.results.live import GRADIENT_FILE, ROLLOUTS_FILE, read_records, step_directory
from tests.integrations.witness import Witness, differing, trained

pytestmark = pytest.mark.unchecked  # the run-time check of shapes draws from Python's random numbers

HELD_OUT = HeldOut(size=8)
MANY = {"adapter": {"lora_dropout": 0.2}, "beta": 0.1, "gradient_accumulation_steps": 2, "steps": 2,
        "per_device_train_batch_size": 8}  # fmt: skip
SETTINGS = {
    "LoRA": ({}, "batch"),
    "full": ({"lora": False}, "batch"),
    "dropout, KL, accumulation, held out": (MANY, HeldOut(size=8, min_ess=1.0)),
    "2 iterations": ({"num_iterations": 2, "steps": 4}, "batch"),
    "2 iterations, held out": ({"num_iterations": 2}, HELD_OUT),
    "4 steps per generation": ({"steps_per_generation": 2, "steps": 4, "per_device_train_batch_size": 24}, "batch"),
    "SGD": ({"optim": "sgd"}, HELD_OUT),
    "Adafactor": ({"optim": "adafactor"}, HELD_OUT),
    "bf16": ({"bf16": True}, "batch"),
    "bf16, held out": ({"bf16": True}, HELD_OUT),
    "bf16 weights": ({"prepare": "bfloat16", "lora": False}, "batch"),
    "gradient checkpointing": ({"gradient_checkpointing": True}, "batch"),
    "gradient checkpointing, full": ({"gradient_checkpointing": True, "lora": False}, HELD_OUT),
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Witness:
    """A run without the callback: dropout, a KL term and accumulation."""
    return trained(tmp_path_factory.mktemp("alone"), **MANY)[0]


def test_training_is_the_same_to_the_bit(tmp_path, alone):
    callback = EntropyProbeCallback(every=1, record="all", keep_gradients=1, origins=True, config={"coast": True})
    beside, warned = trained(tmp_path, [callback], **MANY)
    assert warned == []
    assert differing(beside, alone) == []
    assert len({step["weights"] for step in alone.seen}) == 3
    logged = [log for log in beside.logs if "reward" in log]
    records = read_records(tmp_path)
    assert [record.step for record in records] == [1, 2]
    for record, log in zip(records, logged, strict=True):
        assert record.predicted
        assert record.entropy
        assert log["entropy_probe/predicted"] == record.predicted.value
        assert log["entropy_probe/predicted_se"] == record.predicted.standard_error
        assert log["entropy_probe/entropy"] == record.entropy.value
        assert log["entropy_probe/seconds"] == record.seconds
        assert record.log["reward"] == log["reward"]
        assert record.loss_distance is not None
        assert record.loss_distance > 0.01  # dropout is the trainer's gradient's alone
        assert len(record.prompts) == 4
        rollouts = Rollouts.from_parquet(step_directory(tmp_path, record.step) / ROLLOUTS_FILE)
        assert len(rollouts) == 16
        assert rollouts.reference_logprobs is not None
        assert rollouts.microbatch_ids is not None
        assert rollouts.microbatch_ids.unique().tolist() == [0, 1]
    first, second = records
    assert first.origins is None
    (last,) = second.origins.steps
    assert last.value == pytest.approx(second.momentum.value, rel=1e-4)  # one step's gradient is all there is
    assert abs(second.origins.older.value) < 1e-4 * abs(last.value)
    for record, log in zip(records, logged, strict=True):
        assert log["entropy_probe/committed"] == record.committed.value
        refused = any(note.text.startswith("coasting: ") for note in record.notes)  # too far for 16 responses
        assert refused == (record.coasted is None)
    assert not (step_directory(tmp_path, 1) / GRADIENT_FILE).exists()
    assert (step_directory(tmp_path, 2) / GRADIENT_FILE).exists()


@pytest.mark.parametrize("place", [6])
def test_a_probe_that_raises_switches_itself_off_and_training_goes_on(tmp_path, monkeypatch, alone, place):
    check_struck(tmp_path, monkeypatch, alone, place)


@pytest.mark.slow
@pytest.mark.parametrize("place", [1, 2, 3, 4, 5, 7, 8])
def test_wherever_it_raises(tmp_path, monkeypatch, alone, place):
    check_struck(tmp_path, monkeypatch, alone, place)


def check_struck(directory, monkeypatch, alone, place):
    """A probe that raises inside of the phase with this number."""
    original, phases = provenance.Clock.phase, []

    def phase(self, name):
        phases.append(name)
        if len(phases) == place:
            raise RuntimeError(f"struck in {name}")
        return original(self, name)

    monkeypatch.setattr(provenance.Clock, "phase", phase)
    beside, warned = trained(directory, [EntropyProbeCallback(every=1)], **MANY)
    assert warned == [f"entropy-probe: switched off, training goes on: RuntimeError: struck in {phases[-1]}"]
    assert len(phases) == place
    assert differing(beside, alone) == []
    assert [record.step for record in read_records(directory)] == [1][: place > 7]  # of seven phases a step


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_training_is_the_same_to_the_bit_in_every_setting(tmp_path, name):
    settings, evaluation = SETTINGS[name]
    alone, _ = trained(tmp_path / "alone", **settings)
    callback = EntropyProbeCallback(every=1, evaluation=evaluation, attribution_every=2)
    beside, warned = trained(tmp_path / "beside", [callback], **settings)
    assert warned == []
    assert differing(beside, alone) == []
    # a step on responses that another was taken on is passed over with the batch itself
    steps = [1, 3] if settings.get("steps") == 4 else [1, 2, 3][: settings.get("steps", 3)]
    records = read_records(tmp_path / "beside")
    assert [record.step for record in records] == steps
    assert sum("entropy_probe/predicted" in log for log in beside.logs) == len(steps)
    divides = evaluation == "batch" or "optim" not in settings
    shared = steps if evaluation == "batch" else [2]
    assert [record.step for record in records if record.prompts] == (shared if divides else [])


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_checkpoint_in_the_middle(tmp_path):
    runs = {}
    for name, callbacks in {"alone": [], "beside": [EntropyProbeCallback(every=2)]}.items():
        settings = {"steps": 4, "save_steps": 2, "adapter": {"lora_dropout": 0.2}}
        trained(tmp_path / name, callbacks, **settings)
        last = str(tmp_path / name / "checkpoint-2")
        runs[name], warned = trained(tmp_path / name, callbacks, resume_from_checkpoint=last, **settings)
        assert warned == []
    assert differing(runs["beside"], runs["alone"]) == []
    assert [record.step for record in read_records(tmp_path / "beside")] == [2, 4]


@pytest.mark.parametrize(
    ("settings", "callback", "said"),
    [
        ({"top_p": 0.9}, {}, "evaluation 'batch': expected responses sampled from the policy itself, got top_p 0.9"),
        ({"per_device_train_batch_size": 8}, {}, "one batch: expected at least 3 distinct prompts"),
    ],
    ids=["top_p", "few prompts"],
)
def test_what_cannot_be_probed_is_said_once(tmp_path, settings, callback, said):
    beside, warned = trained(tmp_path, [EntropyProbeCallback(every=1, **callback)], steps=1, **settings)
    assert len(warned) == 1
    assert said in warned[0]
    assert len(beside.seen) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"every": 0}, "every: expected at least 1 step, got 0"),
        ({"attribution_every": -1}, "attribution_every: expected at least 1"),
        ({"evaluation": "held-out"}, "evaluation: expected 'batch' or HeldOut"),
        ({"record": "some"}, "record: expected 'all', 'probed' or None"),
        ({"budget": 5}, "budget: expected a share of the training time"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        EntropyProbeCallback(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 1}, "size: expected at least 2"),
        ({"min_ess": 2}, "min_ess: expected a share"),
        ({"prompts": []}, "prompts: expected at least one"),
    ],
)
def test_held_out_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        HeldOut(**settings)


def test_nobody_but_a_trainer_may_call():
    with pytest.raises(ValueError, match="expected to be called by a trainer"):
        calling_trainer(EntropyProbeCallback())
    callback = EntropyProbeCallback()
    with pytest.warns(UserWarning, match="switched off, training goes on: callback: expected to be called"):
        callback.on_train_begin(None, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.on_step_begin(None, None, None)


def test_a_budget_waits_until_a_probe_fits(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(live_run.time, "perf_counter", lambda: now[0])
    budget = Budget(0.1, begun=0.0)
    budget.steps, now[0] = 4, 20.0  # 5 seconds a step, as long as a probe may take as far as is known: 5 of 2 allowed
    assert not budget.allows()
    now[0], budget.steps = 60.0, 12
    assert budget.allows()
    with budget.spending():
        now[0] += 10.0
    budget.last = 10.0
    assert not budget.allows()
    now[0] = 10.0 + 199.0
    assert not budget.allows()
    now[0] = 10.0 + 201.0  # 20 of 201 seconds of training
    assert budget.allows()
    assert Budget(None).allows()


def test_tool_output_is_in_the_sequence_and_not_in_the_response():
    inputs = {
        "prompt_ids": torch.tensor([[0, 5], [6, 7]]), "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]), "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1], [1, 1, 0]]), "advantages": torch.tensor([1.0, -1.0]),
        "old_per_token_logps": -torch.ones(2, 3),
    }  # fmt: skip
    shorter = {k: v[:1] for k, v in inputs.items()} | {"completion_ids": torch.tensor([[9]])}
    shorter |= {k: v[:1, :1] for k, v in inputs.items() if k in ("completion_mask", "tool_mask", "old_per_token_logps")}
    rollouts = joined_rollouts([(2, columns_of(inputs)), (5, columns_of(shorter))])
    assert rollouts.input_ids.tolist() == [[0, 5, 1, 2, 3], [6, 7, 4, 5, 0], [0, 5, 9, 0, 0]]
    assert rollouts.attention_mask.int().tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0]]
    assert rollouts.response_mask.int().tolist() == [[0, 0, 1, 0, 1], [0, 0, 1, 1, 0], [0, 0, 1, 0, 0]]
    assert rollouts.prompt_ids.tolist() == [0, 1, 0]
    assert rollouts.microbatch_ids is not None
    assert rollouts.microbatch_ids.tolist() == [2, 2, 5]
    assert rollouts.old_logprobs is not None
    assert rollouts.old_logprobs.tolist()[2] == [0, 0, -1, 0, 0]
    assert rollouts.reference_logprobs is None


def test_out_of_memory_halves_the_microbatch_and_then_gives_up(monkeypatch):
    asked = []

    def predicted(self, model, optimizer, batch, config, number):
        asked.append(config.max_tokens_per_microbatch)
        if len(asked) < 3 or config.max_tokens_per_microbatch < 1100:
            raise torch.OutOfMemoryError("full")
        return config.max_tokens_per_microbatch

    run = object.__new__(live_run.LiveRun)
    run._settings, run._ranks = {}, live_run.ALONE
    args = SimpleNamespace(temperature=1.0, max_completion_length=8, max_grad_norm=1.0)
    run._trainer = SimpleNamespace(args=args, accelerator=SimpleNamespace(scaler=None))
    monkeypatch.setattr(live_run.LiveRun, "_predicted", predicted)
    batch = SimpleNamespace(loss={"trainer": "trl"})
    assert run._ahead(torch.nn.Linear(1, 1), None, batch, 1) == 2048
    assert asked == [None, 4096, 2048]
    monkeypatch.setattr(live_run, "LEAST_TOKENS", 4096)
    asked.clear()
    with pytest.raises(torch.OutOfMemoryError):
        run._ahead(torch.nn.Linear(1, 1), None, batch, 1)
