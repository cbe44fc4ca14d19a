"""Optimizers without a closed form here, rebuilt from their files: replayed bitwise, recognised, refused when wrong."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn, optim

from entropy_probe import EntropyProbe, ProbeConfig
from entropy_probe.checkpoints import CheckpointError, inspect_checkpoint, load_checkpoint
from entropy_probe.checkpoints.grouping import grouping_rules
from entropy_probe.checkpoints.optimizer_file import check_entries, read_optimizer
from entropy_probe.checkpoints.optimizers import KINDS
from entropy_probe.checkpoints.parameters import layout_of
from entropy_probe.checkpoints.record import record_checkpoint
from entropy_probe.steps.adamw import optimizer_parameters
from entropy_probe.steps.copied import check_repeatable, copied_step
from tests.checkpoints.conftest import edit_optimizer
from tests.invariants.hf_problems import rollouts
from tests.tiny import tiny_policy
from tests.trained import OTHER_RUNS

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def hf_adafactor(params: Any, **options: Any) -> optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(params, **({"lr": 1e-3, "relative_step": False} | options))


OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=1e-2),
    "SGD momentum": lambda p: optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.1),
    "SGD nesterov": lambda p: optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": lambda p: optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "RMSprop": lambda p: optim.RMSprop(p, lr=1e-3),
    "RMSprop centered": lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True, foreach=False),
    "NAdam": lambda p: optim.NAdam(p, lr=1e-3),
    "NAdam decoupled": lambda p: optim.NAdam(p, lr=1e-3, decoupled_weight_decay=True),
    "RAdam": lambda p: optim.RAdam(p, lr=1e-3, betas=(0.8, 0.6)),
    "Adamax": lambda p: optim.Adamax(p, lr=1e-3),
    "Adagrad": lambda p: optim.Adagrad(p, lr=1e-2, lr_decay=0.1, initial_accumulator_value=0.1),
    "Adagrad fused": lambda p: optim.Adagrad(p, lr=1e-2, fused=True),
    "Adadelta": lambda p: optim.Adadelta(p, lr=1.0),
    "Adafactor": lambda p: optim.Adafactor(p, lr=1e-2),
    "Adafactor of transformers": lambda p: hf_adafactor(p, scale_parameter=False),
    "Adafactor of transformers beta1": lambda p: hf_adafactor(p, beta1=0.9, scale_parameter=True),
    "Muon": lambda p: optim.Muon(p, lr=1e-2),
}


@dataclass(frozen=True)
class Trained:
    """Checkpoints 2 and 3 in the Trainer's layout, and the gradients of step 3 by name."""

    directory: Path
    gradients: dict[str, torch.Tensor]

    def checkpoint(self, step: int) -> Path:
        return self.directory / f"checkpoint-{step}"


def train(directory: Path, name: str) -> Trained:
    """Steps on random gradients, with the Trainer's two groups; adapters for Muon, which takes only matrices."""
    model, _ = tiny_policy(num_layers=2)
    if name == "Muon":
        model.save_pretrained(directory / "base")
        model.name_or_path = str(directory / "base")
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rule = grouping_rules(layout_of(model))["hf-trainer-patterns"].groups
    groups = [
        {"params": [parameters[n] for n in names], "weight_decay": d} for names, d in zip(rule, (0.1, 0.0), strict=True)
    ]
    optimizer = OPTIMIZERS[name](groups if rule[1] else groups[:1])
    generator = torch.Generator().manual_seed(3)
    for step in (1, 2, 3):
        for p in parameters.values():
            p.grad = 1e-2 * torch.randn(p.shape, generator=generator)
        gradients = {n: p.grad.clone() for n, p in parameters.items()}  # some kernels work in p.grad
        optimizer.step()
        checkpoint = directory / f"checkpoint-{step}"
        model.save_pretrained(checkpoint)
        torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        torch.save({}, checkpoint / "scheduler.pt")
    return Trained(directory, gradients)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    done: dict[str, Trained] = {}

    def get(name: str) -> Trained:
        if name not in done:
            done[name] = train(tmp_path_factory.mktemp("other"), name)
        return done[name]

    return get


