"""Gradients of token surrogates: their sum over a batch, and their share per cluster, in one streaming pass.

Two paths give the same numbers. With ``hooks`` one backward pass over a microbatch of many sequences is enough, since
what each sequence adds is read off the layers. ``per cluster``: for any module, one backward pass per cluster. Only one
microbatch's graph is alive at a time, and ``.grad`` is left as it was.

Of sharded parameters every rank keeps its shard of each gradient; inner products are summed over the shards at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.gradients.hooks import Hooks, hooked_backward
from entropy_probe.gradients.layers import Sink
from entropy_probe.gradients.rows import dot_rows, sum_over_columns
from entropy_probe.named import NamedVector, add_to, gradient_of
from entropy_probe.parallel.shards import from_shard, local, reshard, sum_of_shards
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.forward import Progress, Scorer
from entropy_probe.scoring.isolation import as_a_function, differs_in_training
from entropy_probe.scoring.packing import Microbatch
from entropy_probe.scoring.sheet import ScoreSheet
from entropy_probe.types import TokenCoefficients

_CACHED_ELEMENTS = 2**26
"""Directions up to this size are kept in float64 for the whole pass; larger ones are converted piece by piece."""


@dataclass(frozen=True, eq=False)
class Side:
    """One surrogate to differentiate, and what is wanted of its gradient besides the total.

    Attributes:
        coefficients: of the surrogate ``sum_it a_it s_it + c_it h_it``.
        directions: vectors to take each cluster's inner product with.
        store: keep each cluster's gradient.
        pair_with: vectors for each cluster to take its own inner products with, ``[M, U, P]``, laid out as in
            :attr:`SampleGradients.stored`.
        is_loss: differentiate as training does, which leaves the row ``padding_idx`` of an embedding out and calls the
            parameters' gradient hooks. The slope of anything else has that row, since weight decay and old moments move
            it, and no hooks.
    """

    coefficients: TokenCoefficients
    directions: Sequence[NamedVector] = ()
    store: bool = False
    pair_with: Float[Tensor, "M U P"] | None = None
    is_loss: bool = False


@dataclass(frozen=True, eq=False)
class SampleGradients:
    """The outcome of one pass over a batch.

    Attributes:
        total: the gradient of the whole surrogate by parameter name; ``None`` where it does not reach.
        dots: inner products of each cluster's gradient with the given directions, ``[K, U]``, float64.
        stored: each cluster's gradient, parameters laid out in order, ``[U, P]`` on the CPU; ``None`` unless asked for.
        paired: inner products of each cluster's gradient with its own rows of :attr:`Side.pair_with`, ``[M, U]``,
            float64; none unless given.
    """

    total: dict[str, Tensor | None]
    dots: Float[Tensor, "K U"]
    stored: Float[Tensor, "U P"] | None
    paired: Float[Tensor, "M U"]

    def total_of_stored(self, parameters: Mapping[str, Parameter]) -> dict[str, Tensor | None]:
        """The total from the stored gradients in float64, which does not depend on the order of the clusters."""
        assert self.stored is not None
        sizes = [local(p).numel() for p in parameters.values()]
        pieces = zip(parameters.items(), self.stored.split(sizes, 1), strict=True)
        return {
            name: None
            if self.total[name] is None
            else from_shard(piece.sum(0, dtype=torch.float64).view(local(p).shape).to(p.device), p)
            for (name, p), piece in pieces
        }

    def dot_stored(self, direction: NamedVector) -> Float[Tensor, " U"]:
        """Inner products of the stored gradients with one more direction, in float64."""
        assert self.stored is not None
        return dot_rows(self.stored, direction, self.total)


class _Sums(Sink):
    """Where a pass accumulates, one contribution at a time."""

    def __init__(self, parameters: Mapping[str, Parameter], side: Side, num_clusters: int) -> None:
        self.total: dict[str, Tensor | None] = dict.fromkeys(parameters)
        self.dots = torch.zeros(len(side.directions), num_clusters, dtype=torch.float64)
        self._pair_with = side.pair_with
        self.paired = torch.zeros(self._pairs, num_clusters, dtype=torch.float64)
        sizes = [local(p).numel() for p in parameters.values()]
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self._slices = {name: slice(a, b) for name, a, b in zip(parameters, starts[:-1], starts[1:], strict=True)}
        self._shapes = {name: local(p).shape for name, p in parameters.items()}
        self._parameters = parameters
        self.stored = torch.zeros(num_clusters, starts[-1], dtype=_stored_dtype(parameters)) if side.store else None
        self._directions, self._clusters = side.directions, list(range(num_clusters))
        small = len(side.directions) * starts[-1] <= _CACHED_ELEMENTS
        self._cache = {name: self._stack(name) for name in parameters} if side.directions and small else {}

    def outcome(self) -> SampleGradients:
        total = {name: None if x is None else from_shard(x, self._parameters[name]) for name, x in self.total.items()}
        dots, paired = (sum_of_shards(x, self._parameters.values()) for x in (self.dots, self.paired))
        return SampleGradients(total, dots, self.stored, paired)

    def empty(self, clusters: Tensor) -> _Sums:
        """Empty sums for one microbatch with these clusters, for :meth:`merge` once it is known to be complete."""
        sums = copy.copy(self)
        sums.total = dict.fromkeys(self.total)
        sums.dots = torch.zeros(len(self._directions), len(clusters), dtype=torch.float64)
        sums.paired = torch.zeros(self._pairs, len(clusters), dtype=torch.float64)
        sums.stored = None if self.stored is None else self.stored.new_zeros(len(clusters), self.stored.shape[1])
        sums._clusters = clusters.tolist()
        return sums

    def merge(self, added: _Sums, clusters: Tensor) -> None:
        """Add the sums of a microbatch whose clusters are ``clusters``, distinct."""
        for name, gradient in added.total.items():
            if gradient is not None:
                self.add_total(name, gradient)
        self.dots[:, clusters] += added.dots
        self.paired[:, clusters] += added.paired
        if self.stored is not None and added.stored is not None:
            self.stored.index_add_(0, clusters, added.stored)

    def _stack(self, name: str) -> Tensor:
        """The directions of one parameter in float64, ``[K, p]``."""
        return torch.stack([local(d[name]).reshape(-1).double() for d in self._directions])

    def add_total(self, name: str, gradient: Tensor) -> None:
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        seen = self.total[name]
        self.total[name] = gradient.clone() if seen is None else seen.add_(gradient)

    def add_clusters(self, name: str, clusters: Tensor, gradients: Tensor) -> None:
        """Gradients of one parameter, ``[n, ...]``, each belonging to ``clusters[n]``; their sum joins the total."""
        self.add_total(name, gradients[0] if len(gradients) == 1 else gradients.sum(0))
        flat = gradients.reshape(len(clusters), -1)
        if self._directions:
            along = self._cache[name] if self._cache else self._stack(name)
            self.dots.index_add_(1, clusters, sum_over_columns(lambda g, d: d @ g.T, flat, along).cpu())
        if self.stored is not None:
            block = flat.to("cpu", self.stored.dtype)
            for unit, row in zip(clusters.tolist(), block, strict=True):
                self.stored[unit, self._slices[name]] += row
        if self._pair_with is not None:
            for unit, row in zip(clusters.tolist(), flat.cpu(), strict=True):
                others = self._pair_with[:, self._clusters[unit], self._slices[name]]
                self.paired[:, unit] += sum_over_columns(lambda g, o: o @ g[0], row[None], others)

    def add_lookups(self, name: str, clusters: Tensor, ids: Tensor, gradients: Tensor) -> None:
        """Gradients of rows ``ids[n, t]`` of an embedding, ``[n, t, D]``, each belonging to ``clusters[n]``.

        Only these rows are touched: nothing of the size of the embedding is formed per cluster.
        """
        wide = gradients.to(torch.promote_types(gradients.dtype, torch.float32))
        total = self.total[name]
        if total is None:
            total = self.total[name] = torch.zeros(self._shapes[name], dtype=wide.dtype, device=wide.device)
        total.index_add_(0, ids.flatten(), wide.flatten(0, 1))
        for dots, direction in zip(self.dots, self._directions, strict=True):
            products = torch.linalg.vecdot(direction[name][ids].double(), wide.double())
            dots.index_add_(0, clusters, products.sum(1).cpu())
        if self.stored is None and self._pair_with is None:
            return
        for unit, row_ids, row in zip(clusters.tolist(), ids.cpu(), wide.cpu(), strict=True):
            if self.stored is not None:
                own = self.stored[unit, self._slices[name]].view(self._shapes[name])
                own.index_add_(0, row_ids, row.to(own.dtype))
            if self._pair_with is not None:
                for k, others in enumerate(self._pair_with[:, self._clusters[unit], self._slices[name]]):
                    other = others.view(self._shapes[name])[row_ids]
                    self.paired[k, unit] += torch.linalg.vecdot(row.double(), other.double()).sum()

    @property
    def _pairs(self) -> int:
        return 0 if self._pair_with is None else len(self._pair_with)


def _stored_dtype(parameters: Mapping[str, Parameter]) -> torch.dtype:
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters.values()) else torch.float32


def stored_bytes(parameters: Mapping[str, Parameter], num_clusters: int) -> int:
    """What the stored gradients of one side take in host memory, on this rank where parameters are sharded."""
    return num_clusters * sum(local(p).numel() for p in parameters.values()) * _stored_dtype(parameters).itemsize


def sample_gradients(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    clusters: Tensor,
    sides: Sequence[Side],
    *,
    hooks: Hooks | None = None,
    progress: Progress | None = None,
    sheet: ScoreSheet | None = None,
) -> list[SampleGradients]:
    """Differentiate one or more surrogates over a batch, with one forward pass for all of them.

    Where an embedding with ``padding_idx`` is trained, or a parameter has gradient hooks, the losses and the other
    surrogates take one each.

    Args:
        scorer: the policy.
        parameters: what to differentiate with respect to, by name.
        rollouts: the batch.
        clusters: the cluster of each sequence, ``[N]``, numbered from 0.
        sides: the surrogates.
        hooks: how to read per-sequence gradients off layers, from :func:`~entropy_probe.gradients.hooks.hookable`;
            without, what is wanted of single clusters takes a backward pass per cluster.
        progress: called with sequences done and in all.
        sheet: gets the scores of the batch, which the forward pass computes on its way.

    Returns:
        One outcome per side.
    """
    given = (scorer, parameters, rollouts, clusters)
    if differs_in_training(scorer.model, parameters) and len({side.is_loss for side in sides}) > 1:
        return [
            gradients
            for side in sides
            for gradients in sample_gradients(*given, [side], hooks=hooks, progress=progress, sheet=sheet)
        ]
    sums = [_Sums(parameters, side, len(clusters.bincount())) for side in sides]
    with nullcontext() if sides[0].is_loss else as_a_function(scorer.model):
        _add_up(*given, sides, hooks, sheet, sums, progress)
    return [side.outcome() for side in sums]


def _add_up(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    clusters: Tensor,
    sides: Sequence[Side],
    hooks: Hooks | None,
    sheet: ScoreSheet | None,
    sums: Sequence[_Sums],
    progress: Progress | None,
) -> None:
    """Add what each sequence adds to the sums, a microbatch or a cluster at a time."""
    coefficients = [side.coefficients for side in sides]
    if hooks:

        def hooked(batch: Microbatch) -> tuple[Tensor, list[_Sums]]:
            """What the microbatch adds, by cluster; kept apart until it is complete."""
            present, of_rows = clusters[batch.leaders].unique(return_inverse=True)
            added = [side.empty(present) for side in sums]
            hooked_backward(scorer, hooks, batch, coefficients, of_rows, added, sheet)
            return present, added

        share = _prompts_are_whole(rollouts.prompt_ids, clusters)
        for _, (present, added) in scorer.each(rollouts, hooked, share=share, progress=progress):
            for side, more in zip(sums, added, strict=True):
                side.merge(more, present)
    elif any(side.directions or side.store or side.pair_with is not None for side in sides):
        done = 0
        for cluster, rows in enumerate(torch.split(clusters.argsort(stable=True), clusters.bincount().tolist())):
            given = (scorer, parameters, rollouts, rows, coefficients, sheet)
            for side, gradients in zip(sums, cluster_backward(*given), strict=True):
                for name, gradient in gradients.items():
                    side.add_clusters(name, torch.tensor([cluster]), local(gradient)[None])
            done += len(rows)
            if progress:
                progress(done, len(rollouts))
    else:
        work = partial(_backward, scorer, parameters, coefficients, sheet)
        for _, of_sides in scorer.each(rollouts, work, progress=progress):
            for side, gradients in zip(sums, of_sides, strict=True):
                for name, gradient in gradients.items():
                    side.add_total(name, local(gradient))


def _prompts_are_whole(prompt_ids: Tensor, clusters: Tensor) -> bool:
    """Whether no prompt's sequences are spread over several clusters, so that they may share a row."""
    pairs = torch.stack([prompt_ids, clusters], 1).unique(dim=0)
    return len(pairs) == prompt_ids.unique().numel()


