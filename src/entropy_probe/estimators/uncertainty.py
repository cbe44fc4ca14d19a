"""Ratios over independent clusters, and their standard errors by the delta method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.types import Clusters

CHUNK_SEQUENCES = 2048
"""Estimators are given about so many sequences at a time: what they compute per token takes several times the memory of
the scores."""
MIN_PROMPTS = 8
"""Draws with replacement give this many prompts equally often once in thousands of batches."""


def is_grouped(prompt_ids: Int[Tensor, " N"]) -> bool:
    """Whether every prompt has the same number of responses, at least 2.

    With few prompts that can happen by chance under sampling with replacement; then only consecutive rows count.
    """
    prompts, counts = prompt_ids.unique(return_counts=True)
    size = int(counts[0])
    if size < 2 or not bool((counts == size).all()):
        return False
    blocks = prompt_ids.view(-1, size)
    return len(prompts) >= MIN_PROMPTS or bool((blocks == blocks[:, :1]).all())


def in_chunks(uncut: Clusters) -> Iterator[Int[Tensor, " n"]]:
    """The places of sequences, a chunk at a time; once, with none, if there are none.

    Args:
        uncut: of the sequences; what is never spread over two chunks.
    """
    order = uncut.index.argsort(stable=True)
    _, counts = uncut.index.unique(return_counts=True)
    ends = counts.cumsum(0)
    start = 0
    while True:
        fitting = ends[ends <= start + CHUNK_SEQUENCES]
        end = int(fitting[-1]) if len(fitting) and int(fitting[-1]) > start else int(ends[ends > start][:1].sum())
        yield order[start:end].sort().values
        start = end
        if start >= len(order):
            return


@dataclass(frozen=True, eq=False)
class Sampled:
    """An estimate and the influence of each cluster on it.

    To first order the estimate is ``value = truth + mean(influence)``, so two estimates from the same clusters can be
    subtracted influence by influence: that is the paired comparison.

    Attributes:
        value: the estimate.
        influence: centred influence of each cluster, ``[U]``, float64.
    """

    value: float
    influence: Float[Tensor, " U"]

    @property
    def standard_error(self) -> float:
        """``sd(influence) / sqrt(U)`` with the unbiased standard deviation."""
        return (self.influence.std() / self.influence.numel() ** 0.5).item()

    @property
    def skewness(self) -> float:
        """``mean(influence^3) / mean(influence^2)^(3/2)``; 0 where all are equal."""
        variance = self.influence.square().mean().item()
        return 0.0 if variance == 0 else (self.influence.pow(3).mean() / variance**1.5).item()

    def __sub__(self, other: Sampled) -> Sampled:
        return Sampled(self.value - other.value, self.influence - other.influence)


def check_prompts(prompts: int) -> None:
    """Make sure that the update batch has prompts enough for an error.

    Raises:
        ValueError: with fewer than two.
    """
    if prompts < 2:
        raise ValueError(
            f"update batch: expected at least 2 independent prompts for a standard error, got {prompts}; "
            "give responses to more prompts"
        )


def ratio(numerator: Float[Tensor, " U"], denominator: Float[Tensor, " U"]) -> Sampled:
    """``sum(a) / sum(b)`` over clusters, with influence ``(a_u - r b_u) / mean(b)``.

    With ``b = 1`` this is the mean and its ordinary standard error. Bias of order ``1 / U`` otherwise. Source:
    Cochran, Sampling Techniques, 1977, chapter 6.

    Raises:
        ValueError: with fewer than two clusters, or if a sum is not finite.
    """
    clusters = numerator.numel()
    if clusters < 2:
        raise ValueError(
            f"standard error: expected at least 2 independent clusters, got {clusters}; give more rollouts"
        )
    a, b = numerator.double(), denominator.double()
    value = a.sum() / b.sum()
    if not bool(torch.isfinite(value)):
        raise ValueError(f"estimate: expected finite sums, got {a.sum().item()} / {b.sum().item()}")
    return Sampled(value.item(), (a - value * b) / b.mean())


@dataclass(frozen=True, eq=False)
class ClusterSums:
    """Numerator and denominator of a ratio, summed over each cluster; those of parts of a batch add up.

    Attributes:
        table: numerators and denominators, ``[2, U]``, float64.
    """

    table: Float[Tensor, "2 U"]

    @classmethod
    def of(cls, clusters: Clusters, numerator: Float[Tensor, " N"], size: Float[Tensor, " N"]) -> ClusterSums:
        """From what each sequence adds to the two."""
        return cls(torch.stack([clusters.total(numerator), clusters.total(size)]))

    @property
    def size(self) -> Float[Tensor, " U"]:
        """The denominators."""
        return self.table[1]

    def ratio(self) -> Sampled:
        """The estimate; see :func:`ratio`."""
        return ratio(self.table[0], self.table[1])
