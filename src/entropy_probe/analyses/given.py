"""A gradient from outside, such as the one that the trainer is about to step with.

Formulas: ``docs/theory.md``, "A gradient from outside".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.named import dot, norm
from entropy_probe.parallel.shards import local, same_shards
from entropy_probe.results.note import NoteKind
from entropy_probe.results.probe import GradientAgreement
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.steps.adamw import Gradient, is_adam
from entropy_probe.steps.copied import optimizer_name
from entropy_probe.steps.origins import check_past

TAKE = (
    "take it after the backward pass, before clipping, as {name: p.grad for name, p in model.named_parameters() if "
    "p.requires_grad}"
)
GRADIENT_GIVEN = NoteKind(
    "gradient_given",
    "the step is that of a gradient from outside: errors are from the evaluation rollouts alone",
    "Leave the gradient out and give the update rollouts to have the error from the update batch too.",
)
NOTABLE_DISTANCE = 0.05
"""Of the gradient that was given; what bfloat16 does to a trainer's gradient is below it."""
GRADIENTS_DIFFER = NoteKind(
    "gradients_differ",
    "the gradient of the update rollouts is {distance:.1%} of its length away from the one given, cosine {cosine:.4f}: "
    "their batch or loss is not the one it was taken of",
    "Give the rollouts of that very step, and look for what probe.loss_type leaves out: another normaliser, a KL term, "
    "an entropy bonus, dropout.",
)


@dataclass(frozen=True, eq=False)
class GivenGradient:
    """Where a step comes from whose gradient the caller has.

    Attributes:
        update: the rollouts that its own gradient was compared with; ``None`` without any.
        agreement: how far apart the two are.
    """

    update: Rollouts | None
    agreement: GradientAgreement | None


def checked_gradient(parameters: Mapping[str, Tensor], gradient: Gradient) -> dict[str, Tensor | None]:
    """A gradient from outside, as a copy in at least float32 beside the parameters.

    ``None`` stands where the loss does not reach a parameter.

    Raises:
        ValueError: for names, shapes, kinds of tensors or values that are not those of a gradient.
    """
    wrong = [f"{name!r} is missing" for name in parameters if name not in gradient]
    wrong += [f"{name!r} is not one of them" for name in gradient if name not in parameters]
    if wrong:
        others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(
            f"gradient: expected the names of the {len(parameters)} trained parameters, of which {wrong[0]}{others}; "
            f"{TAKE}"
        )
    if all(g is None for g in gradient.values()):
        raise ValueError(f"gradient: expected a tensor for some parameter, got none for any; {TAKE}")
    return {name: _checked(name, p, gradient[name]) for name, p in parameters.items()}


def checked_past(
    parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, past: Sequence[Gradient]
) -> tuple[Gradient, ...]:
    """Gradients of the last steps, checked one by one and against the moments that are made of them.

    Raises:
        ValueError: as :func:`checked_gradient`, for another optimizer than Adam, or gradients of other steps.
    """
    if not is_adam(optimizer):
        raise ValueError(
            "past_gradients: expected torch.optim.AdamW or Adam, whose momentum is a known sum of them, got "
            f"{optimizer_name(optimizer)}; leave them out"
        )
    checked = tuple(checked_gradient(parameters, gradient) for gradient in past)
    check_past(parameters, optimizer, checked)
    return checked


def _checked(name: str, parameter: Tensor, g: Tensor | None) -> Tensor | None:
    if g is None:
        return None
    if not isinstance(g, Tensor) or not g.is_floating_point() or g.layout != torch.strided:
        got = f"{g.layout} of {g.dtype}" if isinstance(g, Tensor) else type(g).__name__
        raise ValueError(f"gradient: {name}: expected a dense floating-point tensor, got {got}; {TAKE}")
    if g.shape != parameter.shape:
        raise ValueError(f"gradient: {name}: expected shape {tuple(parameter.shape)}, got {tuple(g.shape)}; {TAKE}")
    if not same_shards(g, parameter):
        raise ValueError(
            f"gradient: {name}: expected it sharded as the parameter is, got another placement; pass p.grad of the "
            "sharded parameter itself"
        )
    g = g.detach().to(parameter.device, torch.promote_types(parameter.dtype, torch.float32), copy=True)
    if bad := int((~torch.isfinite(local(g))).sum()):  # of this rank; the others hear of it
        raise ValueError(
            f"gradient: {name}: expected finite values, got {bad} that are not; a trainer skips such a "
            "step, and a scaled one (fp16) must be unscaled first"
        )
    return g


def agreement(given: Gradient, own: Gradient) -> GradientAgreement:
    """How far the gradient of the update rollouts is from the one given, over all parameters."""
    a, b = _filled(given, own), _filled(own, given)
    lengths, product = (norm(a), norm(b)), dot(a, b)
    distance = max(0.0, lengths[0] ** 2 - 2 * product + lengths[1] ** 2) ** 0.5
    return GradientAgreement(
        relative_distance=distance / lengths[0] if lengths[0] else None,
        cosine=product / (lengths[0] * lengths[1]) if all(lengths) else None,
    )


def _filled(gradient: Gradient, other: Gradient) -> dict[str, Tensor]:
    """A gradient with zeros where only the other one reaches."""
    zeros = {name: torch.zeros_like(x) for name, x in other.items() if x is not None}
    return zeros | {name: x for name, x in gradient.items() if x is not None}
