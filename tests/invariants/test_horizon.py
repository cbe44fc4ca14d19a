"""The change within a horizon, against exact sums over all responses of the enumerable policy."""

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from entropy_probe import TokenScores
from entropy_probe.estimators import first_order as fo
from entropy_probe.estimators.baselines import PositionSums, strictly_after, strictly_before
from entropy_probe.estimators.horizon import differences, first_order_along, horizons, second_order, settled
from entropy_probe.estimators.realized import change, per_decision
from entropy_probe.estimators.uncertainty import Sampled
from entropy_probe.types import Clusters
from tests.invariants.exact import STEP, Setting, scores_at

HORIZONS = (0, 1, 2, None)
NORMS = ("token", "sequence")


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting.build()


def exact(setting: Setting, k: int | None, norm: str, delta: dict[str, Tensor]) -> tuple[float, float]:
    """First-order and realized change of H^(k), prefix by prefix."""
    old, mask, p = setting.before, setting.table.rollouts.response_mask, setting.probabilities

    def value(parameters: dict[str, Tensor]) -> Tensor:
        new = scores_at(setting, parameters)
        total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        first = int(mask.int().argmax(1)[0])
        for t in range(first, mask.shape[1]):
            begin = first if k is None else max(first, t - k)
            weight = (new.logprobs[:, begin:t] - old.logprobs[:, begin:t].detach()).sum(1).exp() * mask[:, t] * p
            total = total + (weight * new.entropies[:, t]).sum()
            count = count + weight.sum()
        return total / count if norm == "token" else total

    theta = {n: x.detach() for n, x in setting.model.named_parameters()}
    here, slope = jvp(value, (theta,), (delta,))
    return slope.item(), (value({n: theta[n] + delta[n] for n in theta}) - here).item()


def step(setting: Setting) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    named = {n: p.detach() for n, p in setting.model.named_parameters()}
    return {n: STEP * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in named.items()}


def estimates(setting: Setting, rows: Tensor, k: int | None, norm: str) -> tuple[Sampled, Sampled]:
    before, after, slope = (s.select(rows) for s in (setting.before, setting.after, setting.slope))
    clusters, positions = Clusters.sequences(len(rows)), PositionSums.of(before)
    sums = fo.entropy(before, clusters, norm)
    contributions, lengths = first_order_along(before, slope, clusters, positions, norm, k)
    sigma = (lengths.sum() / sums.size.sum()).item()
    return (
        fo.first_order(contributions, sums.size, sums.ratio(), sigma),
        change(per_decision(before, after, clusters, positions, norm, k), sums),
    )


@pytest.mark.parametrize(
    ("k", "norm"),
    [
        pytest.param(k, norm, marks=[pytest.mark.slow] * (norm == "sequence" and k != 1))
        for k in HORIZONS
        for norm in NORMS
    ],
)
def test_unbiased_and_covering(setting, k, norm):
    generator, values, errors = torch.Generator().manual_seed(21), [], []
    for _ in range(500):
        pair = estimates(setting, setting.draw(200, generator), k, norm)
        values.append([x.value for x in pair])
        errors.append([x.standard_error for x in pair])
    values, errors, truth = (
        torch.tensor(values),
        torch.tensor(errors),
        torch.tensor(exact(setting, k, norm, step(setting))),
    )
    z = (values.mean(0) - truth) / (values.std(0) / len(values) ** 0.5)
    assert bool((z.abs() < 4).all()), f"z {z.tolist()}"
    covered = ((values - truth).abs() <= 1.97 * errors).double().mean(0)
    assert bool(((covered >= 0.92) & (covered <= 0.98)).all()), covered.tolist()


def test_horizons_differ_by_more_than_the_error_of_that_test(setting):
    values = [exact(setting, k, "token", step(setting)) for k in HORIZONS]
    assert len({round(first, 6) for first, _ in values}) == 3  # of three tokens the last has two before it
    assert values[2] == pytest.approx(values[3], rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_bound_it_is_the_change_itself(setting, norm):
    rows = setting.draw(64, torch.Generator().manual_seed(1))
    for k in (2, 5):
        for one, whole in zip(estimates(setting, rows, k, norm), estimates(setting, rows, None, norm), strict=True):
            assert one.value == pytest.approx(whole.value, rel=1e-12)
            torch.testing.assert_close(one.influence, whole.influence, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("k", HORIZONS)
def test_the_realized_change_becomes_the_first_order(setting, k, norm):
    rows, theta = setting.draw(64, torch.Generator().manual_seed(2)), dict(setting.model.named_parameters())
    delta, mask = step(setting), setting.table.rollouts.response_mask
    before, clusters = setting.before.select(rows), Clusters.sequences(64)
    positions, sums = PositionSums.of(before), fo.entropy(before, clusters, norm)
    gaps = []
    for eta in (1e-2, 1e-3):
        there, opposite = (
            TokenScores(*(x.detach() for x in (s.logprobs, s.entropies)), mask).select(rows)
            for s in (scores_at(setting, {n: theta[n] + sign * eta * delta[n] for n in theta}) for sign in (1, -1))
        )
        first, second = (
            first_order_along(before, slopes, clusters, positions, norm, k)[0]
            for slopes in (differences(before, there), second_order(before, there, opposite))
        )
        contributions = first - second
        realized = change(per_decision(before, there, clusters, positions, norm, k), sums)
        gaps.append(abs(realized.value - (contributions.sum() / sums.size.sum()).item()) / abs(realized.value))
    assert gaps[0] < 0.05
    assert gaps[1] < 0.15 * gaps[0]


def test_windows_skip_gaps():
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True, False, True, True]])
    assert strictly_after(values, mask, 1).tolist() == [[0, 4, 16, 0, 32, 0]]
    assert strictly_after(values, mask, 2).tolist() == [[0, 20, 48, 0, 32, 0]]
    assert strictly_before(values, mask, 1).tolist() == [[0, 0, 2, 0, 4, 16]]
    assert strictly_after(values, mask, 9).tolist() == strictly_after(values, mask).tolist()
    assert not strictly_after(values, mask, 0).any()


def test_the_horizon_from_which_nothing_longer_differs():
    def sampled(*influence: float) -> Sampled:
        values = torch.tensor(influence, dtype=torch.float64)
        return Sampled(values.mean().item(), values - values.mean())

    near, far = sampled(1.0, 1.1, 0.9), sampled(2.0, 2.2, 1.8)
    assert settled([near, far, far, sampled(2.0, 2.3, 1.8)], 2.0) == 1
    assert settled([near, near], 2.0) == 0
    assert settled([near, far], 2.0) == 1
    assert horizons(1) == (0, None)
    assert horizons(40) == (0, 1, 2, 4, 8, 16, 32, None)
    assert horizons(33) == (0, 1, 2, 4, 8, 16, None)
