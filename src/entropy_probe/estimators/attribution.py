"""What single tokens, prompts and folds add to the first-order change, and what that is compared with.

Formulas: ``docs/theory.md``, "Attribution".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entropy_probe.estimators.first_order import first_order
from entropy_probe.estimators.uncertainty import ClusterSums


def covariance_terms(
    advantages: Float[Tensor, "N L"], logprobs: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"]
) -> Float[Tensor, "N L"]:
    """``(A - mean A) (log pi - mean log pi)`` of every response token, means over all response tokens of the batch.

    Their mean is the covariance of advantage and log-probability, in nats times the advantage's unit. Source: Cui et
    al. (2025), arXiv:2505.22617, by which tokens of high covariance make the entropy fall.

    Returns:
        Float64, 0 off the response.
    """
    a, s = advantages.double(), logprobs.double()
    terms = (a - a[mask].mean()) * (s - s[mask].mean())
    return torch.where(mask, terms, 0.0)


def rank_correlation(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float | None:
    """Spearman's rank correlation, tied values at their mean rank; ``None`` where one side has no two values."""
    from scipy.stats import rankdata

    if a.numel() < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    x, y = (torch.from_numpy(rankdata(values.double().numpy())) for values in (a, b))
    return correlation(x, y)


def correlation(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Pearson's correlation of two columns that each have two values."""
    x, y = (values.double() - values.double().mean() for values in (a, b))
    return (torch.dot(x, y) / (x.norm() * y.norm())).clamp(-1, 1).item()


def rank_correlation_interval(correlation: float, count: int, more: float = 0.0) -> tuple[float, float]:
    """A 95% interval for Spearman's rank correlation of ``count`` independent pairs.

    ``tanh(atanh r +- 1.96 sqrt((1 + r^2 / 2) / (n - 3) + more))``, with ``more`` the variance that ``atanh r`` has from
    anything else than the choice of the pairs. Source: Bonett and Wright (2000), Sample size requirements for
    estimating Pearson, Kendall and Spearman correlations, Psychometrika 65. At 1 that has no width: the end towards 0
    is then that of the largest correlation below 1 without ties, ``1 - 12 / (n^3 - n)``, where two neighbours have
    changed places; at -1 likewise.

    Raises:
        ValueError: with fewer than 4 pairs.
    """
    if count < 4:
        raise ValueError(f"rank correlation: expected at least 4 pairs for an interval, got {count}")
    size = abs(correlation)
    below = min(size, 1 - 12 / (count**3 - count))
    reach = 1.96 * math.sqrt((1 + below**2 / 2) / (count - 3) + more)
    low = math.tanh(math.atanh(below) - reach)
    high = math.tanh(math.atanh(size) + reach) if size < 1 else 1.0
    return (low, high) if correlation >= 0 else (-high, -low)


def fold_errors(
    numerators: Float[Tensor, "K B"], sums: Sequence[ClusterSums], length_changes: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Standard errors of prompts' contributions from the choice of evaluation rollouts.

    A contribution is a first-order change, so its error is that of
    :func:`~entropy_probe.estimators.first_order.first_order` with K independent folds as clusters. With few folds the
    error itself is uncertain, by about ``1 / sqrt(2 (K - 1))`` of it.

    Args:
        numerators: inner product of each prompt's part of the step with each fold's entropy gradient.
        sums: for each prompt, entropies and tokens or sequences of each fold.
        length_changes: the relative first-order change of the mean length by each prompt's part; 0 per sequence.
    """
    by_prompt = zip(numerators.T, sums, length_changes.tolist(), strict=True)
    errors = [first_order(x, folds.size, folds.ratio(), change).standard_error for x, folds, change in by_prompt]
    return torch.tensor(errors, dtype=torch.float64)


def others_only(
    numerators: Float[Tensor, "K B"],
    folds: ClusterSums,
    prompts: ClusterSums,
    contributions: Float[Tensor, " B"],
    fold_of: Int[Tensor, " B"],
) -> tuple[Float[Tensor, "K B"], list[ClusterSums]]:
    """What :func:`fold_errors` takes where the folds are of the step's own prompts: each without the prompt itself.

    Args:
        numerators: inner product of each prompt's part of the step with each fold's entropy gradient, its own included.
        folds: entropies and tokens or sequences of each fold.
        prompts: those of each prompt.
        contributions: of the prompts, over pairs of different ones
            (:func:`~entropy_probe.estimators.own_batch.pair_contributions` over ``sum b``).
        fold_of: each prompt's fold.
    """
    places, count = torch.arange(len(fold_of)), len(fold_of)
    own = numerators.sum(0) - contributions * prompts.size.sum() * (count - 1) / count
    others = numerators.clone()
    others[fold_of, places] -= own
    tables = [folds.table.clone() for _ in places]
    for place, table in enumerate(tables):
        table[:, fold_of[place]] -= prompts.table[:, place]
    return others, [ClusterSums(table) for table in tables]
