"""How well forecasts rank measured changes: correlations, what noise leaves of them, and their errors.

Formulas: ``docs/theory.md``, "Validation". Changes and forecasts are given on two halves of the evaluation batch, whose
noise is independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.estimators.attribution import rank_correlation, rank_correlation_interval

BOOTSTRAPS = 200
LARGEST = 1 - 1e-9
"""Of a correlation that ``atanh`` is taken of."""


@dataclass(frozen=True, eq=False)
class Changes:
    """The changes measured after ``S`` steps on an evaluation batch and on its two halves.

    Attributes:
        whole: on the whole batch, ``[S]``.
        halves: on each half, ``[2, S]``.
        influences: of each cluster of a half on its changes, ``[S, U]`` each.
    """

    whole: Float[Tensor, " S"]
    halves: Float[Tensor, "2 S"]
    influences: tuple[Float[Tensor, "S _"], Float[Tensor, "S _"]]

    def redrawn(self, generator: torch.Generator, times: float = 1.0) -> Float[Tensor, "R 2 S"]:
        """What other draws of each half's clusters, ``times`` as many, would add to its changes, to first order."""
        return torch.stack([_redrawn(of_half, generator, times) for of_half in self.influences], 1)


def _redrawn(influences: Tensor, generator: torch.Generator, times: float) -> Tensor:
    clusters = influences.shape[1]
    count = max(2, round(times * clusters))
    drawn = [
        torch.randint(clusters, (count,), generator=generator).bincount(minlength=clusters) for _ in range(BOOTSTRAPS)
    ]
    return torch.stack(drawn).double() @ influences.T / count


@dataclass(frozen=True, eq=False)
class Forecast:
    """What was forecast of the changes after ``S`` steps.

    Attributes:
        given: the forecast, ``[S]``; where there is none from rollouts other than those of the changes, it serves for
            neither half.
        halves: the same from each half of the changes' rollouts, ``[2, S]``; ``None`` where evaluation rollouts play no
            part in it.
        times: how many times as large as a half the rollouts of ``given`` are, where they are others; ``None`` where
            they are the changes' own.
    """

    given: Float[Tensor, " S"]
    halves: Float[Tensor, "2 S"] | None = None
    times: float | None = None


@dataclass(frozen=True)
class Score:
    """A rank correlation with its 95% interval.

    Attributes:
        value: the correlation.
        low: the interval's lower end.
        high: the interval's upper end.
        ceiling: what noise leaves of a perfect forecast; ``None`` where two halves do not agree at all.
    """

    value: float
    low: float
    high: float
    ceiling: float | None


def spearman_brown(correlation: float, times: int | float) -> float:
    """The reliability of ``times`` as much data, from the correlation of two equal parts: ``t r / (1 + (t - 1) r)``.

    Source: Spearman (1910); Brown (1910).
    """
    return times * correlation / (1 + (times - 1) * correlation)


def times_as_many(reliability: float, wanted: float) -> float:
    """How many times as much data would have the wanted reliability: :func:`spearman_brown` solved for ``times``."""
    return wanted * (1 - reliability) / (reliability * (1 - wanted))


def reliability(halves: Float[Tensor, "2 S"], times: float = 1.0) -> float | None:
    """The rank correlation of what two halves say, for ``times`` as much data as a half by :func:`spearman_brown`.

    Returns:
        ``None`` where all values of a half are equal.
    """
    correlation = rank_correlation(halves[0], halves[1])
    return None if correlation is None else spearman_brown(max(correlation, 0.0), times)


def score(forecast: Forecast, changes: Changes, *, crossed: bool, seed: int) -> Score | None:
    """How well a forecast ranks the changes, on rollouts that it does not come from.

    Crossed, each half's forecast is held against the changes measured on the other half, and the two rank correlations
    are averaged. Else the given forecast is held against the changes measured on the whole batch.

    The interval is ``tanh(atanh r +- 1.96 sqrt((1 + r^2 / 2) / (S - 3) + s^2))``: the choice of the steps (Bonett and
    Wright, 2000) and with ``s`` that of the evaluation rollouts, the standard deviation of ``atanh r`` over draws of
    their clusters with replacement. Changes move by the clusters' influences, and a forecast moves as changes measured
    on its rollouts would, which it does to first order and up to what all steps share.

    The ceiling, ``sqrt(reliability of the forecast x reliability of the changes)``, bounds the correlation of what is
    known with independent noise (Spearman, 1904). A forecast without evaluation rollouts has reliability 1.

    ``crossed`` is for a forecast from the rollouts of the changes; ``seed`` is that of the draws.

    Returns:
        ``None`` where all forecasts or all changes are equal.
    """
    held = (forecast, changes)
    none = torch.zeros(1, 2, len(changes.whole), dtype=torch.float64)
    value = _correlations(*held, none, none, crossed=crossed)
    if bool(value.isnan()):
        return None
    generator = torch.Generator().manual_seed(seed)
    moves = changes.redrawn(generator)
    others = moves if crossed else changes.redrawn(generator, (forecast.times or 2.0) / 2)
    redrawn = _correlations(*held, moves, others, crossed=crossed).clamp(-LARGEST, LARGEST).atanh()
    low, high = rank_correlation_interval(value.item(), len(changes.whole), redrawn.var().item())
    of_changes = reliability(changes.halves, 1.0 if crossed else 2.0)
    of_forecast = 1.0 if forecast.halves is None else reliability(forecast.halves, forecast.times or 1.0)
    product = (of_changes or 0.0) * (of_forecast or 0.0)
    return Score(value.item(), low, high, math.sqrt(product) if product > 0 else None)


def _correlations(
    forecast: Forecast, changes: Changes, moves: Tensor, forecast_moves: Tensor, *, crossed: bool
) -> Float[Tensor, " R"]:
    """Rank correlations after the changes, and what is forecast from rollouts, have moved, ``[R, 2, S]`` each."""
    given = forecast.given.expand(len(moves), 2, -1)
    if not crossed:
        given = given[:, 0] if forecast.halves is None else given[:, 0] + forecast_moves.mean(1)
        return _spearman(given, changes.whole + moves.mean(1))
    halves = given if forecast.halves is None else forecast.halves + forecast_moves
    return _spearman(halves, (changes.halves + moves).flip(1)).mean(1)


def _spearman(a: Float[Tensor, "*R S"], b: Float[Tensor, "*R S"]) -> Float[Tensor, "*R"]:
    """Spearman's rank correlation along the last axis, tied values at their mean rank; NaN where all are equal."""
    # how many are below less how many are above: twice the rank, from its mean
    pairs = ((v[..., None], v[..., None, :]) for v in (a, b))
    x, y = (((own > other).double() - (own < other).double()).sum(-1) for own, other in pairs)
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()