def replay(now: Any, after: Any, gradients: dict[str, torch.Tensor]) -> None:
    """The copied step of the rebuilt optimizer gives the next checkpoint bitwise."""
    parameters = optimizer_parameters(now.model, now.optimizer)
    expected = optimizer_parameters(after.model, after.optimizer)
    stepped = copied_step(parameters, now.optimizer, gradients)
    check_repeatable(parameters, now.optimizer, gradients, stepped)
    assert stepped.keys() == expected.keys() == gradients.keys()
    assert [n for n in stepped if not torch.equal(stepped[n], expected[n])] == []
    assert not any(torch.equal(parameters[n], expected[n]) for n in stepped)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rebuilt_optimizer_gives_the_next_checkpoint_bitwise(trained, name):
    run = trained(name)
    now, after = (load_checkpoint(run.checkpoint(k)) for k in (2, 3))
    assert now.report.optimizer == max((k.name for k in KINDS if name.startswith(k.name)), key=len)
    assert now.report.verdict == "healthy", now.report.reasons
    replay(now, after, run.gradients)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rebuilt_optimizer_has_what_was_saved(trained, name):
    checkpoint = trained(name).checkpoint(3)
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    got = load_checkpoint(checkpoint).optimizer.state_dict()
    assert got["state"].keys() == saved["state"].keys()
    for index, entry in saved["state"].items():
        assert got["state"][index].keys() == entry.keys()
        assert all(type(got["state"][index][key]) is type(value) for key, value in entry.items())
        assert all(torch.equal(torch.as_tensor(got["state"][index][k]), torch.as_tensor(v)) for k, v in entry.items())
    for mine, theirs in zip(got["param_groups"], saved["param_groups"], strict=True):
        assert mine == theirs


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_real_runs_of_the_trainer_are_replayed_bitwise(runs, name):
    run = runs(name)
    now = run.load(2)
    assert now.report.optimizer == {"adafactor": "Adafactor of transformers"}.get(name, now.report.optimizer)
    replay(now, run.load(3), run.gradients[3])


@pytest.mark.parametrize("name", ["adafactor", "sgd"])
def test_the_whole_step_is_predicted_and_measured(runs, name):
    state = runs(name).load(2)
    report = state.report.optimizer_state
    probe = EntropyProbe(state.model, state.optimizer, ProbeConfig(max_completion_length=9), mapping=report.mapping)
    result = probe.run(update=rollouts(16, 1), evaluation=rollouts(16, 2))
    assert result.components == {}
    assert result.predicted.se_update_method == "jackknife"
    assert abs(result.predicted.value) > 0
    seen = result.optimizer_state
    assert (seen.optimizer, seen.mapping, seen.steps) == (report.optimizer, report.mapping, report.steps)
    assert (seen.num_parameters, seen.num_elements) == (report.num_parameters, report.num_elements)
    assert seen.coverage == report.coverage == {"adafactor": 1.0, "sgd": 0.0}[name]


def test_what_inspect_says(trained, runs):
    report = inspect_checkpoint(trained("SGD momentum").checkpoint(3))
    assert (report.verdict, report.groups[0].others) == ("healthy", {"momentum": 0.9, "dampening": 0.1})
    assert (report.groups[0].betas, report.groups[0].eps) == (None, None)
    assert "goes by Adam's moments, SGD keeps others" in (report.movement_not_checked or "")
    assert report.optimizer_state.mapping == "rule:hf-trainer-patterns + shapes (27 tensors)"
    bare = inspect_checkpoint(runs("sgd").checkpoint(2)).optimizer_state
    assert bare.mapping == "rule:hf-trainer-patterns + group sizes, nothing is kept for parameters (27 tensors)"


@pytest.mark.parametrize(("name", "bound"), [("SGD", 100), ("Adadelta", 100), ("RMSprop", 0.1)])
def test_a_rate_that_no_run_has_is_suspicious(trained, tmp_path, name, bound):
    checkpoint = Path(shutil.copytree(trained(name).checkpoint(2), tmp_path / "checkpoint-2"))
    edit_optimizer(checkpoint, settings(lr=float(bound)))
    assert inspect_checkpoint(checkpoint).verdict == "healthy"
    edit_optimizer(checkpoint, settings(lr=1e6))
    report = inspect_checkpoint(checkpoint)
    assert (report.verdict, report.reasons) == ("suspicious", (f"learning rate 1e+06 is above {bound}; check it",))


@pytest.mark.parametrize("name", ["SGD", "Adafactor", "Adafactor of transformers"])
def test_a_manifest_of_another_optimizer(trained, tmp_path, name):
    checkpoint = Path(shutil.copytree(trained(name).checkpoint(2), tmp_path / "checkpoint-2"))
    before = load_checkpoint(checkpoint).report.optimizer_state
    path, _ = record_checkpoint(checkpoint, written_by="a test")
    first = json.loads(path.read_text())["groups"][0]["parameters"][0]
    assert first["shape"] == [98, 64]
    assert first["dtype"] == (None if name == "SGD" else "float32")
    after = load_checkpoint(checkpoint).report.optimizer_state
    assert after == before.model_copy(update={"mapping": f"manifest (by inspection: {before.mapping})"})


# --- what is refused ----------------------------------------------------------------------------------------------


