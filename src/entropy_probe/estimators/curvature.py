"""First and second derivative of the realized change along a step, from derivatives of the scores.

Formulas: ``docs/theory.md``, "Sweeps and curvature".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.estimators.baselines import position_baseline, strictly_after
from entropy_probe.estimators.first_order import Normalization
from entropy_probe.estimators.uncertainty import Sampled, Units, ratio
from entropy_probe.types import TokenScores

__all__ = ["per_decision_derivatives"]


@dataclass(frozen=True, eq=False)
class _Taylor:
    """Value, first and second derivative of a sum over each unit, ``[U]`` each."""

    value: Tensor
    first: Tensor
    second: Tensor


def per_decision_derivatives(
    scores: TokenScores,
    first: TokenScores,
    second: TokenScores,
    units: Units,
    normalization: Normalization = "token",
) -> tuple[Sampled, Sampled]:
    """``d/d eta`` and ``d^2/d eta^2`` at 0 of the per-decision estimate of the change along a straight line.

    Where ``s_t(eta)``, ``h_t(eta)`` are the scores at ``theta + eta v``, a sequence's numerator is
    ``sum_t [w_<t h_t - w_<t (rho_t - 1) b_t]``. With dots for derivatives at 0 and ``C_t``, ``Q_t`` the sums of the
    first and second derivatives of ``s`` over the tokens before t, its derivatives are::

        sum_t [ h'_t + C_t h_t - b_t s'_t ]
        sum_t [ h''_t + 2 C_t h'_t + (C_t^2 + Q_t) h_t - b_t (s''_t + s'_t^2 + 2 C_t s'_t) ]

    Per token the denominator has the same form with ``h = 1``, and the derivatives are those of the ratio. Unbiased
    per sequence; a ratio, with a bias of order ``1 / N``, per token. Baselines are those of
    :func:`entropy_probe.estimators.realized.per_decision`, held fixed.

    Args:
        scores: ``s``, ``h`` at 0, nats.
        first: their first derivatives in ``eta``, 0 off the response.
        second: their second derivatives.
        units: the sampling units.
        normalization: per token or per sequence.

    Returns:
        Slope and second derivative, in nats per unit of ``eta`` and per squared unit, with each unit's influence.
    """
    mask = scores.response_mask
    s1, s2 = first.logprobs.double(), second.logprobs.double()
    before1, before2 = s1.cumsum(1) - s1, s2.cumsum(1) - s2
    weight2 = before1.square() + before2
    innovation2 = s2 + s1.square() + 2 * before1 * s1

    def reweighted(h: Tensor, h1: Tensor, h2: Tensor) -> _Taylor:
        baseline = position_baseline(strictly_after(h, mask), mask, units)
        by_token = (h, h1 + before1 * h - baseline * s1, h2 + 2 * before1 * h1 + weight2 * h - baseline * innovation2)
        return _Taylor(*(units.total(torch.where(mask, x, 0.0).sum(1)) for x in by_token))

    numerator = reweighted(scores.entropies.double(), first.entropies.double(), second.entropies.double())
    zeros = torch.zeros_like(s1)
    if normalization == "token":
        size = reweighted(mask.double(), zeros, zeros)
    else:
        per_unit = units.total(torch.ones(len(mask), dtype=torch.float64))
        size = _Taylor(per_unit, torch.zeros_like(per_unit), torch.zeros_like(per_unit))
    return _derivatives_of_ratio(numerator, size)


def _derivatives_of_ratio(a: _Taylor, b: _Taylor) -> tuple[Sampled, Sampled]:
    """``r = sum a / sum b``: from ``a' = r' b + r b'`` and ``a'' = r'' b + 2 r' b' + r b''``, unit by unit."""
    r = ratio(a.value, b.value)
    mean = b.value.mean()
    rest: Float[Tensor, " U"] = a.first - r.value * b.first
    slope = rest.sum() / b.value.sum()
    slope_influence = (rest - slope * b.value - r.influence * b.first.mean()) / mean
    rest = a.second - 2 * slope * b.first - r.value * b.second
    second = rest.sum() / b.value.sum()
    carried = 2 * slope_influence * b.first.mean() + r.influence * b.second.mean()
    return (
        Sampled(slope.item(), slope_influence),
        Sampled(second.item(), (rest - second * b.value - carried) / mean),
    )
