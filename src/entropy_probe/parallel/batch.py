"""The rows of a batch that one rank works on, and how what it finds joins that of the others."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.parallel.ranks import Ranks
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import Clusters

S = TypeVar("S")


@dataclass(frozen=True, eq=False)
class LocalRows:
    """The sequences of a batch that this rank has.

    Attributes:
        rows: their places in the batch, increasing, ``[n]``; possibly none.
        size: sequences of the whole batch, ``N``.
        clusters: the cluster of each of these sequences, numbered over the whole batch.
    """

    rows: Int[Tensor, " n"]
    size: int
    clusters: Clusters

    @classmethod
    def whole(cls, clusters: Clusters) -> LocalRows:
        """All of a batch."""
        return cls(torch.arange(len(clusters.index)), len(clusters.index), clusters)

    @classmethod
    def of(cls, rollouts: Rollouts, uncut: Clusters, clusters: Clusters, ranks: Ranks) -> LocalRows:
        """This rank's rows, such that all ranks have about as many tokens.

        What is ``uncut`` is never spread over several ranks; no prompt may have sequences in two of these.
        """
        tokens = uncut.total(rollouts.attention_mask.sum(1).double())
        rank_of = torch.tensor(balanced(tokens.tolist(), ranks.size))
        rows = (rank_of[uncut.index] == ranks.rank).nonzero()[:, 0]
        return cls(rows, len(rollouts), clusters.select(rows))

    def select(self, rollouts: Rollouts) -> Rollouts:
        """These sequences of the batch; the batch itself, and no copy, where they are all of it."""
        return rollouts if len(self.rows) == self.size else rollouts.select(self.rows)

    @cached_property
    def _present(self) -> tuple[Tensor, Tensor]:
        present, local = self.clusters.index.unique(return_inverse=True)
        return present, local

    @property
    def local_clusters(self) -> Int[Tensor, " n"]:
        """The cluster of each of these sequences, numbered from 0 without gaps."""
        return self._present[1]

    @property
    def present_clusters(self) -> Int[Tensor, " u"]:
        """What the local number of a cluster stands for."""
        return self._present[0]

    def by_sequence(self, values: Float[Tensor, "*k n"]) -> Float[Tensor, "*k N"]:
        """Values of these sequences at their places in the batch, 0 elsewhere."""
        return values.new_zeros(*values.shape[:-1], self.size).index_copy_(-1, self.rows, values)

    def by_cluster(self, values: Float[Tensor, "*k u"]) -> Float[Tensor, "*k U"]:
        """Values by local clusters at the clusters' places in the batch, 0 elsewhere."""
        return values.new_zeros(*values.shape[:-1], self.clusters.count).index_copy_(-1, self.present_clusters, values)


def balanced(sizes: Sequence[float], num_bins: int) -> list[int]:
    """The bin of each item, so that the bins are of about one size: the largest first, each to the smallest bin.

    No bin exceeds the best possible by more than a third (Graham, 1969). Some may be empty.
    """
    filled = [(0.0, k) for k in range(num_bins)]
    bin_of = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        total, smallest = filled[0]
        bin_of[item] = smallest
        heapq.heapreplace(filled, (total + sizes[item], smallest))
    return bin_of


def add_up(ranks: Ranks, sums: S) -> S:
    """Sums over the whole batch (of positions or clusters) from those over the rows that each rank has."""
    holder: Any = sums
    return replace(holder, table=ranks.sum(holder.table))
