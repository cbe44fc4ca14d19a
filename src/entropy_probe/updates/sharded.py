"""Whether what FSDP2 makes of a model's arithmetic and gradients is what it should be, tried on one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from entropy_probe.isolation import parameters_at
from entropy_probe.named import norm, scale
from entropy_probe.scoring.forward import Scorer
from entropy_probe.types import Rollouts, TokenCoefficients
from entropy_probe.updates.per_unit import unit_backward

__all__ = ["check_gradient", "gathered_precisions"]

NATS = 0.1
"""How far the log-probability of the sequence is moved: beyond rounding, and little enough to be almost linear."""
TOLERANCE = 0.3
"""A gradient that is averaged where it should be summed, or the other way round, is off by a factor of at least 2."""


def gathered_precisions(scorer: Scorer, rollouts: Rollouts) -> set[torch.dtype]:
    """The types in which parameters are when their modules are called, which a ``MixedPrecisionPolicy`` may lower."""
    found: set[torch.dtype] = set()

    def look(module: nn.Module, _: Any) -> None:
        found.update(p.dtype for p in module.parameters(recurse=False) if p.is_floating_point())

    handles = [module.register_forward_pre_hook(look) for module in scorer.model.modules()]
    try:
        scorer.shortest_scores(rollouts)
    finally:
        for handle in handles:
            handle.remove()
    return found


def check_gradient(scorer: Scorer, parameters: Mapping[str, Parameter], rollouts: Rollouts) -> None:
    """Compare the gradient of the shortest sequence's log-probability with a difference along it.

    How gradients are divided when they are summed over ranks is up to whoever sharded the model, and a step written
    into shards must reach the next forward pass; both fail silently.

    Args:
        scorer: prepared for the batch.
        parameters: sharded, in float32 or better.
        rollouts: the batch.

    Raises:
        ValueError: if they differ.
    """
    shortest = rollouts.select(rollouts.attention_mask.sum(1).argmin()[None])
    everything = TokenCoefficients(shortest.response_mask.double(), None)
    (gradient,) = unit_backward(scorer, parameters, shortest, torch.tensor([0]), [everything])
    length = norm(gradient)
    if length == 0:
        return
    step = scale(NATS / length**2, gradient)

    def moved_by(factor: float) -> float:
        moving = {name: parameters[name] for name in step}
        with parameters_at(moving, {name: p.detach() + factor * step[name] for name, p in moving.items()}):
            return float(scorer.score(shortest).logprobs.double().sum())

    found = (moved_by(1.0) - moved_by(-1.0)) / 2
    if abs(found / NATS - 1) > TOLERANCE:
        raise ValueError(
            f"model: expected gradients summed over the ranks' equal shares of the work, got {NATS / found:.3g} times "
            "that (from a difference of log-probabilities); leave FSDP's gradient divide factor, reduction and hooks "
            "as they are by default, with gradient synchronisation on"
        )
