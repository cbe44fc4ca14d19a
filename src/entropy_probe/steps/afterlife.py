"""What a step leaves to the steps after it: the life of its gradient in the momentum, and what momentum alone will do.

Formulas: ``docs/theory.md``, "After the step".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.parallel.shards import extremes
from entropy_probe.results.note import Note, NoteKind
from entropy_probe.steps.adamw import AdamSettings, Gradient, adam_settings, is_adam, shadow_step
from entropy_probe.steps.copied import copied_step, optimizer_name
from entropy_probe.steps.moments import step_count

NO_END = NoteKind(
    "coasting_has_no_end",
    "{optimizer} does not come to rest when gradients are zero, so what momentum alone will do has no size: {why}",
    "Leave probe.coast out for this optimizer; the other numbers do not depend on it.",
)
NEGLIGIBLE = 1e-4
"""Later steps whose share of the momentum is below this are left out."""
PATIENCE, PERSISTENT = 100, 0.9
"""Steps that are still this share of what they were so many ago do not come to an end."""
DECAYS = ("weight_decay", "lambd")
"""What torch's optimizers call the rate at which weights decay."""


@dataclass(frozen=True, eq=False)
class Coasted:
    """The parameters after steps with zero gradients.

    Attributes:
        parameters: by name; ``None`` where the steps do not come to an end.
        steps: how many were taken.
    """

    parameters: dict[str, Tensor] | None
    steps: int


def no_end(optimizer: torch.optim.Optimizer) -> Note:
    """That what momentum alone will do has no size."""
    why = "its steps do not shrink with the momentum (signs, Muon's), or need a gradient"
    if is_adam(optimizer):
        why = "its denominators shrink about as fast as its momentum (beta1^2 is about beta2, or more)"
    return NO_END(optimizer=optimizer_name(optimizer), why=why)


def _num_later(s: AdamSettings, k: float, largest: float) -> int | None:
    """How many steps with zero gradients come after step k until a parameter is at rest; ``None`` if it never is.

    By the element with the ``largest`` second moment (its running maximum with AMSGrad), which is the last to come to
    rest: its steps shrink by ``beta1 / sqrt(beta2)``, and by ``beta1`` once ``eps`` is most of its denominator.
    """

    def denominator(j: int, corrected: float) -> float:
        held = largest if s.amsgrad else s.beta2**j * largest
        return math.sqrt(held / corrected) + s.eps or 1.0

    def size(j: int) -> float:
        return s.beta1**j / (1 - s.beta1 ** (k + j)) / denominator(j, 1 - s.beta2 ** (k + j))

    now = 1 - s.beta2**k
    if (s.beta1 * denominator(0, now) / denominator(1, now)) ** PATIENCE > PERSISTENT:
        return None
    later = 0
    while size(later + 1) >= NEGLIGIBLE * size(0):
        later += 1
    return later


def lifetime_factor(parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer) -> float | None:
    """The first-order effect of the gradient over its life in the momentum, over its effect in this step.

    ``sum_j beta1^j (1 - beta1^(k+1)) / (1 - beta1^(k+1+j))``, the denominators of this step held: about
    ``1 / (1 - beta1)`` late in training.

    Args:
        parameters: what is stepped, by name.
        optimizer: Adam or AdamW.

    Returns:
        ``None`` where parameters have different factors.
    """
    settings, factors = adam_settings(optimizer, None), set[float]()
    for parameter in parameters.values():
        k, beta1 = (step_count(optimizer.state.get(parameter, {})) or 0) + 1, settings[id(parameter)].beta1
        now = 1 - beta1**k
        last = int(math.log(NEGLIGIBLE) / math.log(beta1)) if beta1 else 0
        factors.add(sum(beta1**j * now / (1 - beta1 ** (k + j)) for j in range(last + 1)))
    return factors.pop() if len(factors) == 1 else None


def coasting(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    gradient: Gradient,
    learning_rate: float | None = None,
) -> dict[str, Tensor] | None:
    """How far the moments alone will move each parameter after this step, if every later gradient is zero.

    ``sum_{j >= 1} -lr beta1^j / (1 - beta1^(k+1+j)) m+ / D_j`` with ``m+`` and ``v+`` after this step and
    ``D_j = sqrt(beta2^j v+ / (1 - beta2^(k+1+j))) + eps``. Weight decay apart; the rate stays.

    Args:
        parameters: what is stepped, by name.
        optimizer: Adam or AdamW; not changed.
        gradient: of this step, clipped; a parameter with ``None`` is not stepped.
        learning_rate: replaces the rate of every group.

    Returns:
        ``None`` where it has no end: with ``beta1^2 >= beta2`` the denominators shrink as fast as the moment, unless
        ``eps`` is much of them.
    """
    settings, moves = adam_settings(optimizer, learning_rate), {}
    for name, p in parameters.items():
        s, state, g = settings[id(p)], optimizer.state.get(p, {}), gradient[name]
        if g is None:
            moves[name] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            continue
        k, m, held = _moments_after(p, g, state, s)
        later, total = _num_later(s, k, _largest(held)), torch.zeros_like(m)
        if later is None:
            return None
        for j in range(1, later + 1):
            of_step = held if s.amsgrad else s.beta2**j * held
            denominator = (of_step / (1 - s.beta2 ** (k + j))).sqrt_().add_(s.eps)
            total += s.beta1**j / (1 - s.beta1 ** (k + j)) / denominator
        moves[name] = -s.lr * m * total
    return moves


