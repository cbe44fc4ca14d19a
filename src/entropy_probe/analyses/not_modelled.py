"""What of the trainer's step is not in the numbers, where something that is at hand shows it.

Each is one line for :attr:`entropy_probe.results.probe.Diagnostics.not_modelled`; ``docs/theory.md``, "What is not
modelled". What a checkpoint's log shows is found by :mod:`entropy_probe.checkpoints.trainer_log`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from entropy_probe.parallel.shards import count, local

__all__ = ["of_frozen_geometry", "of_model", "of_rounding"]

NARROW = (torch.bfloat16, torch.float16)
MIN_SHARE = 0.5
"""Of the trained elements; single tensors may fit a narrow type because they never moved."""


def of_model(model: nn.Module) -> list[str]:
    """Dropout, and the auxiliary loss of a mixture of experts."""
    left_out = []
    dropout = dict(_dropout(model))
    if dropout:
        left_out.append(
            f"dropout of up to {max(dropout.values()):g} in {len(dropout)} modules ({next(iter(dropout))} first): "
            "training draws its masks unless it switches them off, the probe differentiates without"
        )
    config = getattr(model, "config", None)
    weight = getattr(config, "router_aux_loss_coef", None)
    if getattr(config, "output_router_logits", False) and isinstance(weight, int | float) and weight > 0:
        left_out.append(
            f"the auxiliary loss that balances the experts (router_aux_loss_coef {weight:g}, output_router_logits on)"
        )
    return left_out


def _dropout(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Modules that drop something in training, with the largest rate of each."""
    for name, module in model.named_modules():
        rates = [v for k, v in vars(module).items() if "drop" in k and isinstance(v, float)]
        if isinstance(module, nn.modules.dropout._DropoutNd):  # the common base of torch's dropout layers
            rates.append(module.p)
        if max(rates, default=0.0) > 0:
            yield name, max(rates)


def of_rounding(
    parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, delta: Mapping[str, Tensor]
) -> list[str]:
    """The rounding of the step to the precision that the trainer keeps its weights in.

    Weights that have been trained and still fit a narrow type, each of them, are kept in it: after a single step in
    float32 they would not.

    Args:
        parameters: what is trained.
        optimizer: whose state says what has been.
        delta: the step, by name.
    """
    trained = {name: p for name, p in parameters.items() if optimizer.state.get(p)}
    elements = sum(p.numel() for p in trained.values())
    for dtype in NARROW:
        narrow = {name: p for name, p in trained.items() if _fits(p.detach(), dtype)}
        if not elements or sum(p.numel() for p in narrow.values()) < MIN_SHARE * elements:
            continue
        moving = sum(count(delta[name] != 0) for name in narrow)
        gone = sum(count(_vanishes(p.detach(), delta[name], dtype)) for name, p in narrow.items())
        kind = str(dtype).removeprefix("torch.")
        return [
            f"the rounding of the step to {kind}, which the trained weights are exact in: {gone / max(1, moving):.1%} "
            f"of the elements that move here stay where they are in a trainer that keeps its weights in {kind}"
        ]
    return []


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    if values.dtype == dtype:
        return True
    few = local(values).reshape(-1)[:4096]
    if bool((few.to(dtype).to(few.dtype) != few).any()) and values is local(values):  # shards: all ranks must go on
        return False
    return count(values.to(dtype).to(values.dtype) != values) == 0


def _vanishes(values: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    return (delta != 0) & ((values + delta).to(dtype) == values.to(dtype))


def of_frozen_geometry(
    parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, norm: float, max_norm: float | None
) -> list[str]:
    """Momentum, weight decay and clipping, where the optimizer and the gradient have any.

    Args:
        parameters: what is trained.
        optimizer: theirs.
        norm: of the update gradient.
        max_norm: what the trainer clips it to.
    """
    states = [optimizer.state.get(p, {}) for p in parameters.values()]
    momentum = ("exp_avg", "momentum_buffer")
    parts = {
        "momentum": any(isinstance(state.get(key), Tensor) for state in states for key in momentum),
        "weight decay": any(group.get("weight_decay", 0) for group in optimizer.param_groups),
        "clipping": max_norm is not None and norm > max_norm,
    }
    left_out = [name for name, there in parts.items() if there]
    return [f"{', '.join(left_out)} (frozen geometry)"] if left_out else []
