"""Full-precision copies of weights that an optimizer keeps and steps, while the model computes with rounded ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from entropy_probe.checkpoints.errors import InvalidValueError, MismatchError, UnsupportedError
from entropy_probe.checkpoints.formats import StoredTensor, Weights
from entropy_probe.checkpoints.peft_names import name_in_file
from entropy_probe.parallel.shards import local, sharded_as

Copy = Literal["masters", "rounded"]
"""Which of the two copies of its weights a model gets."""


def check_masters(
    where: str,
    masters: Mapping[str, StoredTensor],
    names: tuple[str, ...],
    shapes: Mapping[str, tuple[int, ...]],
    weights: Weights,
    adapter: str | None,
) -> torch.dtype | None:
    """Check that there is a finite master of every trained parameter, which the stored weights are rounded from.

    Returns:
        The type that the model's weights are rounded to; None where they are the masters themselves.
    """
    kinds: set[torch.dtype] = set()
    for name in names:
        if name not in masters or masters[name].shape != shapes[name]:
            raise MismatchError(
                f"{where}: {name}: expected float32 weights of shape {list(shapes[name])}, got "
                f"{list(masters[name].shape) if name in masters else 'none'}; copy the checkpoint again"
            )
        master = masters[name].read()
        if not torch.isfinite(master).all():
            raise InvalidValueError(
                f"{where}: {name}: expected finite values, got NaN or infinity; training diverged before the save"
            )
        key = name if adapter is None else name_in_file(name, adapter)
        stored = weights.tensors[key].read() if key in weights.tensors else None
        if stored is None or torch.equal(stored, master.to(stored.dtype)):
            kinds |= set() if stored is None else {stored.dtype}
            continue
        for kind in (torch.bfloat16, torch.float16):
            if torch.equal(stored, master.to(kind).to(stored.dtype)):
                kinds.add(kind)
                break
        else:
            raise MismatchError(
                f"{weights.files[0]}: {key}: expected the optimizer's float32 weights rounded, got others; files of "
                "ranks were swapped, or are of two saves; copy the checkpoint again"
            )
    kinds -= {torch.float32}
    return min(kinds, key=str) if kinds else None


def described(where: str, kind: torch.dtype | None, copy: Copy, *, there: bool) -> str:
    """Which copy the model has, for the result; empty where there is only one."""
    if kind is None:
        if copy == "rounded" and not there:
            raise UnsupportedError(
                f"{where}: weights: expected 'masters', since its weights are kept once, got 'rounded'; leave it out"
            )
        return ""
    short = str(kind).removeprefix("torch.")
    if copy == "rounded":
        return f"; weights: in {short}, as the policy samples with them, not the optimizer's float32 masters"
    return f"; weights: the optimizer's float32 masters, not as rounded to {short}, with which the policy samples"


@torch.no_grad()
def copy_masters(masters: Mapping[str, StoredTensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Write masters over a model's own parameters, which may be shards."""
    for name, parameter in parameters.items():
        value = masters[name].read().to(parameter.device, parameter.dtype)
        local(parameter).copy_(local(sharded_as(value, parameter)))
