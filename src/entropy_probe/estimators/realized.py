"""The realized entropy change after a step, from scores of the same responses before and after it.

Formulas: ``docs/theory.md``, "The realized change". Sources: Precup, Sutton and Singh, 2000 (per-decision importance
sampling); Owen, 2013, chapter 9 (self-normalised importance sampling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.estimators.baselines import (
    EntropyKind,
    PositionSums,
    position_baseline,
    strictly_after,
    strictly_before,
)
from entropy_probe.estimators.first_order import FirstOrder, Normalization, sequence_entropies, sequence_weights
from entropy_probe.estimators.uncertainty import ClusterSums, Sampled
from entropy_probe.types import Clusters, TokenScores


@dataclass(frozen=True, eq=False)
class Change(Sampled):
    """A realized change, ``new - old``.

    Attributes:
        size_change: relative change of the mean denominator (the mean response length under per-token
            normalisation), by the same estimator.
    """

    size_change: float

    def minus(self, predicted: FirstOrder, entropy: Sampled, beyond: float = 0.0) -> Sampled:
        """Realized minus predicted, with the influence of the paired difference.

        Both influences contain that of H, times minus the change of the mean length: of the realized change by this
        estimator and this batch, of the prediction to first order and from some of the batch. What is left of it in
        their difference is ``beyond`` times the influence of H, of second order like all else of ``per_decision`` minus
        a Rao-Blackwell prediction, sequence by sequence.

        Args:
            predicted: the first-order change on the same clusters.
            entropy: H on the same clusters, before the step.
            beyond: by how much more than to first order the mean length changes, relative, both on the same sequences;
                0 where that is not known.
        """
        back = self.size_change - beyond - predicted.length_change
        return Sampled(self.value - predicted.value, self.influence - predicted.influence + back * entropy.influence)


def change(new: ClusterSums, old: ClusterSums) -> Change:
    """The entropy after the step minus the one before it, both over the same clusters, whose influences are paired.

    ``new`` may come from :func:`per_decision` or :func:`snis`, or be the entropy of fresh responses, sampled to the
    same prompts at the new parameters. Those need no weights, so the step may be of any size, but share no responses
    either: the noise of both batches stays, and only what their clusters have in common, the prompts, cancels.

    Args:
        new: entropies after the step, of every cluster.
        old: entropies before it, from :func:`~entropy_probe.estimators.first_order.entropy`.
    """
    paired = new.ratio() - old.ratio()
    return Change(paired.value, paired.influence, (new.size.sum() / old.size.sum() - 1).item())


def snis(
    after: TokenScores,
    weights: Float[Tensor, " N"],
    clusters: Clusters,
    normalization: Normalization = "token",
    kind: EntropyKind = "rao_blackwell",
) -> ClusterSums:
    """Self-normalised importance sampling: ``sum w (sum_t h+) / sum w b`` with ``b`` the tokens or 1.

    Consistent, with a bias of order ``1 / N``; capped or smoothed weights add the bias of what they cut off.

    Args:
        after: scores of the old responses at the new parameters.
        weights: of each of these sequences, normalised over the batch.
        clusters: the cluster of each of these sequences.
        normalization: per token or per sequence.
        kind: ``sum_t h+`` or ``-S+`` as the entropy of a sequence.
    """
    w = weights.double()
    return ClusterSums.of(clusters, w * sequence_entropies(after, kind), w * sequence_weights(after, normalization))


def rounding_of(there: Sampled, opposite: Sampled) -> Sampled:
    """What rounding does to a change, from those after a small move of the parameters and after the opposite one.

    To first order the two are equal and opposite. Their sum is the rounding of three scorings, one of them twice, whose
    variance is three times that of a difference of two.
    """
    return Sampled((there.value + opposite.value) / 3**0.5, (there.influence + opposite.influence) / 3**0.5)


def noise_floor(spurious: Sequence[Sampled], num_sequences: int | float) -> float:
    """What rounding alone can do to a realized change: two standard deviations of it, in the unit of the change.

    Its mean over sequences is systematic; its spread averages out over the sequences of the whole batch.

    Args:
        spurious: what rounding did to a change, several times, with single sequences as clusters.
        num_sequences: sequences in the batch that the floor is for; of a reweighted batch the effective number.
    """
    variance = fmean(s.influence.var().item() for s in spurious)
    systematic = fmean(s.value**2 - s.influence.var().item() / s.influence.numel() for s in spurious)
    return 2 * (max(0.0, systematic) + variance / num_sequences) ** 0.5


def per_decision(
    before: TokenScores,
    after: TokenScores,
    clusters: Clusters,
    batch: PositionSums,
    normalization: Normalization = "token",
    horizon: int | None = None,
    into: Clusters | None = None,
) -> ClusterSums:
    """Per-decision importance sampling with position baselines; as the step shrinks it becomes the first order.

    Each entropy ``h+_it`` is weighted by the ratios of the tokens before it only. Per sequence::

        sum_t [ w_<t h+_t - w_<t (rho_t - 1) b_t ]

    times the sequence's weight in a reweighted batch, with ``rho_t = exp(s+_t - s_t)``, ``w_<t`` the product of earlier
    ratios and ``b_t`` the baseline of the entropy gradient at the old parameters. Per token, numerator and denominator
    (``h+ = 1``) are both estimated this way. Unbiased per sequence; a ratio, with a bias of order ``1 / N``, per token.

    Args:
        before: scores at the old parameters of all or some sequences of a batch, whole clusters.
        after: of the same responses at the new parameters.
        clusters: the cluster of each of these sequences.
        batch: sums over the whole batch of scores at the old parameters.
        normalization: per token or per sequence.
        horizon: how many of the last earlier ratios count in ``w_<t``, and later tokens in ``b_t``; all by default. See
            :mod:`~entropy_probe.estimators.horizon`.
        into: what to sum over in place of clusters, within them; baselines leave out the clusters all the same.

    Raises:
        ValueError: if a product of ratios overflows.
    """
    mask = before.response_mask
    earlier, log_ratio = windowed_weights(before, after, horizon)
    innovation = earlier * torch.expm1(log_ratio)
    if not bool(torch.isfinite(innovation).all() & torch.isfinite(earlier).all()):
        raise ValueError(
            "importance ratios: expected finite products over each response, got an overflow; the step is far beyond "
            "the reach of importance sampling, use a smaller learning rate"
        )

    def reweighted(old: Tensor, sums: Tensor, new: Tensor) -> Float[Tensor, " N"]:
        to_go = strictly_after(old, mask, horizon)
        baseline = position_baseline(to_go, mask, clusters, batch.reaching, sums, before.weights, horizon)
        return before.weights * (earlier * new - innovation * baseline).sum(1)

    numerator = reweighted(before.entropies, batch.of_kind("rao_blackwell"), after.entropies.double())
    into = clusters if into is None else into
    if normalization == "sequence":
        return ClusterSums.of(into, numerator, before.weights)
    ones = mask.double()
    return ClusterSums.of(into, numerator, reweighted(ones, batch.reaching, ones))


def windowed_weights(
    before: TokenScores, after: TokenScores, horizon: int | None = None
) -> tuple[Float[Tensor, "N L"], Float[Tensor, "N L"]]:
    """The product of the last ``horizon`` ratios before each response token, 0 elsewhere, and the token's log-ratio."""
    mask = before.response_mask
    log_ratio = torch.where(mask, after.logprobs.double() - before.logprobs.double(), 0.0)
    earlier = log_ratio.cumsum(1) - log_ratio if horizon is None else strictly_before(log_ratio, mask, horizon)
    return torch.where(mask, earlier.exp(), 0.0), log_ratio
