"""The small pure functions, each against the sentence that defines it."""

import pytest
import torch

from entropy_probe import TokenScores
from entropy_probe.estimators.baselines import PositionSums, leave_one_out_mean, position_baseline, strictly_after
from entropy_probe.estimators.uncertainty import ratio
from entropy_probe.steps.moments import step_count, summarize_moments
from entropy_probe.types import Units

MASK = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0]]).bool()
VALUES = torch.arange(16, dtype=torch.float64).view(4, 4) ** 2


def positions(row: int) -> list[int]:
    return MASK[row].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("unit", [[0, 1, 2, 3], [0, 0, 1, 1], [0, 1, 0, 1]])
def test_position_baseline_leaves_the_whole_unit_out(unit):
    units, whole = Units(torch.tensor(unit), max(unit) + 1), PositionSums.of(TokenScores(-VALUES, VALUES, MASK))
    to_go = strictly_after(VALUES, MASK)
    got = position_baseline(
        to_go, MASK, units, whole.reaching, whole.of_kind("rao_blackwell"), torch.ones(len(MASK)).double()
    )
    for i in range(4):
        for t, column in enumerate(positions(i)):
            others = [to_go[j, positions(j)[t]].item() for j in range(4)
                      if unit[j] != unit[i] and len(positions(j)) > t]  # fmt: skip
            assert got[i, column] == pytest.approx(sum(others) / len(others) if others else 0.0)
    assert (got[~MASK] == 0).all()


def test_strictly_after_skips_gaps_and_itself():
    got = strictly_after(VALUES, MASK)
    for i in range(4):
        for t, column in enumerate(positions(i)):
            assert got[i, column] == sum(VALUES[i, c] for c in positions(i)[t + 1 :])
    assert (got[~MASK] == 0).all()


def test_leave_one_out_mean_is_within_the_prompt_where_it_can_be():
    values, prompts = torch.tensor([1.0, 4.0, 7.0, 100.0]), torch.tensor([5, 5, 5, 9])
    assert leave_one_out_mean(values, prompts, 112.0, 4.0, torch.ones(4)).tolist() == [5.5, 4.0, 2.5, 4.0]
    with pytest.raises(ValueError, match="at least 2 sequences"):
        leave_one_out_mean(torch.ones(1), torch.zeros(1, dtype=torch.long), 1.0, 1.0, torch.ones(1))


def test_ratio_is_the_mean_when_the_denominator_is_one():
    x = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    got = ratio(x, torch.ones(3, dtype=torch.float64))
    assert got.value == pytest.approx(3.0)
    assert got.standard_error == pytest.approx((x.std() / 3**0.5).item())
    with pytest.raises(ValueError, match="at least 2 independent units, got 1"):
        ratio(x[:1], x[:1])


def test_moments_are_counted_by_element_and_corrected():
    group = {"betas": (0.9, 0.99), "eps": 1e-8, "amsgrad": False}
    state = {"step": torch.tensor(2.0), "exp_avg_sq": torch.tensor([1.0, 4.0])}
    entries = [(2, state, group), (6, {}, group), (2, {"step": 2, "exp_avg_sq": torch.zeros(2)}, group)]
    report = summarize_moments(entries, "test", (0.1,))
    assert report.coverage == pytest.approx(0.2)
    assert (report.num_parameters, report.num_elements, report.steps) == (3, 10, (0, 2))
    correction = 1 - 0.99**2
    assert report.scale_min == pytest.approx((correction / 4) ** 0.5, rel=1e-6)
    assert report.scale_max == pytest.approx(correction**0.5, rel=1e-6)
    maximum = state | {"max_exp_avg_sq": torch.tensor([4.0, 16.0])}
    report = summarize_moments([(2, maximum, group | {"amsgrad": True})], "test", (0.1,))
    assert report.scale_max == pytest.approx((correction / 4) ** 0.5, rel=1e-6)
    assert step_count({}) == 0
    assert step_count({"exp_avg_sq": torch.ones(1)}) is None
    with pytest.raises(ValueError, match="positive step count"):
        step_count({"exp_avg_sq": torch.ones(1), "step": 0})