def cluster_backward(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    rows: Tensor,
    coefficients: Sequence[TokenCoefficients],
    sheet: ScoreSheet | None = None,
) -> list[dict[str, Tensor]]:
    """Gradients of each surrogate over the given rows; parameters a surrogate does not reach are left out."""
    totals: list[dict[str, Tensor]] = [{} for _ in coefficients]
    work = partial(_backward, scorer, parameters, coefficients, sheet)
    for _, gradients_by_side in scorer.each(rollouts, work, rows):
        for total, gradients in zip(totals, gradients_by_side, strict=True):
            add_to(total, gradients)
    return totals


def _backward(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    coefficients: Sequence[TokenCoefficients],
    sheet: ScoreSheet | None,
    batch: Microbatch,
) -> list[dict[str, Tensor]]:
    """One forward pass over a microbatch, then one backward pass per surrogate."""
    if scorer.sharded:
        return [_backward_into_grad(scorer, parameters, each, sheet, batch) for each in coefficients]
    values = scorer.surrogates(batch, coefficients, sheet=sheet)
    return [gradient_of(value, parameters, again=k < len(values)) for k, value in enumerate(values, 1)]


def _backward_into_grad(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    coefficients: TokenCoefficients,
    sheet: ScoreSheet | None,
    batch: Microbatch,
) -> dict[str, Tensor]:
    """The gradient where FSDP2 spreads it over the ranks, which it does into ``.grad`` only; that is put back."""
    all_parameters = list(scorer.model.parameters())
    before = [p.grad for p in all_parameters]
    try:
        for p in all_parameters:
            p.grad = None
        (value,) = scorer.surrogates(batch, [coefficients], sheet=sheet)
        value.backward()
        reshard(scorer.model)
        return {name: p.grad for name, p in parameters.items() if p.grad is not None}
    finally:
        reshard(scorer.model)
        for p, gradient in zip(all_parameters, before, strict=True):
            p.grad = gradient
