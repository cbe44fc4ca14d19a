"""The error of any smooth function of independent clusters, from its values with some of them left out."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.estimators.uncertainty import check_prompts
from entropy_probe.types import Clusters

MAX_BLOCKS = 16
"""A block costs one optimizer step; the error itself is then known to about 18%, one part in the root of 2 (M - 1)."""


def blocks_of(clusters: Clusters, most: int = MAX_BLOCKS) -> Clusters:
    """Consecutive clusters joined into at most ``most`` blocks whose numbers of clusters differ by at most one."""
    count = min(clusters.count, most)
    return Clusters(clusters.index * count // clusters.count, count)


def jackknife_standard_error(
    value: float, left_out: Float[Tensor, " M"], sizes: Int[Tensor, " M"] | Float[Tensor, " M"]
) -> float:
    """The delete-a-block jackknife with blocks of unequal size.

    With ``n`` clusters in blocks of ``m_j``, ``h_j = n / m_j``, pseudo-values ``h_j value - (h_j - 1) left_out_j`` and
    the jackknife estimate ``M value - sum_j (1 - m_j / n) left_out_j``::

        variance = 1/M sum_j (pseudo-value_j - jackknife estimate)^2 / (h_j - 1)

    For blocks of one size this is ``(M - 1) / M sum_j (left_out_j - mean)^2``. Consistent for functions that are
    smooth in the clusters' mean, and exact in expectation for linear ones; too large for others. Source: Busing, Meijer
    and van der Leeden (1999), Delete-m jackknife for unequal m, Statistics and Computing 9.

    Args:
        value: the function of all clusters.
        left_out: the function without block j.
        sizes: clusters in block j.

    Raises:
        ValueError: with fewer than two blocks.
    """
    blocks = left_out.numel()
    check_prompts(blocks)
    share = sizes.double() / sizes.sum()
    h = 1 / share
    pseudo = h * value - (h - 1) * left_out.double()
    estimate = blocks * value - ((1 - share) * left_out.double()).sum()
    return ((pseudo - estimate).square() / (h - 1)).mean().sqrt().item()
