"""Momentum alone after a step: against the exact entropies of the policy that torch's own optimizer arrives at."""

import copy
from unittest import mock

import pytest
import torch

from entropy_probe import ProbeConfig
from entropy_probe.analyses import coast, predict
from entropy_probe.analyses.batches import admit_evaluation
from entropy_probe.analyses.measure import measure
from entropy_probe.analyses.plan import plan_given
from entropy_probe.cli.config import RunConfig
from entropy_probe.report.sections.run import step_section
from entropy_probe.steps import afterlife
from tests.invariants.problems import TABLE, batches, probe
from tests.invariants.traces import assert_same, state
from tests.reference.enumeration import TinyPolicy, trained_optimizer
from tests.steps.optimizers import Lion

KINDS = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.5}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.05}),
    "sgd": (torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.05}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.7}),
}


def exact(model, optimizer, gradient, steps, *, decay, normalization="sequence"):
    """What zero-gradient steps of torch's own optimizer do to the exact entropy."""
    twin, again = copy.deepcopy((model, optimizer))
    for name, p in twin.named_parameters():
        p.grad = gradient[name].clone()
    again.step()
    before = TABLE.entropy(twin, normalization).item()
    for group in again.param_groups if not decay else ():
        group["weight_decay"] = 0.0
    for _ in range(steps):
        for p in twin.parameters():
            p.grad = torch.zeros_like(p)
        again.step()
    return TABLE.entropy(twin, normalization).item() - before


@pytest.mark.parametrize("kind", KINDS)
def test_the_measured_change_is_that_of_the_optimizer_itself(kind):
    cls, options = KINDS[kind]
    model = TinyPolicy()
    optimizer = trained_optimizer(model, cls=cls, lr=2e-3, **options)
    update, evaluation = batches(n=3000)
    untouched = state(model, optimizer)
    result = probe(model, optimizer, coast=True, normalization="sequence").run(update=update, evaluation=evaluation)
    assert_same(untouched, state(model, optimizer))
    coasted, gradient = result.coasted, result.step.gradient
    wanted = exact(model, optimizer, gradient, coasted.steps, decay=False)
    change = coasted.change.estimate
    assert abs(change.value - wanted) < 3 * change.standard_error
    assert abs(wanted) > 8 * change.standard_error  # else this would see nothing
    beyond = exact(model, optimizer, gradient, coasted.steps + 100, decay=False)
    assert beyond == pytest.approx(wanted, rel=2e-3)
    assert result.committed.value + coasted.difference.value == pytest.approx(change.value, rel=1e-9)
    if "weight_decay" in options:
        with_decay = exact(model, optimizer, gradient, coasted.steps, decay=True) - wanted
        assert abs(coasted.weight_decay.value - with_decay) < 3 * coasted.weight_decay.standard_error
        assert abs(with_decay) > 5 * coasted.weight_decay.standard_error
    else:
        assert coasted.weight_decay is None


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_small_steps_coast_as_far_as_committed(kind, normalization):
    """On the same rollouts, to second order in the rate, with an error that is of that order too."""
    cls, options = KINDS[kind]
    model = TinyPolicy()
    optimizer = trained_optimizer(model, cls=cls, **options)
    update, evaluation = batches(n=200)
    relative = []
    for rate in (1e-4, 1e-5):
        settings = {"coast": True, "normalization": normalization, "learning_rate": rate}
        result = probe(model, optimizer, **settings).run(update=update, evaluation=evaluation)
        gap = result.coasted.difference
        relative.append((abs(gap.value / result.committed.value), gap.standard_error / result.committed.standard_error))
    assert max(relative[1]) < 5e-3
    assert all(small < 0.2 * large for small, large in zip(relative[1], relative[0], strict=True))


