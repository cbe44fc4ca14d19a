"""Inner products between the clusters of one batch, for the cross-prompt U-statistic.

Nothing of size clusters x clusters is formed: three numbers per cluster are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.gradients.hooks import Hooks
from entropy_probe.gradients.per_sample import (
    SampleGradients,
    Side,
    cluster_backward,
    sample_gradients,
    stored_bytes,
)
from entropy_probe.gradients.rows import flat, sum_over_columns
from entropy_probe.named import NamedVector, add_to, dot
from entropy_probe.parallel.ranks import ALONE, Ranks
from entropy_probe.parallel.shards import local, sum_of_shards
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.forward import Progress, Scorer
from entropy_probe.scoring.isolation import as_a_function, differs_in_training
from entropy_probe.types import TokenCoefficients


@dataclass(frozen=True, eq=False)
class CrossProducts:
    """Inner products between clusters; ``X`` and ``Y`` are the gradients of two surrogates, P a diagonal scale.

    Attributes:
        left: ``<X_u, P sum_w Y_w>`` for the clusters of this rank, ``[u]``, float64.
        right: ``<sum_w X_w, P Y_u>``, ``[u]``, float64.
        diagonal: ``<X_u, P Y_u>``, ``[u]``, float64.
        unscaled_total: ``<sum X, sum Y>``, without P.
        right_total: ``sum Y`` by parameter name.
        right_stored: ``P Y_u`` for the clusters of this rank, ``[u, P]``, where all of them were kept.
        how: how per-sample gradients were held.
    """

    left: Float[Tensor, " u"]
    right: Float[Tensor, " u"]
    diagonal: Float[Tensor, " u"]
    unscaled_total: float
    right_total: dict[str, Tensor]
    right_stored: Float[Tensor, "u P"] | None
    how: str


def cross_products(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    clusters: Tensor,
    count: int,
    x: TokenCoefficients,
    y: TokenCoefficients,
    scale: NamedVector,
    *,
    hooks: Hooks | None,
    max_bytes: float,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> CrossProducts:
    """Differentiate both surrogates cluster by cluster, with one forward pass for the two, and multiply.

    Gradients of all clusters are kept in host memory if they fit ``max_bytes``. If only those of one surrogate fit, a
    first pass keeps Y's and a second one, over X, needs nothing else. If these do not fit either, a first pass gives
    the sums and the diagonal and a second one the products with the sums.

    Args:
        scorer: the policy.
        parameters: what to differentiate with respect to.
        rollouts: this rank's rows of the batch, whole clusters.
        clusters: the cluster of each of these sequences, ``[N]``, numbered from 0 without gaps.
        count: the clusters of the whole batch.
        x: coefficients of the entropy side.
        y: coefficients of the update side.
        scale: P, by parameter name.
        hooks: how to read per-sequence gradients off layers, if they can be.
        max_bytes: how much the gradients of all clusters may take, on all ranks together.
        progress: called with sequences done and in all.
        ranks: the ranks that have the other rows.
    """

    def differentiate(sides: list[Side]) -> list[SampleGradients]:
        with ranks.agreeing():
            return sample_gradients(scorer, parameters, rollouts, clusters, sides, hooks=hooks, progress=progress)

    size = stored_bytes(parameters, count)
    if 2 * size <= max_bytes:
        left, right = differentiate([Side(x, store=True), Side(y, is_loss=True, store=True)])
        how = f"one pass, gradients of {count} units kept ({2 * size / 2**20:.0f} MiB)"
        return _from_stored(left, right, scale, how, ranks)
    if size <= max_bytes:
        how = f"two passes, one side's gradients of {count} units kept ({size / 2**20:.0f} MiB)"
        return _one_side_stored(differentiate, x, y, scale, how, ranks)
    with ranks.agreeing():
        totals, diagonal = _totals(scorer, parameters, rollouts, clusters, x, y, scale)
    x_total, y_total = (_added(total, scale, ranks) for total in totals)
    toward_y, toward_x = ({name: scale[name] * t for name, t in side.items()} for side in (y_total, x_total))
    left, right = differentiate([Side(x, directions=[toward_y]), Side(y, is_loss=True, directions=[toward_x])])
    how = "two passes, since the gradients of all clusters exceed max_stored_gradient_gib"
    return CrossProducts(left.dots[0], right.dots[0], diagonal, dot(x_total, y_total), y_total, None, how)


def _added(total: Mapping[str, Tensor | None], scale: NamedVector, ranks: Ranks) -> dict[str, Tensor]:
    """A total over all ranks, with zeros for the parameters the surrogate does not reach."""
    summed = ranks.sum_vector(total, scale)
    return {name: torch.zeros_like(s) if (t := summed[name]) is None else t for name, s in scale.items()}


def _from_stored(x: SampleGradients, y: SampleGradients, scale: NamedVector, how: str, ranks: Ranks) -> CrossProducts:
    assert x.stored is not None
    assert y.stored is not None
    x_total, y_total = (_added(side.total, scale, ranks) for side in (x, y))
    p, x_sum, y_sum = (flat(vector, x.total) for vector in (scale, x_total, y_total))

    def products(xs: Tensor, ys: Tensor, along: Tensor, to_x: Tensor, to_y: Tensor) -> Tensor:
        return torch.stack([xs @ (along * to_y), ys @ (along * to_x), (xs * ys) @ along])

    sums = sum_over_columns(products, x.stored, y.stored, p, x_sum, y_sum)
    left, right, diagonal = sum_of_shards(sums, scale.values())
    return CrossProducts(left, right, diagonal, dot(x_total, y_total), y_total, _scaled(y.stored, p), how)


def _scaled(rows: Float[Tensor, "u P"], scale: Float[Tensor, " P"]) -> Float[Tensor, "u P"]:
    """Each row times ``P``, in place, a row at a time."""
    for row in rows:
        row *= scale
    return rows


def _one_side_stored(
    differentiate: Callable[[list[Side]], list[SampleGradients]],
    x: TokenCoefficients,
    y: TokenCoefficients,
    scale: NamedVector,
    how: str,
    ranks: Ranks,
) -> CrossProducts:
    """With all ``P Y_u`` at hand, each ``X_u`` is multiplied where it arises and dropped."""
    (right,) = differentiate([Side(y, is_loss=True, store=True)])
    assert right.stored is not None
    stored = _scaled(right.stored, flat(scale, right.total).to(right.stored))
    y_total = _added(right.total, scale, ranks)
    toward_y = {name: scale[name] * t for name, t in y_total.items()}
    (left,) = differentiate([Side(x, directions=[toward_y], pair_with=stored[None])])
    x_total = _added(left.total, scale, ranks)
    unscaled = dot(x_total, y_total)
    return CrossProducts(left.dots[0], right.dot_stored(x_total), left.paired[0], unscaled, y_total, stored, how)


def _totals(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    clusters: Tensor,
    x: TokenCoefficients,
    y: TokenCoefficients,
    scale: NamedVector,
) -> tuple[list[dict[str, Tensor | None]], Tensor]:
    """``sum X``, ``sum Y`` and the diagonal, cluster by cluster."""
    totals: list[dict[str, Tensor]] = [{}, {}]
    counts = clusters.bincount().tolist()
    diagonal = torch.zeros(len(counts), dtype=torch.float64)
    for unit, rows in enumerate(torch.split(clusters.argsort(stable=True), counts)):
        left, right = gradient_pair(scorer, parameters, rollouts, rows, x, y)
        for total, side in zip(totals, (left, right), strict=True):
            add_to(total, {name: g.to(torch.promote_types(g.dtype, torch.float32)) for name, g in side.items()})
        diagonal[unit] = _product(left, {name: scale[name] * y for name, y in right.items()})
    return [{name: total.get(name) for name in scale} for total in totals], sum_of_shards(diagonal, scale.values())


def own_products(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    clusters: Tensor,
    x: TokenCoefficients,
    y: TokenCoefficients,
    x_total: Mapping[str, Tensor | None],
    vectors: Callable[[int, NamedVector], Sequence[NamedVector]],
) -> Float[Tensor, "2 K U"]:
    """``<X_u, v>`` and ``<sum X, v>`` for vectors ``v`` that depend on ``Y_u``, a cluster at a time.

    What :func:`cross_products` takes is the same here. ``x_total`` is ``sum X`` over all ranks; ``vectors`` makes a
    cluster's vectors from its number here and ``Y_u``, which need not reach every parameter.
    """
    summed, products = {name: t for name, t in x_total.items() if t is not None}, []
    for unit, rows in enumerate(torch.split(clusters.argsort(stable=True), clusters.bincount().tolist())):
        own, loss = gradient_pair(scorer, parameters, rollouts, rows, x, y)
        made = vectors(unit, loss)
        products.append([[_product(side, v) for v in made] for side in (own, summed)])
    table = torch.tensor(products, dtype=torch.float64).permute(1, 2, 0)
    return sum_of_shards(table, parameters.values())


def _product(a: NamedVector, b: NamedVector) -> float:
    """This shard's part of an inner product of two vectors that need not have every parameter."""
    both = (name for name in a if name in b)  # in a fixed order
    return sum((local(a[name]).reshape(-1).double() @ local(b[name]).reshape(-1).double()).item() for name in both)


def gradient_pair(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    rows: Tensor,
    x: TokenCoefficients,
    y: TokenCoefficients,
) -> list[dict[str, Tensor]]:
    """The gradients of a surrogate and a loss over some rows.

    They are taken in one forward pass, unless training differentiates otherwise.
    """
    given = (scorer, parameters, rollouts, rows)
    if not differs_in_training(scorer.model, parameters):
        return cluster_backward(*given, [x, y])
    with as_a_function(scorer.model):
        slope = cluster_backward(*given, [x])
    return slope + cluster_backward(*given, [y])
