"""The precision that training keeps its weights in, which every step of it is rounded to.

A checkpoint may be held in a higher precision than it was trained in, since small changes of log-probabilities drown
in a low one. What it was trained in shows in two places: weights that a narrow type holds exactly, and an optimizer's
state of that type, since torch's optimizers keep theirs in the type of the parameter. With a wider state a trainer
keeps a float32 copy of its weights, which its steps are added to. Formulas: ``docs/theory.md``, "Rounded steps".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.config import StepDtype
from entropy_probe.parallel.shards import count, local
from entropy_probe.steps.adamw import Gradient

NARROW = (torch.bfloat16, torch.float16)
MIN_SHARE = 0.5
"""Of the trained elements that are not 0; single tensors may fit a narrow type because they never moved."""


def step_dtypes(
    parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, setting: StepDtype
) -> dict[str, torch.dtype]:
    """The parameters whose step is rounded, and what to; all others are left out.

    Args:
        parameters: what the optimizer steps, by name.
        optimizer: holds the state, in the types that training keeps it in.
        setting: ``auto``: parameters of a 16-bit type, or that one holds exactly, with a state of nothing but that
            type; ``float32``: none; else those that this type holds exactly.

    Raises:
        ValueError: if most of the trained elements are not numbers of the type that was asked for.
    """
    if setting == "float32":
        return {}
    if setting != "auto":
        return _asked_for(parameters, optimizer, getattr(torch, setting))
    kept = {name: dtype for name, p in parameters.items() if (dtype := _evident(p, optimizer.state.get(p, {})))}
    others = set(kept.values())
    for name, p in parameters.items():
        if not state_dtypes(optimizer.state.get(p, {}), p):  # nothing but the others says what training keeps it in
            likely = {p.dtype} if p.dtype in NARROW else others
            if len(likely) == 1 and fits(p, dtype := min(likely, key=str)):
                kept[name] = dtype
    return {name: kept[name] for name in parameters if name in kept}


def _evident(parameter: Parameter, state: Mapping[str, Any]) -> torch.dtype | None:
    """The 16-bit type that a parameter is kept in, if its state is all of that type."""
    seen = state_dtypes(state, parameter)
    (dtype,) = seen if len(seen) == 1 else (None,)
    return dtype if dtype in NARROW and fits(parameter, dtype) else None


def _asked_for(
    parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, dtype: torch.dtype
) -> dict[str, torch.dtype]:
    share = exact_share(trained(parameters, optimizer) or parameters, dtype)
    if share is not None and share < MIN_SHARE:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"step_dtype: expected weights that are numbers of {kind}, as a trainer that keeps them in it leaves them, "
            f"got {share:.0%} of the trained elements that are; set step_dtype to auto"
        )
    return {name: dtype for name, p in parameters.items() if fits(p, dtype)}


def trained(parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Parameter]:
    """The parameters that the optimizer keeps something for."""
    return {name: p for name, p in parameters.items() if optimizer.state.get(p)}


def exact_share(parameters: Mapping[str, Parameter], dtype: torch.dtype) -> float | None:
    """The share of elements in tensors that a type holds exactly.

    Zeros, as of a ``lora_B`` before its first step, are exact in every type and evidence of none: they do not count.
    ``None`` where there is nothing else.
    """
    sizes = {name: count(p.detach() != 0) for name, p in parameters.items()}
    total = sum(sizes.values())
    return sum(sizes[name] for name, p in parameters.items() if fits(p, dtype)) / total if total else None


def state_dtypes(state: Mapping[str, Any], parameter: Tensor) -> set[torch.dtype]:
    """The types of what an optimizer keeps for the elements of a parameter; counts and single numbers are left out."""
    return {x.dtype for key, x in state.items() if _of_elements(key, x, parameter)}


def _of_elements(key: str, value: object, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or key == "step":
        return False
    return value.ndim > 0 or parameter.ndim == 0


def fits(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether a type holds every value exactly."""
    values = values.detach()
    if values.dtype == dtype:
        return True
    few = local(values).reshape(-1)[:4096]
    if bool((few.to(dtype).to(few.dtype) != few).any()) and values is local(values):  # shards: all ranks must go on
        return False
    return count(values.to(dtype).to(values.dtype) != values) == 0


def clipped_as_kept(gradient: Gradient, max_norm: float | None, kept: Mapping[str, torch.dtype]) -> Gradient:
    """The gradient as the optimizer gets it where steps are rounded: in each parameter's own type, and clipped there.

    Torch's own clipping takes the norm, and the factor, in the gradient's type too.

    Args:
        gradient: of the loss, before clipping.
        max_norm: the largest norm allowed; ``None`` for no clipping.
        kept: as :func:`step_dtypes` returns it.
    """
    given = {name: None if g is None else g.to(kept.get(name, g.dtype), copy=True) for name, g in gradient.items()}
    if max_norm is None:
        return given
    holders = []
    for g in given.values():
        if g is not None:
            holders.append(torch.empty_like(g))
            holders[-1].grad = g
    torch.nn.utils.clip_grad_norm_(holders, max_norm)
    return given
