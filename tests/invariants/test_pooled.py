"""Evaluation rollouts and the batch of the step together, against exact sums over all responses."""

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig
from entropy_probe.analyses.batches import admit_batches
from entropy_probe.analyses.plan import plan
from entropy_probe.analyses.pooled import pooled
from entropy_probe.analyses.predict import predict
from entropy_probe.named import dot
from entropy_probe.report.sections.run import step_section
from entropy_probe.results.student import critical_value
from tests.invariants.problems import TABLE, batches, probe
from tests.reference.enumeration import LONGEST, TEMPERATURE, TinyPolicy, trained_optimizer

RATE = 3e-3


def many(number: int, norm: str, prompts: int = 32, n: int = 96) -> torch.Tensor:
    """Of many pairs of batches: pooled value, the step's exact first-order change, both errors, z, degrees of each."""
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    for state in optimizer.state.values():
        state["step"] = torch.tensor(500.0)
        state["exp_avg"] *= 0.02  # as large as this policy's gradients
    config = ProbeConfig(temperature=TEMPERATURE, merge_equal_prompts=False, learning_rate=RATE, loss_type="dr_grpo",
                         max_completion_length=LONGEST, normalization=norm)  # fmt: skip
    subject, rows = EntropyProbe(model, optimizer, config), []
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    slope = dict(zip(named, torch.autograd.grad(TABLE.entropy(model, norm), list(named.values())), strict=True))
    for seed in range(number):
        with subject._opened() as policy:
            prediction = predict(plan(policy, *admit_batches(policy, *batches(seed, prompts, 4, n))))
            found = pooled(prediction)
            both = found.predicted
            rows.append([both.value, dot(slope, prediction.plan.step.delta), both.se_evaluation, both.standard_error,
                         found.z, found.weight, found.own.value, prediction.change.value])  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64).T


def check(columns: torch.Tensor, least: float, most: float) -> None:
    value, exact, of_step, over_batches, z, weight, own, evaluation = columns
    gap = value - exact
    assert abs(gap.mean()) < 4 * gap.std() / len(gap) ** 0.5
    critical = critical_value(100)
    assert least <= (gap.abs() <= critical * of_step).double().mean() <= most
    assert least <= ((value - exact.mean()).abs() <= critical * over_batches).double().mean() <= most
    assert least <= (z.abs() <= critical).double().mean() <= most
    assert 0.05 < weight.mean() < 0.95
    # the errors given the step are uncorrelated, and together they are smaller than either's
    errors = torch.stack([own - exact, evaluation - exact])
    assert abs(torch.corrcoef(errors)[0, 1]) < 4 / len(gap) ** 0.5
    assert gap.std() < 1.02 * errors.std(1).min()


def test_unbiased_and_covering_together():
    check(many(40, "token"), 0.82, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_unbiased_and_covering_together_long(norm):
    check(many(2000, norm), 0.92, 0.98)


def test_each_batch_has_its_own_line():
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model), learning_rate=1e-4)
    update, evaluation = batches(groups=12)
    result, one = subject.run(update=update, evaluation=evaluation, pool=True), subject.one_batch(update)
    plain, both = subject.run(update=update, evaluation=evaluation), result.pooled
    assert (result.predicted, result.realized) == (plain.predicted, plain.realized)
    for name in ("value", "standard_error", "se_evaluation", "se_update"):
        assert getattr(both.own, name) == pytest.approx(getattr(one.predicted, name), rel=1e-9)
    assert both.own_realized.value == pytest.approx(one.realized.value, rel=1e-9)
    variances = [x.se_evaluation**2 for x in (result.predicted, both.own)]
    assert both.weight == pytest.approx(variances[1] / sum(variances), rel=1e-9)
    assert both.predicted.se_evaluation == pytest.approx((1 / sum(1 / v for v in variances)) ** 0.5, rel=1e-9)
    assert both.z == pytest.approx((one.predicted.value - result.predicted.value) / sum(variances) ** 0.5, rel=1e-6)
    mixed = both.weight * result.realized.value + (1 - both.weight) * one.realized.value
    assert both.realized.value == pytest.approx(mixed, rel=1e-9)
    rows = [row for block in step_section(result).blocks for row in getattr(block, "rows", ()) if hasattr(row, "label")]
    assert [row.label for row in rows if "by" in row.label.split()] == [
        "by its own batch", "by both δH₁", "by its own batch", "by both ΔH"
    ]  # fmt: skip


def test_two_looks_are_needed():
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model))
    update, evaluation = batches(groups=12)
    with pytest.raises(ValueError, match="pooled: expected evaluation rollouts beside the update batch, got the same"):
        subject.run(update=update, evaluation=update, pool=True)
    with pytest.raises(ValueError, match=r"one batch: expected at least 3 distinct prompts.*got 2"):
        subject.run(update=batches(groups=2)[0], evaluation=evaluation, pool=True)
    gradient = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"update: expected the step of an update batch, .* leave the gradient out"):
        subject.run(evaluation=evaluation, gradient=gradient, pool=True)
