"""The next step: planned from the update gradient, and taken on copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.config import ProbeConfig
from entropy_probe.named import add, norm
from entropy_probe.parallel.shards import count, extremes
from entropy_probe.results.probe import PreconditionerReport
from entropy_probe.steps.adamw import ClippedGradient, Gradient, adamw_step, clip_gradient, is_adam, shadow_step
from entropy_probe.steps.copied import check_repeatable, copied_step, moved, optimizer_name
from entropy_probe.steps.precision import clipped_as_kept, step_dtypes

DISAGREE = "{name}: the optimizer's own step and its closed form disagree; please report this"


@dataclass(frozen=True, eq=False)
class PlannedStep:
    """The next step: its parts, and how it depends on the update gradient.

    Attributes:
        gradient: of the loss, clipped.
        components: the parts; one where there is no closed form.
        gradient_scale: how the gradient part depends on the gradient; ``None`` likewise.
        preconditioner: how P was built; ``None`` but in the frozen geometry.
        stepped: the parameters after the step, where only the optimizer's own code can tell: without a closed form, or
            where the step is rounded.
        kept: the types that the step is rounded to, by parameter.
        taken_with: the gradient as the optimizer gets it, in these types.
    """

    gradient: ClippedGradient
    components: dict[str, dict[str, Tensor]]
    gradient_scale: dict[str, Tensor] | None
    taken_with: Gradient
    preconditioner: PreconditionerReport | None = None
    stepped: dict[str, Tensor] | None = None
    kept: dict[str, torch.dtype] = field(default_factory=dict)

    @property
    def stays(self) -> float:
        """The share of the elements that would move, and stay where they are by rounding."""
        delta, rounding = self.delta, self.components["rounding"]
        moving = {name: (delta[name] - rounding[name]) != 0 for name in self.kept}
        still = sum(count(moves & (delta[name] == 0)) for name, moves in moving.items())
        return still / max(1, sum(map(count, moving.values())))

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
        parts = {"gradient": scaled(unclipped.values, scale, -1.0)}
        return PlannedStep(unclipped, parts, scale, unclipped.values, report)
    kept = step_dtypes(parameters, optimizer, config.step_dtype)
    clipped, rate = clip_gradient(gradient, config.max_grad_norm), config.learning_rate
    taken_with = clipped_as_kept(gradient, config.max_grad_norm, kept) if kept else clipped.values
    given = (parameters, optimizer, taken_with)
    if not is_adam(optimizer):
        stepped = copied_step(*given, rate, kept)
        check_repeatable(*given, stepped, rate, kept)
        return PlannedStep(clipped, {"step": moved(parameters, stepped)}, None, taken_with, stepped=stepped, kept=kept)
    step = adamw_step(parameters, optimizer, clipped.values, rate)
    if not kept:
        return PlannedStep(clipped, step.components, step.gradient_scale, taken_with)
    stepped, delta = shadow_step(*given, rate, kept), step.delta
    rounding = _added(parameters, stepped, delta)
    _check_finite(stepped, kept)
    if (name := _beyond_rounding(parameters, rounding, delta, kept)) is not None:
        raise RuntimeError(DISAGREE.format(name=name))
    parts = {**step.components, "rounding": rounding}
    return PlannedStep(clipped, parts, step.gradient_scale, taken_with, stepped=stepped, kept=kept)


def unrounded_step(
    parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, gradient: Gradient, config: ProbeConfig
) -> dict[str, Tensor]:
    """The optimizer's step with another loss gradient, clipped as the trainer does, in full precision.

    Args:
        parameters: what the optimizer steps, by name.
        optimizer: holds the state; not changed.
        gradient: of the loss, before clipping; ``None`` where it does not reach a parameter.
        config: clipping and learning rate.
    """
    given = (parameters, optimizer, clip_gradient(gradient, config.max_grad_norm).values, config.learning_rate)
    return adamw_step(*given).delta if is_adam(optimizer) else moved(parameters, copied_step(*given))


def stepped_parameters(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    step: PlannedStep,
    config: ProbeConfig,
    learning_rate: float | None,
) -> tuple[dict[str, Tensor], float]:
    """The parameters after the step, by the optimizer's own code on copies or by the frozen move; and its rounding.

    Steps are linear in the rate up to rounding, so ``step``, planned at ``config.learning_rate``, gives any other.
    Rounding is the length of what is not in the step as planned, over the length of the step.

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
    else:
        take = shadow_step if is_adam(optimizer) else copied_step
        stepped = take(parameters, optimizer, step.taken_with, learning_rate, step.kept)
    added = _added(parameters, stepped, delta)
    if (name := _beyond_rounding(parameters, added, delta, step.kept)) is not None:
        if step.gradient_scale is None:
            raise ValueError(
                f"learning rate: expected a step in proportion to it, but {optimizer_name(optimizer)} takes "
                f"another at {learning_rate:g} (seen in {name}); probe each rate by itself"
            )
        raise RuntimeError(DISAGREE.format(name=name))
    return stepped, norm(added) / (norm(delta) or 1.0)


def _added(
    parameters: Mapping[str, Parameter], stepped: Mapping[str, Tensor], delta: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What precision adds to a parameter change."""
    return {name: move - delta[name] for name, move in moved(parameters, stepped).items()}


def _beyond_rounding(
    parameters: Mapping[str, Parameter],
    added: Mapping[str, Tensor],
    delta: Mapping[str, Tensor],
    kept: Mapping[str, torch.dtype],
) -> str | None:
    """The first parameter whose step is another one than planned, by more than precision explains."""
    for name, p in parameters.items():
        dtype = kept.get(name, p.dtype)
        if dtype == torch.float16:  # squares of gradients leave its range, and no bound holds
            continue
        eps = torch.finfo(dtype).eps
        slack = 4 * eps * p.detach().abs() + max(1e-4, 16 * eps) * max(map(abs, extremes(delta[name])))
        if count(added[name].abs() > slack):
            return name
    return None


def _check_finite(stepped: Mapping[str, Tensor], kept: Mapping[str, torch.dtype]) -> None:
    for name, dtype in kept.items():
        if count(~torch.isfinite(stepped[name])):
            raise ValueError(
                f"{name}: expected finite values after a step in {dtype}, got others: no trainer can keep its weights "
                "in it; set step_dtype to float32"
            )


def scaled(vector: Mapping[str, Tensor | None], scale: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """``factor * scale * vector`` element by element; 0 for parameters the loss does not reach."""
    return {name: torch.zeros_like(s) if (x := vector[name]) is None else factor * s * x for name, s in scale.items()}