def _largest(tensor: Tensor) -> float:
    return max(extremes(tensor)[1], 0.0)  # of one without elements, too


def _moments_after(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], s: AdamSettings
) -> tuple[float, Tensor, Tensor]:
    """The number of this step, and after it the first moment and the second, or its running maximum with AMSGrad."""
    theta = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
    g = gradient.to(theta.dtype)
    if not s.decoupled and s.weight_decay:
        g = g + s.weight_decay * theta
    m, v = (1 - s.beta1) * g, (1 - s.beta2) * g.square()
    if "exp_avg" in state:
        m += s.beta1 * state["exp_avg"].to(m)
        v += s.beta2 * state["exp_avg_sq"].to(v)
    if s.amsgrad and "max_exp_avg_sq" in state:
        v = torch.maximum(v, state["max_exp_avg_sq"].to(v))
    return (step_count(state) or 0) + 1, m, v


def coasted(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    gradient: Gradient,
    learning_rate: float | None = None,
    kept: Mapping[str, torch.dtype] | None = None,
    *,
    steps: int | None = None,
) -> Coasted:
    """Take this step and then steps with zero gradients, by the optimizer's own code on copies.

    Args:
        parameters: what is stepped, by name; not changed.
        optimizer: one that a copy can step; not changed.
        gradient: of this step, clipped; a parameter with ``None`` is not stepped.
        learning_rate: replaces the rate of every group.
        kept: the types that steps are rounded to, by parameter.
        steps: how many, with weight decay; by default without it, until they are below :data:`NEGLIGIBLE` of the
            first.
    """
    given = (parameters, optimizer, gradient, learning_rate, kept)
    if is_adam(optimizer):  # one parameter after the other, in steps whose number is known
        number = _longest(parameters, optimizer, gradient) if steps is None else steps
        if number is None:
            return Coasted(None, PATIENCE)
        stepped = shadow_step(*given, then=lambda shadow: _coast_on(shadow, number, decay=steps is not None))
        return Coasted(stepped, number)
    taken: list[int | None] = []
    stepped = copied_step(*given, then=lambda shadow: taken.append(_coast_on(shadow, steps, decay=steps is not None)))
    (number,) = taken
    return Coasted(None, PATIENCE) if number is None else Coasted(stepped, number)


def _longest(parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, gradient: Gradient) -> int | None:
    settings, longest = adam_settings(optimizer, None), 0
    for name, p in parameters.items():
        if (g := gradient[name]) is not None:
            k, _, held = _moments_after(p, g, optimizer.state.get(p, {}), settings[id(p)])
            later = _num_later(settings[id(p)], k, _largest(held))
            if later is None:
                return None
            longest = max(longest, later)
    return longest


def _coast_on(shadow: torch.optim.Optimizer, steps: int | None, *, decay: bool) -> int | None:
    """Step a copy with zero gradients: so many times, or until that ends; ``None`` where it does not."""
    moving = [p for group in shadow.param_groups for p in group["params"] if p.grad is not None]
    for p in moving:
        p.grad = torch.zeros_like(p)
    for group in shadow.param_groups if not decay else ():
        group.update({key: 0.0 for key in DECAYS if key in group})
    if steps is not None:
        for _ in range(steps):
            shadow.step()
        return steps
    taken, first, recent, length = 0, 0.0, math.inf, math.inf
    while length > NEGLIGIBLE * first:
        before = [p.detach().clone() for p in moving]
        shadow.step()
        length = sum((p.detach() - old).double().square().sum().item() for p, old in zip(moving, before, strict=True))
        length = length**0.5
        if not math.isfinite(length):  # a step that needs a gradient
            for p, old in zip(moving, before, strict=True):
                p.detach().copy_(old)
            return None
        first = first or length
        if length:
            taken += 1
        if taken % PATIENCE == 1:
            earlier, recent = recent, length
            if length > PERSISTENT * earlier:
                return None
    return taken
