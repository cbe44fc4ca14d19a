"""Inner products between the units of one batch, for the cross-prompt U-statistic.

Nothing of size units x units is formed: three numbers per unit are enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.named import NamedVector, dot
from entropy_probe.scoring.forward import Progress, Scorer
from entropy_probe.types import Rollouts, TokenCoefficients
from entropy_probe.updates.per_unit import (
    Side,
    UnitGradients,
    stored_bytes,
    sum_over_columns,
    unit_backward,
    unit_gradients,
)
from entropy_probe.updates.taps import Taps

__all__ = ["CrossProducts", "cross_products"]


@dataclass(frozen=True, eq=False)
class CrossProducts:
    """Inner products between units; ``X`` and ``Y`` are the gradients of two surrogates, P a diagonal scale.

    Attributes:
        left: ``<X_u, P sum_w Y_w>``, ``[U]``, float64.
        right: ``<sum_w X_w, P Y_u>``, ``[U]``, float64.
        diagonal: ``<X_u, P Y_u>``, ``[U]``, float64.
        unscaled_total: ``<sum X, sum Y>``, without P.
        right_total: ``sum Y`` by parameter name.
        how: how per-unit gradients were held.
    """

    left: Float[Tensor, " U"]
    right: Float[Tensor, " U"]
    diagonal: Float[Tensor, " U"]
    unscaled_total: float
    right_total: dict[str, Tensor]
    how: str


def cross_products(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    units: Tensor,
    x: TokenCoefficients,
    y: TokenCoefficients,
    scale: NamedVector,
    *,
    taps: Taps | None,
    max_bytes: float,
    progress: Progress,
) -> CrossProducts:
    """Differentiate both surrogates unit by unit, with one forward pass for the two, and multiply.

    Gradients of all units are kept in host memory if they fit ``max_bytes``. If only those of one surrogate fit, a
    first pass keeps Y's and a second one, over X, needs nothing else. If these do not fit either, a first pass gives
    the sums and the diagonal and a second one the products with the sums.

    Args:
        scorer: the policy.
        parameters: what to differentiate with respect to.
        rollouts: the batch.
        units: the unit of each sequence, ``[N]``.
        x: coefficients of the entropy side.
        y: coefficients of the update side.
        scale: P, by parameter name.
        taps: how to read per-sequence gradients off layers, if they can be.
        max_bytes: how much the gradients of all units may take.
        progress: called with sequences done and in all.
    """
    count = int(units.max()) + 1
    size = stored_bytes(parameters, count)
    if 2 * size <= max_bytes:
        sides = [Side(x, store=True), Side(y, store=True)]
        left, right = unit_gradients(scorer, parameters, rollouts, units, sides, taps=taps, progress=progress)
        how = f"one pass, gradients of {count} units kept ({2 * size / 2**20:.0f} MiB)"
        return _from_stored(left, right, scale, how)
    if size <= max_bytes:
        how = f"two passes, one side's gradients of {count} units kept ({size / 2**20:.0f} MiB)"
        return _one_side_stored(scorer, parameters, rollouts, units, x, y, scale, taps, progress, how)
    return _two_passes(scorer, parameters, rollouts, units, x, y, scale, taps, progress)


def _filled(total: Mapping[str, Tensor | None], scale: NamedVector) -> dict[str, Tensor]:
    """A total with zeros for the parameters the surrogate does not reach."""
    return {name: torch.zeros_like(s) if (t := total[name]) is None else t for name, s in scale.items()}


def _from_stored(x: UnitGradients, y: UnitGradients, scale: NamedVector, how: str) -> CrossProducts:
    assert x.stored is not None
    assert y.stored is not None
    p = torch.cat([scale[name].reshape(-1) for name in x.total]).cpu()

    def products(xs: Tensor, ys: Tensor, along: Tensor) -> Tensor:
        x_sum, y_sum = xs.sum(0), ys.sum(0)
        unscaled = torch.dot(x_sum, y_sum).expand(len(xs))
        return torch.stack([xs @ (along * y_sum), ys @ (along * x_sum), (xs * ys) @ along, unscaled])

    left, right, diagonal, unscaled = sum_over_columns(products, x.stored, y.stored, p)
    return CrossProducts(left, right, diagonal, unscaled[0].item(), _filled(y.total, scale), how)


def _one_side_stored(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    units: Tensor,
    x: TokenCoefficients,
    y: TokenCoefficients,
    scale: NamedVector,
    taps: Taps | None,
    progress: Progress,
    how: str,
) -> CrossProducts:
    """With all ``P Y_u`` at hand, each ``X_u`` is multiplied where it arises and dropped."""
    (right,) = unit_gradients(scorer, parameters, rollouts, units, [Side(y, store=True)], taps=taps, progress=progress)
    assert right.stored is not None
    p = torch.cat([scale[name].reshape(-1) for name in parameters]).to(right.stored)
    for row in right.stored:
        row *= p
    y_total = _filled(right.total, scale)
    toward_y = {name: scale[name] * t for name, t in y_total.items()}
    side = Side(x, directions=[toward_y], pair_with=right.stored)
    (left,) = unit_gradients(scorer, parameters, rollouts, units, [side], taps=taps, progress=progress)
    x_total = _filled(left.total, scale)
    return CrossProducts(left.dots[0], right.dot_stored(x_total), left.paired, dot(x_total, y_total), y_total, how)


def _two_passes(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    units: Tensor,
    x: TokenCoefficients,
    y: TokenCoefficients,
    scale: NamedVector,
    taps: Taps | None,
    progress: Progress,
) -> CrossProducts:
    totals: list[dict[str, Tensor]] = [{}, {}]
    diagonal = torch.zeros(int(units.max()) + 1, dtype=torch.float64)
    for unit, rows in enumerate(torch.split(units.argsort(stable=True), units.bincount().tolist())):
        gradients = unit_backward(scorer, parameters, rollouts, rows, [x, y])
        for total, side in zip(totals, gradients, strict=True):
            for name, g in side.items():
                total[name] = total[name] + g if name in total else g
        for name in gradients[0].keys() & gradients[1].keys():
            a, b = (side[name].reshape(-1).double() for side in gradients)
            diagonal[unit] += (a @ (scale[name].reshape(-1) * b)).item()
    x_total, y_total = ({name: t.get(name, torch.zeros_like(s)) for name, s in scale.items()} for t in totals)
    toward_y, toward_x = ({name: scale[name] * t for name, t in side.items()} for side in (y_total, x_total))
    sides = [Side(x, directions=[toward_y]), Side(y, directions=[toward_x])]
    left, right = unit_gradients(scorer, parameters, rollouts, units, sides, taps=taps, progress=progress)
    unscaled = dot(x_total, y_total)
    how = "two passes, since the gradients of all units exceed max_stored_gradient_gib"
    return CrossProducts(left.dots[0], right.dots[0], diagonal, unscaled, y_total, how)
