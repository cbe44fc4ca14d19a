"""The frozen preconditioner P of Adam's second moment, in which a step is linear in the gradient.

Formula: ``docs/theory.md``, "Frozen geometry".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.parallel.shards import count, extremes
from entropy_probe.results.probe import PreconditionerReport
from entropy_probe.steps.adamw import is_adam
from entropy_probe.steps.copied import optimizer_name
from entropy_probe.steps.moments import step_count, usable_second_moment


@dataclass(frozen=True)
class Preconditioner:
    """A positive diagonal scale by parameter name, and how it came about."""

    scale: dict[str, Tensor]
    report: PreconditionerReport


MIN_COVERAGE = 0.9
"""Below this share of elements with a usable second moment the geometry is not Adam's."""


def frozen_preconditioner(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    max_scale: float = 1e3,
    checkpoint_step: int | None = None,
    identity_if_coverage_below: float | None = None,
) -> Preconditioner:
    """``P = 1 / (sqrt(v / (1 - beta2^k)) + eps)`` for every parameter, clamped to ``max_scale``.

    With AMSGrad ``v`` is the running maximum of the second moment.

    A parameter whose second moment is missing or all zero would get ``1 / eps``; it gets the identity instead and
    is counted and named. Optimizers other than Adam have no such moment. Parameters are found by identity in the
    optimizer, whether or not they have a gradient.

    Args:
        parameters: by name.
        optimizer: holds the second moments; not changed.
        max_scale: upper clamp on P.
        checkpoint_step: ``k`` for parameters whose state has no step count; without it those are not bias-corrected.
        identity_if_coverage_below: use ``P = 1`` for everything if less than this share of the elements has a second
            moment; ``None`` makes less than 0.9 an error.

    Raises:
        ValueError: if ``identity_if_coverage_below`` is ``None`` and the coverage is below 0.9 or the optimizer is not
            Adam.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    usable, coverage = _usable_moments(parameters, optimizer, groups, identity_if_coverage_below)
    identity = [name for name, v in usable.items() if v is None]
    scales: dict[str, Tensor] = {}
    corrections: set[str] = set()
    clamped, smallest = 0, float("inf")
    for name, parameter in parameters.items():
        v, group = usable[name], groups[id(parameter)]
        if v is None:
            scales[name] = torch.ones_like(parameter, requires_grad=False)
            continue
        own = step_count(optimizer.state[parameter])
        corrections.add("own step" if own is not None else "checkpoint_step" if checkpoint_step else "none")
        step = own if own is not None else checkpoint_step
        correction = 1.0 if step is None else 1 - float(group["betas"][1]) ** step
        denominator = (v.to(torch.promote_types(v.dtype, torch.float32)) / correction).sqrt_().add_(float(group["eps"]))
        smallest = min(smallest, extremes(denominator)[0])
        scale = denominator.reciprocal_()
        clamped += count(scale > max_scale)
        scales[name] = scale.clamp_(max=max_scale)
    report = PreconditionerReport(
        coverage=coverage,
        bias_correction=" and ".join(sorted(corrections)) or "none",
        num_identity=sum(parameters[name].numel() for name in identity),
        identity_parameters=tuple(identity),
        num_clamped=clamped,
        max_scale=max(extremes(s)[1] for s in scales.values()),
        min_denominator=None if smallest == float("inf") else smallest,
    )
    return Preconditioner(scale=scales, report=report)


def _usable_moments(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    groups: Mapping[int, Mapping[str, Any]],
    identity_if_coverage_below: float | None,
) -> tuple[dict[str, Tensor | None], float]:
    """Second moments by parameter, ``None`` for the identity, and the share of the elements that have one."""
    if not is_adam(optimizer) and identity_if_coverage_below is None:
        raise ValueError(
            f"frozen geometry: expected torch.optim.AdamW or Adam, whose second moments it is made of, got "
            f"{optimizer_name(optimizer)}; predict from two batches with the optimizer's own step, or set "
            "identity_if_coverage_below to accept the identity"
        )
    usable = {
        name: usable_second_moment(optimizer.state.get(p, {}), bool(groups[id(p)]["amsgrad"]))
        if is_adam(optimizer)
        else None
        for name, p in parameters.items()
    }
    without = [name for name, v in usable.items() if v is None]
    elements = sum(p.numel() for p in parameters.values())
    coverage = 1 - sum(parameters[name].numel() for name in without) / elements
    if identity_if_coverage_below is None and coverage < MIN_COVERAGE:
        raise ValueError(
            f"frozen geometry: expected a usable second moment for at least {MIN_COVERAGE:.0%} of the elements, got "
            f"{coverage:.1%} (first parameter without one: {without[0]}); load the optimizer state, or set "
            "identity_if_coverage_below to accept the identity"
        )
    if identity_if_coverage_below is not None and coverage < identity_if_coverage_below:
        return dict.fromkeys(usable), coverage
    return usable, coverage
