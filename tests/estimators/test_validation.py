"""Scores of forecasts where truth and noise are known: means, ceilings, intervals."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from entropy_probe.estimators.validation import (
    Changes,
    Forecast,
    reliability,
    score,
    spearman_brown,
    times_as_many,
)

PROMPTS, STEPS, UNITS = 16, 40, 30


@dataclass
class Drawn:
    """Steps on halves of some prompts: what they do, and what two halves of some rollouts say of it."""

    truth: Tensor
    changes: Changes
    by_half: Tensor
    other: Tensor
    """A forecast from as many other rollouts."""


def draw(noise: float, generator: torch.Generator) -> Drawn:
    """Each unit sees each prompt's effect with noise of its own, which changes and contributions share."""
    effects = torch.randn(PROMPTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = effects + noise * torch.randn(3, UNITS, PROMPTS, generator=generator, dtype=torch.float64)
    kept = torch.stack([torch.randperm(PROMPTS, generator=generator) < PROMPTS // 2 for _ in range(STEPS)]).double()
    by_half = torch.stack([kept @ half.mean(0) for half in seen])
    influences = tuple(kept @ (half - half.mean(0)).T for half in seen[:2])
    other = torch.randn(2 * UNITS, PROMPTS, generator=generator, dtype=torch.float64).mean(0)
    return Drawn(
        kept @ effects,
        Changes(by_half[:2].mean(0), by_half[:2], influences),
        by_half[:2],
        kept @ (effects + noise * other),
    )


@pytest.mark.parametrize("crossed", [True, False])
def test_noise_that_is_shared_does_not_count_and_a_perfect_forecast_reaches_the_ceiling(crossed):
    generator = torch.Generator().manual_seed(1)
    noise = 4.0  # as large as the effects, after the mean over a half
    found = []
    for _ in range(60):
        d = draw(noise, generator)
        noisy = Forecast(d.changes.whole, d.by_half) if crossed else Forecast(d.other, d.by_half, 2.0)
        scores = [score(f, d.changes, crossed=crossed, seed=0) for f in (noisy, Forecast(d.truth))]
        found.append([x for s in scores for x in (s.value, s.ceiling or math.nan)])
    noisy, noisy_ceiling, exact, exact_ceiling = torch.tensor(found).nanmean(0).tolist()
    signal = 1.0 / (1.0 + noise**2 / (UNITS if crossed else 2 * UNITS))
    # ranks correlate a little less than values
    assert noisy == pytest.approx(signal, abs=0.06)
    assert exact == pytest.approx(signal**0.5, abs=0.05)
    assert noisy / noisy_ceiling == pytest.approx(1, abs=0.08)
    assert exact / exact_ceiling == pytest.approx(1, abs=0.08)
    assert noisy < exact - 0.05


@pytest.mark.parametrize("crossed", [True, False])
def test_the_interval_is_about_steps_and_rollouts(crossed):
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(120):
        d = draw(3.0, generator)
        noisy = Forecast(d.changes.whole, d.by_half) if crossed else Forecast(d.other, d.by_half, 2.0)
        s = score(noisy, d.changes, crossed=crossed, seed=0)
        found.append((s.value, s.low, s.high))
    values, low, high = torch.tensor(found).T
    centre = values.mean()
    covered = ((low <= centre) & (centre <= high)).double().mean()
    assert covered >= 0.9
    assert (high - low).mean() < 6 * values.std(), "so wide that it says nothing"


def test_a_forecast_without_two_values_has_no_score():
    d = draw(1.0, torch.Generator().manual_seed(3))
    assert score(Forecast(torch.zeros(STEPS, dtype=torch.float64)), d.changes, crossed=True, seed=0) is None
    still = Changes(torch.zeros(STEPS, dtype=torch.float64), torch.zeros(2, STEPS, dtype=torch.float64),
                    d.changes.influences)  # fmt: skip
    assert score(Forecast(d.truth), still, crossed=False, seed=0) is None
    assert reliability(still.halves) is None


def test_halves_that_do_not_agree_leave_no_ceiling():
    d = draw(1.0, torch.Generator().manual_seed(4))
    opposed = Changes(d.truth, torch.stack([d.truth, -d.truth]), d.changes.influences)
    assert reliability(opposed.halves) == 0
    assert score(Forecast(d.truth), opposed, crossed=False, seed=0).ceiling is None


def test_how_many_more():
    assert spearman_brown(0.5, 2) == pytest.approx(2 / 3)
    assert spearman_brown(0.5, times_as_many(0.5, 0.9)) == pytest.approx(0.9)
    assert times_as_many(0.9, 0.9) == pytest.approx(1)
