"""After a probe everything is bitwise what it was, also when it failed half-way."""

import random

import jaxtyping
import pytest
import torch
from torch import nn

from entropy_probe import EntropyProbe, ProbeConfig
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.isolation import _precision_switches, evaluating
from tests.invariants.problems import batches
from tests.invariants.traces import WithState, assert_same, state
from tests.reference.enumeration import TEMPERATURE, TinyPolicy, trained_optimizer


@pytest.fixture
def run():
    torch.manual_seed(4)
    model = WithState()
    model.train()
    model.inner.eval()
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    optimizer = trained_optimizer(model)
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    torch.set_float32_matmul_precision("high")
    yield model, optimizer
    torch.set_float32_matmul_precision("highest")


def test_after_success(run):
    model, optimizer = run
    update, evaluation = batches()
    before = state(model, optimizer)
    for geometry in ("adamw", "frozen"):
        EntropyProbe(model, optimizer, ProbeConfig(temperature=TEMPERATURE, geometry=geometry)).run(
            update=update, evaluation=evaluation
        )
    assert_same(before, state(model, optimizer))


class BoomError(Exception):
    pass


@pytest.mark.parametrize("call", range(7))
def test_after_a_failure_in_any_phase(run, call, monkeypatch):
    """One of the forward passes raises, from the first, which scores, to the last, which is after the step."""
    model, optimizer = run
    update, evaluation = batches(n=20)
    original, seen, fatal = Scorer.model_logits, [], None

    def explode(self, batch):  # type: ignore[no-untyped-def]
        seen.append(self)
        if len(seen) == fatal:
            torch.rand(3)
            raise BoomError
        return original(self, batch)

    monkeypatch.setattr(Scorer, "model_logits", explode)
    config = ProbeConfig(temperature=TEMPERATURE, max_tokens_per_microbatch=20)
    EntropyProbe(model, optimizer, config).run(update=update, evaluation=evaluation)
    fatal, seen = 1 + call * (len(seen) - 1) // 6, []
    before = state(model, optimizer)
    with pytest.raises(BoomError):
        EntropyProbe(model, optimizer, config).run(update=update, evaluation=evaluation)
    assert_same(before, state(model, optimizer))


def test_failure_while_stepped(run, monkeypatch):
    model, optimizer = run
    update, evaluation = batches(n=20)
    before = state(model, optimizer)
    original = Scorer.score

    def explode(self, *args):  # type: ignore[no-untyped-def]
        if not torch.equal(model.inner.weight, before["p.inner.weight"][0]):
            raise BoomError
        return original(self, *args)

    monkeypatch.setattr(Scorer, "score", explode)
    with pytest.raises(BoomError):
        EntropyProbe(model, optimizer, ProbeConfig(temperature=TEMPERATURE)).run(update=update, evaluation=evaluation)
    assert_same(before, state(model, optimizer))


def test_works_under_no_grad_and_scheduler(run):
    """A scheduler patches optimizer.step; the shadow step must not reach the live parameters through it."""
    model, optimizer = run
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    called = []
    optimizer.register_step_post_hook(lambda *a: called.append(1))
    update, evaluation = batches(n=20)
    before = state(model, optimizer)
    with torch.no_grad():
        EntropyProbe(model, optimizer, ProbeConfig(temperature=TEMPERATURE)).run(update=update, evaluation=evaluation)
    assert_same(before, state(model, optimizer))
    assert not called


def test_python_random_state():
    """The run-time type checker would draw from `random` itself."""
    assert jaxtyping.config.jaxtyping_disable
    model = TinyPolicy()
    optimizer, (update, evaluation) = trained_optimizer(model), batches(n=20)
    before = random.getstate()
    EntropyProbe(model, optimizer, ProbeConfig(temperature=0.8)).run(update=update, evaluation=evaluation)
    assert random.getstate() == before


ALLOW_TF32 = {
    "matmul precision": lambda: torch.set_float32_matmul_precision("high"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "one switch": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "all switches": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.fixture
def switches():
    """Torch's precision switches, none of them set; put back afterwards."""
    switches = _precision_switches()
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "none"
    yield switches
    torch.set_float32_matmul_precision("highest")
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


@pytest.mark.parametrize("how", ALLOW_TF32)
def test_full_precision_however_less_was_allowed(switches, how):
    """The Trainer's tf32=True sets the switches of torch 2.9, with which the older interface refuses to work."""
    ALLOW_TF32[how]()
    before = [switch.fp32_precision for switch in switches]
    assert "tf32" in (before[0], before[2])
    with evaluating(nn.Linear(1, 1)):
        assert {switch.fp32_precision for switch in switches} <= {"none", "ieee"}
        assert torch.get_float32_matmul_precision() == "highest"
    assert [switch.fp32_precision for switch in switches] == before
    if before[0] == "tf32":  # the others took it from the first, and still do
        torch.backends.fp32_precision = "none"
        assert switches[2].fp32_precision == "none"
