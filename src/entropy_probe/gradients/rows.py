"""Vectors over all parameters as rows of a table, in the order of the parameters: products in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.named import NamedVector
from entropy_probe.parallel.shards import local, sum_of_shards

_COLUMN_ELEMENTS, _COLUMN_ELEMENTS_OFF_CPU = 2**18, 2**24
"""Elements converted to float64 at a time in products of gradients: what a processor's cache holds, or 128 MiB."""


def flat(vector: NamedVector, names: Iterable[str]) -> Float[Tensor, " P"]:
    """The vector as stored gradients are laid out, on the CPU."""
    return torch.cat([local(vector[name]).reshape(-1) for name in names]).cpu()


def dot_rows(rows: Float[Tensor, "*U P"], direction: NamedVector, names: Iterable[str]) -> Float[Tensor, "*U"]:
    """Inner products of vectors that are laid out as stored gradients with one direction, in float64."""
    table = rows.reshape(-1, rows.shape[-1])
    products = sum_over_columns(lambda rows, along: rows @ along, table, flat(direction, names))
    return sum_of_shards(products.view(rows.shape[:-1]), direction.values())


def sum_over_columns(products: Callable[..., Tensor], rows: Tensor, *others: Tensor) -> Tensor:
    """Sum ``products(rows[:, c], *(x[..., c] for x in others))`` in float64 over blocks of columns ``c``.

    On the CPU a block stays in the processor's cache; no float64 copy of anything large is made.
    """
    elements = _COLUMN_ELEMENTS if rows.device.type == "cpu" else _COLUMN_ELEMENTS_OFF_CPU
    width = max(1, elements // max(1, len(rows)))
    blocks = [
        products(*(x[..., start : start + width].double() for x in (rows, *others)))
        for start in range(0, max(1, rows.shape[-1]), width)  # a rank's shard of a parameter may be empty
    ]
    return torch.stack(blocks).sum(0)
