"""Estimates from the scores of a whole batch, by the package's own functions for parts of one."""

from __future__ import annotations

from torch import Tensor

from entropy_probe import TokenScores
from entropy_probe.estimators import first_order as fo
from entropy_probe.estimators import realized
from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.estimators.curvature import per_decision_taylor
from entropy_probe.estimators.first_order import FirstOrder
from entropy_probe.estimators.importance import sequence_importance_weights, sequence_log_weights
from entropy_probe.estimators.realized import Change
from entropy_probe.estimators.uncertainty import Sampled
from entropy_probe.types import TokenCoefficients, Units


def coefficients(
    scores: TokenScores, prompt_ids: Tensor, units: Units, norm: str = "token", kind: str = "rao_blackwell"
) -> TokenCoefficients:
    return fo.entropy_coefficients(scores, prompt_ids, units, PositionSums.of(scores), norm, kind)


def predicted(
    before: TokenScores,
    slope: TokenScores,
    prompt_ids: Tensor,
    units: Units,
    norm: str = "token",
    kind: str = "rao_blackwell",
) -> FirstOrder:
    """The first-order change from derivatives of the scores along the step."""
    c, sums = coefficients(before, prompt_ids, units, norm, kind), fo.entropy(before, units, norm, kind)
    d = (c.logprobs * slope.logprobs).sum(1)
    d = d if c.entropies is None else d + (c.entropies * slope.entropies).sum(1)
    to_go = fo.length_coefficients(before, units, PositionSums.of(before)).logprobs
    longer = (to_go * slope.logprobs).sum().item() / sums.size.sum().item() if norm == "token" else 0.0
    return fo.first_order(units.total(d), sums.size, sums.ratio(), longer)


def per_decision(before: TokenScores, after: TokenScores, units: Units, norm: str = "token") -> Change:
    new = realized.per_decision(before, after, units, PositionSums.of(before), norm)
    return realized.change(new, fo.entropy(before, units, norm))


def snis(
    before: TokenScores, after: TokenScores, mode: str, units: Units, norm: str = "token", kind: str = "rao_blackwell"
) -> Change:
    log_weights, base = sequence_log_weights(before, after)
    weights = sequence_importance_weights(log_weights, mode, base=base)
    new = realized.snis(after, weights.normalized, units, norm, kind)
    return realized.change(new, fo.entropy(before, units, norm, kind))


def derivatives(
    before: TokenScores, first: TokenScores, second: TokenScores, units: Units, norm: str
) -> tuple[Sampled, Sampled]:
    return per_decision_taylor(before, first, second, units, PositionSums.of(before), norm).derivatives()
