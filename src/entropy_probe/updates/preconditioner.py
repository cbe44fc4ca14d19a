"""The frozen preconditioner P of Adam's second moment, in which a step is linear in the gradient.

Formula: ``docs/theory.md``, "Frozen geometry".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.moments import usable_second_moment
from entropy_probe.results import PreconditionerReport

__all__ = ["Preconditioner", "frozen_preconditioner"]


@dataclass(frozen=True)
class Preconditioner:
    """A positive diagonal scale by parameter name, and how it came about."""

    scale: dict[str, Tensor]
    report: PreconditionerReport


def frozen_preconditioner(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    max_scale: float = 1e3,
    min_coverage: float = 0.9,
) -> Preconditioner:
    """``P = 1 / (sqrt(v / (1 - beta2^k)) + eps)`` for every parameter, clamped to ``max_scale``.

    A parameter whose second moment is missing or all zero would get ``1 / eps``; it gets the identity instead and
    is counted and named.

    Raises:
        ValueError: if less than ``min_coverage`` of the elements have a usable second moment.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scales: dict[str, Tensor] = {}
    identity: list[str] = []
    elements = covered = clamped = 0
    smallest = float("inf")
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        elements += parameter.numel()
        v = usable_second_moment(state)
        if v is None:
            identity.append(name)
            scales[name] = torch.ones_like(parameter, requires_grad=False)
            continue
        group = groups[id(parameter)]
        k, beta2, eps = float(state["step"]), float(group["betas"][1]), float(group["eps"])
        denominator = (v / (1 - beta2**k)).sqrt_().add_(eps)
        smallest = min(smallest, denominator.min().item())
        scale = denominator.reciprocal()
        clamped += int((scale > max_scale).sum())
        covered += parameter.numel()
        scales[name] = scale.clamp_(max=max_scale)
    coverage = covered / elements
    if coverage < min_coverage:
        raise ValueError(
            f"frozen geometry: expected a usable second moment for at least {min_coverage:.0%} of the elements, got "
            f"{coverage:.1%} (first parameter without one: {identity[0]}); load the optimizer state, or use "
            "geometry='adamw'"
        )
    report = PreconditionerReport(
        coverage=coverage,
        num_identity=elements - covered,
        identity_parameters=tuple(identity),
        num_clamped=clamped,
        max_scale=max(s.max().item() for s in scales.values()),
        min_denominator=None if smallest == float("inf") else smallest,
    )
    return Preconditioner(scale=scales, report=report)
