"""Whether what FSDP2 makes of a model's arithmetic and gradients is what it should be, tried on one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from entropy_probe.gradients.per_sample import cluster_backward
from entropy_probe.named import norm, scale
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.isolation import of_this_thread, parameters_at
from entropy_probe.types import TokenCoefficients

SHARES = (0.1, 0.01, 0.001)
"""How far the log-probability of the sequence is moved, of a nat or of itself: beyond rounding, and, with the last at
the latest, little enough to be almost linear."""
MIN_SURPRISE = 1e-3
"""Nats; a policy that is this sure of any token cannot be moved by more than rounding."""
TOLERANCE = 0.3
"""A gradient that is averaged where it should be summed, or the other way round, is off by a factor of at least 2."""


def gathered_precisions(scorer: Scorer, rollouts: Rollouts) -> set[torch.dtype]:
    """The types in which parameters are when their modules are called, which a ``MixedPrecisionPolicy`` may lower."""
    precisions: set[torch.dtype] = set()

    def look(module: nn.Module, _: Any) -> None:
        precisions.update(p.dtype for p in module.parameters(recurse=False) if p.is_floating_point())

    with ExitStack() as stack:
        for module in scorer.model.modules():
            stack.enter_context(module.register_forward_pre_hook(of_this_thread(look)))
        scorer.shortest_scores(rollouts)
    return precisions


def check_gradient(scorer: Scorer, parameters: Mapping[str, Parameter], rollouts: Rollouts) -> None:
    """Compare the gradient of a log-probability with a difference along it, on the shortest sequence.

    How gradients are divided when they are summed over ranks is up to whoever sharded the model, and a step written
    into shards must reach the next forward pass; both fail silently. The response is replaced by repetitions of the
    first token, since what a policy is sure of hardly changes.

    Args:
        scorer: prepared for the batch.
        parameters: sharded, in float32 or better.
        rollouts: the batch.

    Raises:
        ValueError: if they differ.
    """
    shortest = rollouts.select(rollouts.shortest_first[:1])
    first = shortest.input_ids[shortest.attention_mask][0]
    tried = replace(shortest, input_ids=shortest.input_ids.masked_fill(shortest.response_mask, int(first)))
    everything = TokenCoefficients(tried.response_mask.double(), None)
    (gradient,) = cluster_backward(scorer, parameters, tried, torch.tensor([0]), [everything])
    length, surprise = norm(gradient), -float(scorer.score(tried).logprobs.sum())
    if length == 0 or surprise < MIN_SURPRISE:
        return
    moving = {name: parameters[name] for name in gradient}

    def moved_by(nats: float) -> float:
        step = scale(nats / length**2, gradient)
        with parameters_at(moving, {name: p.detach() + step[name] for name, p in moving.items()}):
            return float(scorer.score(tried).logprobs.double().sum())

    ratio = 0.0
    for share in SHARES:
        nats = share * min(1.0, surprise)
        ratio = (moved_by(nats) - moved_by(-nats)) / (2 * nats)
        if abs(ratio - 1) <= TOLERANCE:
            return
    raise ValueError(
        f"model: expected log-probabilities to change along their gradient as it says, got {ratio:.3g} times that; "
        "leave FSDP's gradient divide factor, reduction and hooks as they are by default, with gradient "
        "synchronisation on"
    )
