"""Vectors over named parameters: a dictionary from parameter name to tensor.

Two vectors combine only when their names agree exactly; a missing name is an error, never a zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from entropy_probe.parallel.shards import local, sum_of_shards

__all__ = ["NamedVector", "add", "dot", "norm", "scale"]

NamedVector = Mapping[str, Tensor]


def _same_names(a: NamedVector, b: NamedVector) -> None:
    if a.keys() != b.keys():
        only = sorted(a.keys() ^ b.keys())
        raise ValueError(
            f"named vectors: expected the same {len(a)} parameter names, got {len(b)}; only on one side: {only[:5]}"
        )


def dot(a: NamedVector, b: NamedVector) -> float:
    """The inner product over all parameters, accumulated in float64.

    Raises:
        ValueError: if the two vectors do not have the same names.
    """
    _same_names(a, b)
    total = 0.0
    for name, x in a.items():
        total += torch.dot(local(x).reshape(-1).double(), local(b[name]).reshape(-1).double()).item()
    return sum_of_shards(torch.tensor([total], dtype=torch.float64), a.values()).item()


def norm(a: NamedVector) -> float:
    """The Euclidean norm over all parameters, accumulated in float64."""
    return dot(a, a) ** 0.5


def add(*vectors: NamedVector) -> dict[str, Tensor]:
    """The sum of vectors with the same names."""
    first, *rest = vectors
    out = {name: x.clone() for name, x in first.items()}
    for vector in rest:
        _same_names(out, vector)
        for name, x in out.items():
            x += vector[name]
    return out


def scale(factor: float, a: NamedVector) -> dict[str, Tensor]:
    """``factor`` times a vector."""
    return {name: factor * x for name, x in a.items()}