def spread_and_error(number, normalization):
    """Of what coasting after one and the same step does: the errors over the spread, and z of the mean to the truth."""
    model, rows = TinyPolicy(), []
    optimizer, generator = trained_optimizer(model, lr=4e-3, betas=(0.6, 0.9)), torch.Generator().manual_seed(4)
    gradient = {n: 0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}
    alone = afterlife.coasted(dict(model.named_parameters()), optimizer, gradient)
    settings = {"coast": True, "normalization": normalization, "measure_noise_floor": False, "max_grad_norm": None}
    with (
        probe(model, optimizer, **settings)._opened() as policy,
        mock.patch.object(coast, "coasted", return_value=alone),
    ):
        for _ in range(number):
            evaluation = admit_evaluation(policy, TABLE.rollouts.select(TABLE.sample(TinyPolicy(), 100, generator)))
            planned = plan_given(policy, gradient, None, evaluation, shares=False)
            change = coast.measure_coasting(planned, measure(planned)).change
            rows.append([change.value, change.standard_error])
    values, errors = torch.tensor(rows, dtype=torch.float64).T
    wanted = exact(model, optimizer, gradient, alone.steps, decay=False, normalization=normalization)
    z = (values.mean() - wanted) / (values.std() / number**0.5)
    return (errors.square().mean().sqrt() / values.std()).item(), z.item()


def test_the_error_is_the_spread_over_evaluation_batches():
    error, z = spread_and_error(60, "token")
    assert 0.75 < error < 1.35  # 0.6 and 1.6 where the error is that of the change by the step, or by all of them
    assert abs(z) < 4


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_the_error_is_the_spread_over_many_evaluation_batches(normalization):
    error, z = spread_and_error(500, normalization)
    assert 0.9 < error < 1.15
    assert abs(z) < 4


def test_the_way_to_rest_is_taken_once():
    update, evaluation = batches(n=40)
    model = TinyPolicy()
    optimizer = trained_optimizer(model, cls=torch.optim.SGD, momentum=0.8)
    with (
        mock.patch.object(predict, "coasted", wraps=afterlife.coasted) as predicted,
        mock.patch.object(coast, "coasted", wraps=afterlife.coasted) as measured,
    ):
        result = probe(model, optimizer, coast=True, horizon=None).run(update=update, evaluation=evaluation)
    assert result.coasted.difference is not None
    assert (predicted.call_count, measured.call_count) == (1, 0)


def test_optimizers_that_do_not_come_to_rest_or_have_no_momentum_say_so():
    update, evaluation = batches(n=40)
    model = TinyPolicy()
    signs, growing = "its steps do not shrink with the momentum", "its denominators shrink about as fast"
    cases = [
        ("coasting_has_no_end", signs, Lion(model.parameters())),
        ("coasting_has_no_end", growing, trained_optimizer(model, betas=(0.9, 0.8))),
        ("nothing_to_coast", "it has no momentum", torch.optim.SGD(model.parameters(), 0.1)),
    ]
    for code, why, optimizer in cases:
        result = probe(model, optimizer, coast=True).run(update=update, evaluation=evaluation)
        assert result.coasted is result.committed is None
        (text,) = [note.text for note in result.diagnostics.notes if note.code == code]
        assert why in text


def test_a_policy_that_coasts_too_far_for_the_rollouts_is_refused():
    update, evaluation = batches(n=100)
    model = TinyPolicy()
    optimizer = trained_optimizer(model, lr=0.02)
    result = probe(model, optimizer, coast=True).run(update=update, evaluation=evaluation)
    assert result.realized.value is not None
    assert result.coasted.change.value is None
    assert result.coasted.change.status in ("low_ess", "high_pareto_k")
    assert any(note.text.startswith("coasting: ") for note in result.diagnostics.notes)
    assert "coasted refused" in [f"{row.label} {row.value}" for row in step_section(result).blocks[-1].rows]


def test_where_it_cannot_be_measured_it_is_refused_at_once():
    with pytest.raises(ValueError, match="coast: expected geometry: adamw"):
        ProbeConfig(coast=True, geometry="frozen")
    with pytest.raises(ValueError, match=r"probe\.coast: expected evaluation rollouts beside it, got mode one_batch"):
        RunConfig.model_validate(
            {"checkpoint": "c", "output_dir": "o", "mode": "one_batch", "probe": {"coast": True}}
            | {"rollouts": {"update": "u.parquet"}}
        )
    update, evaluation = batches(n=20)
    model = TinyPolicy()
    asked = probe(model, trained_optimizer(model), coast=True)
    with pytest.raises(ValueError, match="coast: expected evaluation rollouts, got none"):
        asked.one_batch(update)
    with pytest.raises(ValueError, match="coast: expected a checkpoint"):
        asked.ahead(gradient={n: torch.ones_like(p) for n, p in model.named_parameters()}, evaluation=evaluation)
