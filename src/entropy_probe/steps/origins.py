"""The momentum part of a step by the steps whose gradients it comes from.

Formulas: ``docs/theory.md``, "After the step".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.named import norm
from entropy_probe.steps.adamw import Gradient, adam_settings
from entropy_probe.steps.moments import step_count

TOLERANCE = 0.02
"""Between a first moment and what all its gradients make of it, relative: what a lower precision does to it."""


def momentum_by_origin(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    gradient_scale: Mapping[str, Tensor],
    past: Sequence[Gradient],
) -> list[dict[str, Tensor]]:
    """What each of the last steps' gradients adds to the momentum part of the next step.

    The first moment is ``(1 - beta1) sum_j beta1^j g_j`` with ``g_j`` the gradient of j steps before the last one, so
    its part is ``-gradient_scale beta1^(j+1) g_j``. Of a parameter, steps without a gradient do not count.

    Args:
        parameters: what is stepped, by name.
        optimizer: Adam or AdamW.
        gradient_scale: of the step (:class:`~entropy_probe.steps.adamw.Step`).
        past: gradients as the optimizer got them, that of the last step first.
    """
    settings = adam_settings(optimizer, None)
    parts, ages = [], dict.fromkeys(parameters, 0)
    for gradient in past:
        part = {}
        for name, p in parameters.items():
            g = gradient[name]
            scale, taken = gradient_scale[name], step_count(optimizer.state.get(p, {})) or 0
            ages[name] += g is not None
            if g is None or ages[name] > taken:
                part[name] = torch.zeros_like(scale)
            else:
                part[name] = -(settings[id(p)].beta1 ** ages[name]) * scale * g
        parts.append(part)
    return parts


def check_past(parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, past: Sequence[Gradient]) -> None:
    """Make sure that a first moment with all of its gradients at hand is made of these.

    Raises:
        ValueError: if one is not.
    """
    settings = adam_settings(optimizer, None)
    for name, p in parameters.items():
        state, s = optimizer.state.get(p, {}), settings[id(p)]
        taken = step_count(state) or 0
        coupled = s.weight_decay and not s.decoupled  # then the moment has decay in it, too
        gradients = [g for gradient in past if (g := gradient[name]) is not None][: int(taken)]
        if not taken or coupled or len(gradients) < taken:
            continue
        moment = state["exp_avg"].to(torch.promote_types(p.dtype, torch.float32))
        rest = moment.clone()
        for age, g in enumerate(gradients):
            rest -= (1 - s.beta1) * s.beta1**age * g
        size = norm({name: moment})
        if norm({name: rest}) > TOLERANCE * size:
            raise ValueError(
                f"past_gradients: expected those that the optimizer's moments are of, the last step's first, as it got "
                f"them (after clipping), got others: they do not make the first moment of {name}; check the order and "
                "the step that they end with"
            )