def put(key: str, value: Any, index: int = 2):
    def change(saved: dict[str, Any]) -> None:
        entry = saved["state"][index]
        if isinstance(value, float) and isinstance(entry[key], torch.Tensor) and entry[key].dim():
            entry[key].view(-1)[0] = value
        else:
            entry[key] = value

    return change


def settings(**values: Any):
    return lambda saved: [group.update(values) for group in saved["param_groups"]]


BAD = [
    ("SGD momentum", lambda s: s["state"].pop(4), r"none for 1 \(index \[4\]\)"),
    ("SGD momentum", lambda s: s["state"].clear(), "got none for 27"),
    ("SGD", lambda s: s["state"].update({3: {"momentum_buffer": torch.ones(2)}}), "1 entries that belong to no par"),
    ("SGD", settings(momentum=0.9), "got none for 27"),
    ("SGD momentum", settings(momentum=0.0), "27 entries that belong to no parameter"),
    ("SGD momentum", settings(momentum=1.5), r"momentum in \[0, 1\), got 1.5"),
    ("SGD momentum", settings(nesterov=True), "SGD takes, got: Nesterov momentum requires"),
    ("SGD momentum", settings(nesterov=1), "nesterov: expected true, false or nothing, got 1"),
    ("SGD momentum", put("momentum_buffer", float("inf")), r"\(model\..*\): momentum_buffer: expected finite"),
    ("SGD momentum", put("momentum_buffer", torch.ones(3, 3)), r"index 2 is \[3, 3\]"),
    ("SGD momentum", put("momentum_buffer", None), "expected a dense|expected the shape"),
    ("SGD momentum", settings(maximize=True), "maximize=True"),
    ("RMSprop", put("square_avg", -1.0), "square_avg: expected values of at least 0"),
    ("RMSprop", settings(centered=True), r"expected RMSprop's \['grad_avg', 'square_avg', 'step'\]"),
    ("RMSprop centered", put("grad_avg", torch.ones(2)), r"grad_avg: expected the shape \[32, 64\]"),
    ("RMSprop", settings(alpha=1.0), r"alpha in \[0, 1\)"),
    ("NAdam", put("mu_product", torch.tensor(float("nan"))), "mu_product: expected a finite number"),
    ("NAdam", put("mu_product", torch.tensor(-0.1)), "mu_product: expected at least 0"),
    ("NAdam", put("mu_product", torch.ones(3)), "mu_product: expected a finite number, got a value of T"),
    ("RAdam", put("step", torch.tensor(0.0)), "at least 1, got 0"),
    ("Adamax", put("exp_inf", -1.0), "exp_inf: expected values of at least 0"),
    ("Adagrad", put("sum", float("nan")), "sum: expected finite"),
    ("Adagrad", settings(lr_decay=-1), "lr_decay: expected at least 0"),
    ("Adadelta", put("acc_delta", -1.0), "acc_delta: expected values of at least 0"),
    ("Adadelta", settings(rho=1.0), r"rho in \[0, 1\)"),
    ("Adafactor", put("row_var", -1.0), "row_var: expected values of at least 0"),
    ("Adafactor", put("row_var", torch.ones(32)), "expected Adafactor's .*'variance'"),
    ("Adafactor", put("row_var", torch.ones(32, 3)), r"row_var: expected the shape \[32, 1\].*got \[32, 3\]"),
    ("Adafactor", put("col_var", torch.ones(1, 63)), r"index 2 is \[32, 63\]"),
    ("Adafactor", lambda s: s["state"][2].pop("col_var"), "expected Adafactor's"),
    ("Adafactor", put("variance", torch.ones(2, 2)), "expected Adafactor's"),
    ("Adafactor", settings(eps=(None, -1.0)), r"eps: expected at least 0, got \(None, -1.0\)"),
    ("Adafactor", settings(beta2_decay=0.5), "beta2_decay in|beta2_decay: expected"),
    ("Adafactor", settings(eps=1e-3), "eps: expected two numbers, got 0.001"),
    ("Adafactor", settings(eps=(None,)), "eps: expected two numbers"),
    ("Adafactor", settings(eps=(None, 1e-3, 1.0)), "eps: expected two numbers"),
    ("Adafactor", settings(eps=(1e-3, None)), "eps: expected a finite number, got None"),
    ("Adafactor", settings(weight_decay=(0.1, 0.1)), r"weight_decay: expected one number, got \(0.1, 0.1\)"),
    ("Adafactor of transformers", settings(eps=1e-3), "eps: expected two numbers, got 0.001"),
    ("Adafactor of transformers", settings(eps=(1e-30,)), "eps: expected two numbers"),
    ("Adafactor of transformers", settings(eps=(None, 1e-3)), "eps: expected a finite number, got None"),
    ("Adafactor of transformers", settings(lr=(1e-3,)), r"lr: expected one number, got \(0.001,\)"),
    ("Adafactor of transformers", settings(weight_decay=[0.1]), r"weight_decay: expected one number, got \[0.1\]"),
    ("Adafactor of transformers", settings(beta1=(None,)), r"beta1: expected one number, got \(None,\)"),
    ("Adafactor of transformers", settings(relative_step=True), "relative_step=True"),
    ("Adafactor of transformers", settings(lr=None), "lr: not supported: expected a rate, got none"),
    ("Adafactor of transformers", settings(beta1=0.9), "expected Adafactor of transformers's .*'exp_avg'"),
    ("Adafactor of transformers", put("exp_avg_sq_row", torch.ones(31)), r"index 2 is \[31, 64\]"),
    ("Adafactor of transformers", put("step", 1.5), "a whole number of steps"),
    ("Muon", settings(ns_coefficients=(1.0, 2.0)), "ns_coefficients: expected three numbers"),
    ("Muon", settings(eps=None), "eps: expected a finite number, got None"),
    ("Muon", settings(ns_coefficients=3.0), "ns_coefficients: expected three numbers, got 3.0"),
    ("Muon", settings(adjust_lr_fn=[torch.ones(2)]), "adjust_lr_fn: expected a name, got .a value of Tensor"),
    ("Muon", settings(adjust_lr_fn="evil\n" * 999), "settings that Muon takes, got: Adjust .* evil; the file"),
    ("Muon", settings(adjust_lr_fn="evil"), "settings that Muon takes, got"),
    ("Muon", settings(ns_steps=100), "ns_steps: expected 1 to 99, got 100"),
    ("Muon", put("momentum_buffer", torch.ones(5)), r"parameter 2: expected a matrix, as Muon .* shape \[5\]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(BAD)])
def test_state_that_no_run_leaves_is_refused(trained, tmp_path, name, change, message):
    checkpoint = Path(shutil.copytree(trained(name).checkpoint(2), tmp_path / "checkpoint-2"))
    edit_optimizer(checkpoint, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)
    report = inspect_checkpoint(checkpoint)
    assert (report.verdict, report.reasons) == ("unusable", (str(caught.value),))


def file_of(tmp_path: Path, optimizer: optim.Optimizer, change: Any = lambda saved: None) -> Path:
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    torch.save(saved, tmp_path / "optimizer.pt")
    return tmp_path / "optimizer.pt"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_file_is_of_one_kind(tmp_path, name):
    saved = read_optimizer(file_of(tmp_path, OPTIMIZERS[name]([nn.Parameter(torch.ones(4, 5))])))
    check_entries(saved)
    assert [kind.name for kind in KINDS if kind.fits(saved.groups) and name.startswith(kind.name)]
    assert type(saved.kind.class_()([nn.Parameter(torch.ones(1, 1))])) is saved.kind.class_()
    assert name.startswith(saved.kind.name)
    assert saved.num_parameters == 1
    assert saved.shape(0) == (None if name == "SGD" else (4, 5))


def test_what_could_be_two_optimizers_is_refused_with_both_names(tmp_path):
    """RAdam of older versions of torch has the settings of Adamax; what they keep differs."""

    def older(saved: dict[str, Any]) -> None:
        del saved["param_groups"][0]["decoupled_weight_decay"]

    def nothing_kept(saved: dict[str, Any]) -> None:
        older(saved)
        saved["state"] = {}

    def mixed(saved: dict[str, Any]) -> None:
        older(saved)
        saved["state"][0]["exp_inf"] = torch.ones(4, 5)

    def build() -> optim.Optimizer:
        return optim.RAdam([nn.Parameter(torch.ones(4, 5))])

    assert read_optimizer(file_of(tmp_path, build(), older)).kind.name == "RAdam"
    assert read_optimizer(file_of(tmp_path, optim.Adamax([nn.Parameter(torch.ones(4, 5))]))).kind.name == "Adamax"
    with pytest.raises(CheckpointError, match=r"could be those of RAdam or Adamax, and .* fits each"):
        read_optimizer(file_of(tmp_path, build(), nothing_kept))
    with pytest.raises(CheckpointError, match=r"could be those of RAdam or Adamax, and .* fits none"):
        read_optimizer(file_of(tmp_path, build(), mixed))


class Lamb(optim.Optimizer):
    """Settings that a class of a user's own shares with several; what it keeps looks like Adam's."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0})

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"step": 1, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def test_an_optimizer_of_a_users_own_is_not_taken_for_another(tmp_path):
    with pytest.raises(CheckpointError, match=r"nearest; missing \['amsgrad'\], unknown \[\]; only Adam, AdamW, "):
        read_optimizer(file_of(tmp_path, Lamb([nn.Parameter(torch.ones(4, 5))])))
