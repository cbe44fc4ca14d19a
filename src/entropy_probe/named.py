"""Vectors over named parameters: a dictionary from parameter name to tensor.

Two vectors combine only when their names agree exactly; a missing name is an error, never a zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.parallel.shards import local, sum_of_shards

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


def add_to(total: dict[str, Tensor], more: NamedVector) -> None:
    """Add a vector to a running sum; neither need have every name, and tensors of the sum are not changed in place."""
    for name, x in more.items():
        total[name] = total[name] + x if name in total else x


def gradient_of(value: Tensor, parameters: Mapping[str, Parameter], *, again: bool = False) -> dict[str, Tensor]:
    """The gradient of a scalar by autograd; parameters that it does not reach are left out.

    With ``again`` the graph is kept for another one.
    """
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, retain_graph=again)
    return {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}


def scale(factor: float, a: NamedVector) -> dict[str, Tensor]:
    """``factor`` times a vector."""
    return {name: factor * x for name, x in a.items()}
