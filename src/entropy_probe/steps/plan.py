"""The next step: planned from the update gradient, and taken on copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.config import ProbeConfig
from entropy_probe.named import add, norm
from entropy_probe.parallel.shards import count, extremes
from entropy_probe.results.probe import PreconditionerReport
from entropy_probe.steps.adamw import ClippedGradient, adamw_step, clip_gradient, is_adam, shadow_step
from entropy_probe.steps.copied import check_repeatable, copied_step, moved, optimizer_name

__all__ = ["PlannedStep", "plan_step", "scaled", "stepped_parameters"]


@dataclass(frozen=True, eq=False)
class PlannedStep:
    """The next step: its parts, and how it depends on the update gradient.

    Without a closed form there is one part, no ``gradient_scale``, and ``stepped`` holds the parameters after the step.
    """

    gradient: ClippedGradient
    components: dict[str, dict[str, Tensor]]
    gradient_scale: dict[str, Tensor] | None
    preconditioner: PreconditionerReport | None = None
    stepped: dict[str, Tensor] | None = None

    @property
    def delta(self) -> dict[str, Tensor]:
        """The whole parameter change."""
        return add(*self.components.values())


def plan_step(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    gradient: Mapping[str, Tensor | None],
    config: ProbeConfig,
    frozen_scale: Callable[[], tuple[dict[str, Tensor], PreconditionerReport]],
) -> PlannedStep:
    """The step that the optimizer would take with this loss gradient, in the configured geometry.

    Args:
        parameters: what the optimizer steps, by name.
        optimizer: holds the state; not changed.
        gradient: of the loss, before clipping; ``None`` where it does not reach a parameter.
        config: geometry, clipping and learning rate.
        frozen_scale: ``lr P`` of the frozen geometry and how P came about; called for that geometry only.
    """
    if config.geometry == "frozen":
        unclipped = clip_gradient(gradient, None)
        scale, report = frozen_scale()
        return PlannedStep(unclipped, {"gradient": scaled(unclipped.values, scale, -1.0)}, scale, report)
    clipped = clip_gradient(gradient, config.max_grad_norm)
    given = (parameters, optimizer, clipped.values)
    if is_adam(optimizer):
        step = adamw_step(*given, config.learning_rate)
        return PlannedStep(clipped, step.components, step.gradient_scale)
    stepped = copied_step(*given, config.learning_rate)
    check_repeatable(*given, stepped, config.learning_rate)
    return PlannedStep(clipped, {"step": moved(parameters, stepped)}, None, stepped=stepped)


def stepped_parameters(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    step: PlannedStep,
    config: ProbeConfig,
    learning_rate: float | None,
) -> tuple[dict[str, Tensor], float]:
    """The parameters after the step, by the optimizer's own code on copies or by the frozen move; and its rounding.

    The step is linear in the rate, so ``step``, planned at ``config.learning_rate``, gives it at any other. Rounding is
    the length of what the parameters' precision adds to the step, over the length of the step.

    Args:
        parameters: what the optimizer steps, by name.
        optimizer: holds the state; not changed.
        step: as planned.
        config: the settings it was planned with.
        learning_rate: of the step to take; ``None`` for each group's own.

    Raises:
        ValueError: if the step of an optimizer without a closed form is not linear in the rate.
    """
    planned = config.learning_rate
    if step.stepped is not None and learning_rate == planned:
        return step.stepped, 0.0
    factor = 1.0 if learning_rate is None or planned is None else learning_rate / planned
    delta = {name: factor * move for name, move in step.delta.items()}
    if config.geometry == "frozen":
        stepped = {name: (p.detach() + delta[name]).to(p.dtype) for name, p in parameters.items()}
    elif step.stepped is None:
        stepped = shadow_step(parameters, optimizer, step.gradient.values, learning_rate)
    else:
        stepped = copied_step(parameters, optimizer, step.gradient.values, learning_rate)
    added: dict[str, Tensor] = {}
    for name, p in parameters.items():
        eps = torch.finfo(p.dtype).eps
        slack = 4 * eps * p.detach().abs() + max(1e-4, 16 * eps) * max(map(abs, extremes(delta[name])))
        added[name] = stepped[name] - p.detach() - delta[name]
        if count(added[name].abs() > slack):
            if step.stepped is not None:
                raise ValueError(
                    f"learning rate: expected a step in proportion to it, but {optimizer_name(optimizer)} takes "
                    f"another at {learning_rate:g} (seen in {name}); probe each rate by itself"
                )
            raise RuntimeError(f"{name}: the optimizer's own step and its closed form disagree; please report this")
    return stepped, norm(added) / (norm(delta) or 1.0)


def scaled(vector: Mapping[str, Tensor | None], scale: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """``factor * scale * vector`` element by element; 0 for parameters the loss does not reach."""
    return {name: torch.zeros_like(s) if (x := vector[name]) is None else factor * s * x for name, s in scale.items()}
