"""A part of an evaluation batch, as a batch of its own: what one half says shares no noise with what the other does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.analyses.policy import Policy
from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.estimators.first_order import sequence_weights
from entropy_probe.parallel.batch import LocalRows, add_up
from entropy_probe.parallel.ranks import Ranks
from entropy_probe.types import Clusters, TokenScores

MIN_CLUSTERS = 4
"""Two for each half: the least that a standard error takes."""


@dataclass(frozen=True, eq=False)
class EvaluationPart:
    """Some clusters of a batch.

    Attributes:
        rows: places of its sequences among this rank's rows of the batch.
        local: their places in the part, and their clusters in it.
        scores: their scores before the step.
        positions: sums over the whole part.
        clusters: which of the batch they are, increasing.
    """

    rows: Int[Tensor, " n"]
    local: LocalRows
    scores: TokenScores
    positions: PositionSums
    clusters: Int[Tensor, " u"]

    def sizes(self, policy: Policy) -> Float[Tensor, " u"]:
        """Tokens or sequences of each cluster, times its sequences' weights."""
        weights = sequence_weights(self.scores, policy.config.normalization).double()
        return policy.ranks.sum(self.local.clusters.total(weights))


def halved(clusters: Clusters, local: LocalRows, scores: TokenScores, ranks: Ranks, seed: int) -> list[EvaluationPart]:
    """Two random halves of a batch, of whose scores this rank has those of ``local``.

    Raises:
        ValueError: with fewer than four clusters.
    """
    if clusters.count < MIN_CLUSTERS:
        raise ValueError(
            f"validate: expected at least {MIN_CLUSTERS} independent clusters of evaluation rollouts to halve, got "
            f"{clusters.count}; give more rollouts"
        )
    half_of = torch.randperm(clusters.count, generator=torch.Generator().manual_seed(seed)) % 2
    halves = []
    for half in (0, 1):
        ids = (half_of == half).nonzero()[:, 0]
        members = (half_of[clusters.index] == half).nonzero()[:, 0]
        rows = (half_of[local.clusters.index] == half).nonzero()[:, 0]
        own = Clusters(torch.searchsorted(ids, local.clusters.index[rows]), len(ids))
        places = LocalRows(torch.searchsorted(members, local.rows[rows]), len(members), own)
        some = scores.select(rows)
        halves.append(EvaluationPart(rows, places, some, add_up(ranks, PositionSums.of(some)), ids))
    return halves
