"""Momentum alone after a step: against the exact entropies of the policy that torch's own optimizer arrives at."""

import copy
from unittest import mock

import pytest
import torch

from entropy_probe import ProbeConfig
from entropy_probe.analyses import coast, predict
from entropy_probe.analyses.batches import admit_evaluation
from entropy_probe.analyses.gradient import differentiate
from entropy_probe.analyses.measure import measure
from entropy_probe.analyses.own_batch import admit_own
from entropy_probe.analyses.plan import plan, plan_given
from entropy_probe.analyses.predict import entropy_surrogate
from entropy_probe.gradients.per_sample import Side
from entropy_probe.gradients.rows import flat
from entropy_probe.integrations.live import logged_keys
from entropy_probe.report.sections.run import step_section
from entropy_probe.results.live import StepRecord
from entropy_probe.steps import afterlife
from entropy_probe.steps.adamw import clip_gradient
from tests.invariants.problems import TABLE, batches, probe
from tests.invariants.traces import assert_same, state
from tests.reference.enumeration import LONGEST, TinyPolicy, trained_optimizer
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
            change = coast.measure_rest(planned, measure(planned), coast.come_to_rest(planned)).change
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


@pytest.mark.parametrize(("kind", "normalization"), [("adamw", "token"), ("sgd", "sequence")])
def test_one_batch_leaves_out_what_prompts_do_to_themselves(kind, normalization):
    """Committed by its definition, prompt by prompt; coasted is as far for small steps, and less the same."""
    cls, options = KINDS[kind]
    model = TinyPolicy()
    optimizer = trained_optimizer(model, cls=cls, **(options | {"lr": 1e-6}))
    for moments in optimizer.state.values():
        moments.update({k: 0.02 * x for k, x in moments.items() if k in ("exp_avg", "momentum_buffer")})
        moments.update({k: 4e-4 * x for k, x in moments.items() if k == "exp_avg_sq"})
    update, _ = batches(groups=5)
    settings = {"coast": True, "normalization": normalization, "loss_type": "dr_grpo", "max_completion_length": LONGEST}
    subject = probe(model, optimizer, **settings, max_grad_norm=1e-2)
    result = subject.one_batch(update)
    with subject._opened() as policy:
        planned = plan(policy, *admit_own(policy, update))
        whole, stored = planned.batch.gradient.total, planned.batch.gradient.stored
        surrogate, local = entropy_surrogate(planned), planned.evaluation.local
        side = Side(surrogate, store=True)
        slope = differentiate(policy, update, local, side, progress=lambda *_: None, hooks=planned.hooks)

        def way(gradient):
            clipped = clip_gradient(gradient, 1e-2).values
            far = afterlife.coasted(policy.parameters, optimizer, clipped)
            near = afterlife.coasted(policy.parameters, optimizer, clipped, steps=0)
            return flat({n: far.parameters[n] - near.parameters[n] for n in policy.parameters}, policy.parameters)

        along, total, others = way(whole), slope.stored.sum(0), 0.0
        products = slope.stored @ along
        for unit in range(5):
            left = {n: 5 / 4 * (g - y) for (n, g), y in zip(whole.items(), unflat(stored[unit], whole), strict=True)}
            moved_by = along - way(left)
            others += (slope.stored[unit] - total / 5) @ moved_by
        size = planned.before.sums.size.sum()
    assert abs(others) > 1e-3 * abs(products.sum())
    assert result.committed.value == pytest.approx(((products.sum() - others) / size).item(), rel=1e-3)
    assert result.coasted.change.batch == "own"
    assert result.coasted.change.value == pytest.approx(result.committed.value, rel=1e-3)
    assert result.coasted.difference.standard_error < 1e-2 * result.committed.standard_error


def unflat(row, like):
    return [x.view(g.shape) for x, g in zip(row.split([g.numel() for g in like.values()]), like.values(), strict=True)]


@pytest.mark.parametrize("own", [True, False])
def test_live_it_is_measured_from_where_the_optimizer_arrives(own):
    model = TinyPolicy()
    optimizer = trained_optimizer(model, lr=1e-4, weight_decay=0.1)
    update, evaluation = batches(n=200)
    subject = probe(model, optimizer, coast=True, max_grad_norm=None, horizon=None)
    given = {"batch": update} if own else {"evaluation": evaluation}
    expected = subject.one_batch(update) if own else subject.run(update=update, evaluation=evaluation)
    ahead = subject.ahead(gradient=expected.step.gradient, **given)
    for name, p in model.named_parameters():
        p.grad = expected.step.gradient[name].clone()
    optimizer.step()
    arrived = state(model, optimizer)
    result = ahead.taken()
    assert_same(arrived, state(model, optimizer))
    assert result.committed.value == pytest.approx(expected.committed.value, rel=1e-9)
    for name in ("steps", "change", "difference", "weight_decay"):
        got, wanted = getattr(result.coasted, name), getattr(expected.coasted, name)
        assert (got == wanted) if name == "steps" else got.value == pytest.approx(wanted.value, rel=1e-6), name
    record = StepRecord.of(result, 7)
    assert record.coasted.value == result.coasted.change.value
    assert "entropy_probe/coasted" in logged_keys(record)


def test_the_frozen_geometry_has_none():
    with pytest.raises(ValueError, match="coast: expected geometry: adamw"):
        ProbeConfig(coast=True, geometry="frozen")
