"""Baselines for score-function terms: means over the other clusters at the same response position.

A baseline that does not depend on the sequence's own response changes no expectation. See ``docs/theory.md``,
"Baselines". The other clusters enter through sums over the whole batch only (:class:`PositionSums`), so the functions
here can be given any part of a batch that cuts no cluster and no prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entropy_probe.estimators.uncertainty import in_chunks
from entropy_probe.types import Clusters, TokenScores

EntropyKind = Literal["rao_blackwell", "surprisal"]
MIN_SHARE = 1e-9
"""Others whose weight is below this share of all are none: their mean would be the rounding of a difference."""


@dataclass(frozen=True, eq=False)
class PositionSums:
    """Sums over all sequences of a batch at each response position; those of its parts add up to those of the whole.

    Positions count response tokens, so padding does not matter. Sequences count by their weights, 1 unless the batch
    is reweighted.

    Attributes:
        table: the number of sequences that reach the position, their entropies ``h`` there, and their surprisals
            ``-s``, in nats, ``[3, P]``, float64.
    """

    table: Float[Tensor, "3 P"]

    @classmethod
    def of(cls, scores: TokenScores) -> PositionSums:
        """The sums over some sequences; ``P`` is the padded length."""
        table = torch.zeros(3, scores.response_mask.shape[1], dtype=torch.float64)
        for rows in in_chunks(Clusters.sequences(len(scores.response_mask))):
            some = scores.select(rows)
            mask = some.response_mask
            flat = torch.stack([mask[mask], some.entropies[mask], -some.logprobs[mask]]).double()
            table.index_add_(1, _positions(mask), flat * some.weights[:, None].expand_as(mask)[mask])
        return cls(table)

    @property
    def reaching(self) -> Float[Tensor, " P"]:
        """Sequences that reach each position; all reach the first."""
        return self.table[0]

    def of_kind(self, kind: EntropyKind) -> Float[Tensor, " P"]:
        """Sums of entropies or of surprisals."""
        return self.table[1 if kind == "rao_blackwell" else 2]

    def per_token(self, kind: EntropyKind) -> float:
        """The batch's entropy per token, nats."""
        return (self.of_kind(kind).sum() / self.reaching.sum()).item()


def _positions(mask: Tensor) -> Tensor:
    """The position of every response token in its response, flat."""
    return (mask.long().cumsum(1) - 1)[mask]


def strictly_after(
    values: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"], horizon: int | None = None
) -> Float[Tensor, "N L"]:
    """At each response token the sum of ``values`` over the later response tokens of its sequence, in float64.

    Args:
        values: of each token.
        mask: response tokens.
        horizon: how many of the later tokens; all by default.
    """
    masked = torch.where(mask, values.double(), 0.0)
    if horizon is None:
        return torch.where(mask, masked.sum(1, keepdim=True) - masked.cumsum(1), 0.0)
    order = (~mask).int().argsort(dim=1, stable=True)  # response tokens first
    sums = masked.gather(1, order).cumsum(1)
    ahead = torch.arange(horizon, horizon + mask.shape[1]).clamp(max=mask.shape[1] - 1)
    return torch.where(mask, torch.zeros_like(masked).scatter(1, order, sums[:, ahead] - sums), 0.0)


def strictly_before(
    values: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"], horizon: int | None = None
) -> Float[Tensor, "N L"]:
    """The same over the earlier response tokens, the last ``horizon`` of them."""
    return strictly_after(values.flip(1), mask.flip(1), horizon).flip(1)


def position_baseline(
    to_go: Float[Tensor, "N L"],
    mask: Bool[Tensor, "N L"],
    clusters: Clusters,
    reaching: Float[Tensor, " P"],
    sums: Float[Tensor, " P"],
    weights: Float[Tensor, " N"],
    horizon: int | None = None,
) -> Float[Tensor, "N L"]:
    """At the t-th response token the mean of ``to_go`` there over the sequences of the other clusters that reach t.

    0 where no other cluster reaches t, or with next to no weight. Float64.

    Args:
        to_go: sums over later tokens, of :func:`strictly_after`.
        mask: response tokens.
        clusters: of these sequences, all sequences of a cluster among them.
        reaching: sequences of the whole batch that reach each position.
        sums: over the whole batch, at each position, what ``to_go`` adds up. Since a sequence that reaches a later
            position reaches t as well, the sum of ``to_go`` at t is that of ``sums`` after t.
        weights: what these sequences count in the sums and in the mean.
        horizon: that of ``to_go``.
    """
    position, length = _positions(mask), len(reaching)
    present, local = clusters.index.unique(return_inverse=True)
    cell = local[:, None].expand_as(mask)[mask] * length + position
    own = weights[:, None].expand_as(mask)[mask]
    own_sum = torch.zeros(len(present) * length, dtype=torch.float64).index_add_(0, cell, own * to_go.double()[mask])
    own_count = torch.zeros_like(own_sum).index_add_(0, cell, own)
    later = strictly_after(sums[None], torch.ones_like(sums[None], dtype=torch.bool), horizon)[0]
    other_sum = later[position] - own_sum[cell]
    other_count = reaching[position] - own_count[cell]
    out = torch.zeros(mask.shape, dtype=torch.float64)
    some = other_count > MIN_SHARE * reaching[position]
    out[mask] = torch.where(some, other_sum / torch.where(some, other_count, 1.0), 0.0)
    return out


def leave_one_out_mean(
    values: Float[Tensor, " N"],
    prompt_ids: Int[Tensor, " N"],
    batch_sum: float,
    batch_count: float,
    weights: Float[Tensor, " N"],
    draws: Clusters | None = None,
) -> Float[Tensor, " N"]:
    """For each sequence the mean of the others of its prompt, or of the whole batch if its prompt has no other.

    Others are those that were not sampled together with it.

    Args:
        values: of these sequences.
        prompt_ids: their prompts, all sequences of a prompt among them.
        batch_sum: of the values over the whole batch.
        batch_count: sequences of the whole batch.
        weights: what these sequences count in the sum, the number and the mean.
        draws: which of them were sampled together, all of a draw among them and under one prompt id; by default each by
            itself.

    Raises:
        ValueError: for a batch of one sequence.
    """
    if batch_count < 1.5:
        raise ValueError(f"leave-one-out baseline: expected at least 2 sequences, got {batch_count:.0f}")
    own_count, own_sum = weights, weights * values.double()
    group = Clusters.prompts(prompt_ids)
    count, total = group.total(own_count)[group.index], group.total(own_sum)[group.index]
    if draws is not None:
        own_count, own_sum = draws.total(own_count)[draws.index], draws.total(own_sum)[draws.index]
    some = count - own_count > MIN_SHARE * count
    within = (total - own_sum) / torch.where(some, count - own_count, 1.0)
    rest = batch_count - own_count
    outside = torch.where(rest > MIN_SHARE * batch_count, (batch_sum - own_sum) / rest, 0.0)
    return torch.where(some, within, outside)
