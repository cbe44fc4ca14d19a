"""First and second derivative of the realized change along a step, from derivatives of the scores.

Formulas: ``docs/theory.md``, "Sweeps and curvature".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.estimators.baselines import PositionSums, position_baseline, strictly_after
from entropy_probe.estimators.first_order import Normalization
from entropy_probe.estimators.uncertainty import Sampled, ratio
from entropy_probe.types import Clusters, TokenScores


@dataclass(frozen=True, eq=False)
class TaylorSums:
    """A ratio's numerator and denominator with two derivatives each, summed over each cluster; parts of a batch add up.

    Attributes:
        table: value, first and second derivative of numerator and of denominator, ``[2, 3, U]``, float64.
    """

    table: Float[Tensor, "2 3 U"]

    def derivatives(self) -> tuple[Sampled, Sampled]:
        """Slope and second derivative of the ratio, with each cluster's influence.

        ``r = sum a / sum b``: from ``a' = r' b + r b'`` and ``a'' = r'' b + 2 r' b' + r b''``, cluster by cluster.
        """
        (a, a1, a2), (b, b1, b2) = self.table
        r = ratio(a, b)
        mean = b.mean()
        rest: Float[Tensor, " U"] = a1 - r.value * b1
        slope = rest.sum() / b.sum()
        slope_influence = (rest - slope * b - r.influence * b1.mean()) / mean
        rest = a2 - 2 * slope * b1 - r.value * b2
        second = rest.sum() / b.sum()
        carried = 2 * slope_influence * b1.mean() + r.influence * b2.mean()
        return (
            Sampled(slope.item(), slope_influence),
            Sampled(second.item(), (rest - second * b - carried) / mean),
        )


def per_decision_taylor(
    scores: TokenScores,
    first: TokenScores,
    second: TokenScores,
    clusters: Clusters,
    batch: PositionSums,
    normalization: Normalization = "token",
) -> TaylorSums:
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
        scores: ``s``, ``h`` at 0, nats, of all or some sequences of a batch, whole clusters.
        first: their first derivatives in ``eta``, 0 off the response.
        second: their second derivatives.
        clusters: the cluster of each of these sequences.
        batch: sums over the whole batch of scores at 0.
        normalization: per token or per sequence.

    Returns:
        Sums in nats, per unit of ``eta`` and per squared unit.
    """
    mask, weights = scores.response_mask, scores.weights
    s1, s2 = first.logprobs.double(), second.logprobs.double()
    before1, before2 = s1.cumsum(1) - s1, s2.cumsum(1) - s2
    weight2 = before1.square() + before2
    innovation2 = s2 + s1.square() + 2 * before1 * s1

    def reweighted(h: Tensor, sums: Tensor, h1: Tensor, h2: Tensor) -> Tensor:
        baseline = position_baseline(strictly_after(h, mask), mask, clusters, batch.reaching, sums, weights)
        by_token = (h, h1 + before1 * h - baseline * s1, h2 + 2 * before1 * h1 + weight2 * h - baseline * innovation2)
        return torch.stack([clusters.total(weights * torch.where(mask, x, 0.0).sum(1)) for x in by_token])

    h = scores.entropies.double()
    numerator = reweighted(h, batch.of_kind("rao_blackwell"), first.entropies.double(), second.entropies.double())
    if normalization == "token":
        zeros = torch.zeros_like(s1)
        size = reweighted(mask.double(), batch.reaching, zeros, zeros)
    else:
        size = torch.zeros_like(numerator)
        size[0] = clusters.total(weights)
    return TaylorSums(torch.stack([numerator, size]))
