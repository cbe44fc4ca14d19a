"""The evaluation batch at the checkpoint, and how a step changes its mean response length to first order.

The second multiplies what the sampling error of H adds to that of a change per token, so some of the sequences are
enough for it: ``docs/theory.md``, "Error from the evaluation batch".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators import first_order as fo
from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.estimators.realized import per_decision
from entropy_probe.estimators.uncertainty import ClusterSums, Sampled, in_chunks
from entropy_probe.gradients.per_sample import SampleGradients
from entropy_probe.named import NamedVector, dot
from entropy_probe.parallel.batch import LocalRows
from entropy_probe.parallel.ranks import Ranks
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.cache import digest, sequence_digests
from entropy_probe.types import Clusters, TokenCoefficients, TokenScores

SHARE, LEAST = 1 / 16, 8
"""A gradient over that share costs a sixteenth of the evaluation gradient at most; see the theory for its error."""


def chosen_sequences(rollouts: Rollouts, clusters: Clusters) -> Int[Tensor, " n"]:
    """The places of some sequences of a batch, at random, by what is in the batch and not by its order or padding."""
    contents = sequence_digests(rollouts)
    in_cluster = _cluster_digests(contents, clusters)
    seed, copies, keys = digest(b"".join(sorted(contents))), Counter[bytes](), []
    for unit, content in zip(clusters.index.tolist(), contents, strict=True):
        key = seed + content + in_cluster[unit]
        copies[key] += 1
        keys.append(digest(b"%b%d" % (key, copies[key])))
    count = min(len(keys), max(LEAST, round(SHARE * len(keys))))
    return torch.tensor(sorted(sorted(range(len(keys)), key=keys.__getitem__)[:count]))


def chosen_clusters(rollouts: Rollouts, clusters: Clusters, number: int) -> Int[Tensor, " n"]:
    """Some clusters of a batch, at random, by what is in the batch and not by its order, its padding or its ids."""
    contents = sequence_digests(rollouts)
    seed, copies, keys = digest(b"".join(sorted(contents))), Counter[bytes](), {}
    for unit, content in _cluster_digests(contents, clusters).items():
        copies[content] += 1  # else all copies would be chosen, or none
        keys[unit] = digest(b"%b%b%d" % (seed, content, copies[content]))
    return torch.tensor(sorted(sorted(keys, key=keys.__getitem__)[:number]))


def _cluster_digests(contents: Sequence[bytes], clusters: Clusters) -> dict[int, bytes]:
    """What the sequences of each cluster are recognised by together."""
    members: dict[int, list[bytes]] = {}
    for unit, content in zip(clusters.index.tolist(), contents, strict=True):
        members.setdefault(unit, []).append(content)
    return {unit: digest(b"".join(sorted(of_cluster))) for unit, of_cluster in members.items()}


@dataclass(frozen=True, eq=False)
class LengthSample:
    """This rank's share of the sequences that the change of the mean length is taken from.

    Attributes:
        rows: their places among the rank's rows.
        local: their places in the batch, and their clusters.
        before: their scores before the step.
        positions: sums over the whole batch.
    """

    rows: Int[Tensor, " n"]
    local: LocalRows
    before: TokenScores
    positions: PositionSums

    @classmethod
    def of(
        cls, whole: Rollouts, clusters: Clusters, local: LocalRows, before: TokenScores, positions: PositionSums
    ) -> LengthSample:
        """Out of a rank's rows of the whole batch, with its scores; ``clusters`` are those of the whole batch."""
        rows = torch.isin(local.rows, chosen_sequences(whole, clusters)).nonzero()[:, 0]
        own = LocalRows(local.rows[rows], local.size, local.clusters.select(rows))
        return cls(rows, own, before.select(rows), positions)

    @property
    def tokens(self) -> float:
        """Their response tokens, each times its sequence's weight."""
        return fo.sequence_weights(self.before, "token").sum().item()

    def coefficients(self, horizon: int | None = None) -> TokenCoefficients:
        """Of the surrogate whose gradient is that of their number of tokens, later ones up to a horizon."""
        return fo.length_coefficients(self.before, self.local.clusters, self.positions, horizon)

    def along(self, steps: Sequence[NamedVector], gradients: SampleGradients, ranks: Ranks) -> Float[Tensor, " K"]:
        """The relative first-order change of the mean length by each of some steps."""
        reached = {name: x for name, x in gradients.total.items() if x is not None}
        dots = [dot(reached, {name: step[name] for name in reached}) for step in steps]
        *sums, tokens = ranks.sum(torch.tensor([*dots, self.tokens], dtype=torch.float64))
        return torch.stack(sums) / tokens

    def beyond(self, after: TokenScores, first_order: float, ranks: Ranks, horizon: int | None = None) -> float:
        """By how much more than to first order their mean length changes, relative, by per-decision weights."""
        given = (self.before, after.select(self.rows), self.local.clusters, self.positions)
        new = per_decision(*given, horizon=horizon)
        size, tokens = ranks.sum(torch.tensor([new.size.sum().item(), self.tokens], dtype=torch.float64)).tolist()
        return size / tokens - 1 - first_order


@dataclass(frozen=True, eq=False)
class Before:
    """The evaluation batch at the checkpoint.

    Attributes:
        scores: of this rank's rows of it.
        positions: sums by response position over the whole batch.
        sums: entropies and tokens or sequences of every cluster.
        entropy: H.
        lengths: what the change of the mean length is taken from; ``None`` per sequence, where it adds no error.
    """

    scores: TokenScores
    positions: PositionSums
    sums: ClusterSums
    entropy: Sampled
    lengths: LengthSample | None


def entropy_coefficients(
    scores: TokenScores,
    prompt_ids: Int[Tensor, " n"],
    clusters: Clusters,
    draws: Clusters,
    positions: PositionSums,
    config: ProbeConfig,
    horizon: int | None = None,
) -> TokenCoefficients:
    """The entropy-gradient surrogate of sequences that are whole clusters and prompts, a chunk of them at a time.

    ``positions`` are sums over the whole batch; ``horizon`` is how many later tokens count, all by default.
    """
    of_logprobs, of_entropies = torch.zeros(2, *scores.response_mask.shape, dtype=torch.float64)
    for rows in in_chunks(Clusters.prompts(prompt_ids)):
        some, ids, own = scores.select(rows), prompt_ids[rows], clusters.select(rows)
        how = (config.normalization, config.entropy, draws.select(rows))
        coefficients = fo.entropy_coefficients(some, ids, own, positions, *how, horizon)
        of_logprobs[rows] = coefficients.logprobs
        if coefficients.entropies is not None:
            of_entropies[rows] = coefficients.entropies
    return TokenCoefficients(of_logprobs, of_entropies if config.entropy == "rao_blackwell" else None)
