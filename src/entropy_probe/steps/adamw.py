"""The Adam and AdamW step: its three additive parts, and the same step taken by the real kernel.

Formulas: ``docs/theory.md``, "The step". Source of the update rule: Kingma and Ba, 2015 (Adam); Loshchilov and
Hutter, 2019 (AdamW); Reddi et al., 2018 (AMSGrad).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.named import add, norm
from entropy_probe.parallel.shards import count
from entropy_probe.steps.moments import step_count

Gradient = Mapping[str, Tensor | None]
"""Gradients by parameter name; ``None`` where the loss does not reach the parameter, which the optimizer then skips."""


def is_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step is the one this module has in closed form: exactly ``torch.optim.Adam`` or ``AdamW``."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)


def check_adam(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose step this module does not reproduce.

    Raises:
        ValueError: unless it is exactly ``torch.optim.Adam`` or ``AdamW``, minimising, with valid hyperparameters.
    """
    kind = type(optimizer)
    if not is_adam(optimizer):
        raise ValueError(f"optimizer: expected torch.optim.AdamW or Adam, got {kind.__module__}.{kind.__qualname__}")
    for index, group in enumerate(optimizer.param_groups):
        missing = [name for name in ("lr", "betas", "eps", "weight_decay", "amsgrad") if name not in group]
        if missing:
            raise ValueError(
                f"optimizer group {index}: expected settings of {kind.__name__}, got no {', '.join(missing)}; build "
                "the group with add_param_group"
            )
        if len(group["betas"]) != 2:
            raise ValueError(f"optimizer group {index}: expected two betas, got {group['betas']}")
        beta1, beta2 = map(float, group["betas"])
        if group.get("maximize"):
            raise ValueError(f"optimizer group {index}: expected maximize=False, got True; the loss is minimised")
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"optimizer group {index}: expected betas in [0, 1), got {group['betas']}")
        for name, what in (("lr", "learning rate"), ("eps", "eps"), ("weight_decay", "weight decay")):
            value = group[name]
            if isinstance(value, str | bool) or not 0 <= float(value) < float("inf"):
                raise ValueError(f"optimizer group {index}: expected a finite {what} >= 0, got {value!r:.60}")


def optimizer_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Parameter]:
    """The parameters the optimizer steps, by their name in the model, in the model's order.

    A tied parameter appears once, under its first name. Parameters that do not require a gradient are left out,
    as the optimizer never sees a gradient for them.

    Raises:
        ValueError: if the optimizer holds a tensor that is not a parameter of the model, or nothing trainable.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    strangers = held - {id(p) for p in named.values()}
    if strangers:
        raise ValueError(
            f"optimizer: {len(strangers)} of its {len(held)} tensors are not parameters of the model; "
            "build it from this model's parameters"
        )
    mine = {name: p for name, p in named.items() if id(p) in held and p.requires_grad}
    if not mine:
        raise ValueError("optimizer: expected at least one trainable parameter of the model, got none")
    return mine


@dataclass(frozen=True)
class AdamSettings:
    """The hyperparameters of one parameter's own group."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    amsgrad: bool


def adam_settings(optimizer: torch.optim.Optimizer, learning_rate: float | None) -> dict[int, AdamSettings]:
    """The hyperparameters of every parameter, by identity; ``learning_rate`` replaces the rate of every group."""
    out: dict[int, AdamSettings] = {}
    is_adamw = isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        settings = AdamSettings(
            lr=float(group["lr"]) if learning_rate is None else learning_rate,
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=bool(group.get("decoupled_weight_decay", is_adamw)),
            amsgrad=bool(group["amsgrad"]),
        )
        out.update({id(p): settings for p in group["params"]})
    return out


def learning_rates(optimizer: torch.optim.Optimizer, override: float | None = None) -> tuple[float, ...]:
    """The learning rate of each parameter group, or the override for all of them.

    Raises:
        ValueError: if every rate is 0, as after a finished schedule.
    """
    rates = tuple(float(g["lr"]) if override is None else override for g in optimizer.param_groups)
    if not any(rates):
        raise ValueError(
            "learning rate: expected a positive value, got 0 in every optimizer group (a finished linear schedule "
            "stores 0); set probe.learning_rate (in Python ProbeConfig.learning_rate) to the rate to probe"
        )
    return rates


@dataclass(frozen=True)
class ClippedGradient:
    """A loss gradient after clipping by its norm.

    Attributes:
        values: the clipped gradient by parameter name.
        norm: the norm before clipping, over all parameters.
        factor: what clipping multiplied the gradient by; 1 when it did not act.
    """

    values: dict[str, Tensor | None]
    norm: float
    factor: float


def clip_gradient(gradient: Gradient, max_norm: float | None) -> ClippedGradient:
    """Scale a gradient to ``min(1, max_norm / (norm + 1e-6))`` of itself, as trainers do.

    Args:
        gradient: gradients by parameter name.
        max_norm: the largest norm allowed; ``None`` for no clipping.

    Raises:
        ValueError: if the gradient is not finite.
    """
    total = norm({name: g for name, g in gradient.items() if g is not None})
    if not total < float("inf"):
        raise ValueError(
            f"update gradient: expected a finite norm, got {total}; look for non-finite weights, advantages or logits"
        )
    factor = 1.0 if max_norm is None else min(1.0, max_norm / (total + 1e-6))
    values = {name: g if g is None or factor == 1.0 else g * factor for name, g in gradient.items()}
    return ClippedGradient(values=values, norm=total, factor=factor)


@dataclass(frozen=True)
class Step:
    """One optimizer step ``delta = gradient + momentum + weight_decay``, by parameter name.

    Attributes:
        components: the three parts, each a vector over all parameters.
        gradient_scale: the factor ``-d delta / d g`` of the clipped gradient with the denominator held fixed,
            so that ``components["gradient"] = -gradient_scale * g`` element by element.
    """

    components: dict[str, dict[str, Tensor]]
    gradient_scale: dict[str, Tensor]

    @property
    def delta(self) -> dict[str, Tensor]:
        """The whole parameter change."""
        return add(*self.components.values())


def adamw_step(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    gradient: Gradient,
    learning_rate: float | None = None,
) -> Step:
    """The next step in closed form, split into fresh gradient, momentum and weight decay.

    With the moments ``m``, ``v`` and step count ``k`` of each parameter and the hyperparameters of its own group::

        D = sqrt((beta2 v + (1 - beta2) g^2) / (1 - beta2^(k+1))) + eps
        gradient     = -lr (1 - beta1) / (1 - beta1^(k+1)) g / D
        momentum     = -lr      beta1  / (1 - beta1^(k+1)) m / D
        weight_decay = -lr lambda theta

    For ``torch.optim.Adam``, whose weight decay is added to the gradient, ``g + lambda theta`` stands in ``D`` and
    weight decay is ``-lr (1 - beta1) / (1 - beta1^(k+1)) lambda theta / D``. With AMSGrad the running maximum of the
    second moment stands in ``D``. A parameter without state is at ``k = 0`` with zero moments.

    Args:
        parameters: the parameters by name, as of :func:`optimizer_parameters`.
        optimizer: holds the moments; it is not changed.
        gradient: the clipped loss gradient with the same names; ``None`` means no step for that parameter.
        learning_rate: replaces the rate of every group.

    Raises:
        ValueError: if names differ, or the optimizer is not supported.
    """
    check_adam(optimizer)
    if parameters.keys() != gradient.keys():
        raise ValueError(f"gradient: expected {len(parameters)} parameter names, got {len(gradient)} that differ")
    settings = adam_settings(optimizer, learning_rate)
    parts: dict[str, dict[str, Tensor]] = {"gradient": {}, "momentum": {}, "weight_decay": {}}
    scales: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        g = gradient[name]
        theta = parameter.detach()
        if g is None:
            zero = torch.zeros_like(theta, dtype=torch.promote_types(theta.dtype, torch.float32))
            values = [zero] * 4
        else:
            values = _parameter_step(name, theta, g, optimizer.state.get(parameter, {}), settings[id(parameter)])
        parts["gradient"][name], parts["momentum"][name], parts["weight_decay"][name], scales[name] = values
    return Step(components=parts, gradient_scale=scales)


def _parameter_step(name: str, theta: Tensor, g: Tensor, state: Mapping[str, Any], s: AdamSettings) -> list[Tensor]:
    """Gradient, momentum and weight-decay parts of a parameter's step and the gradient's scale, in at least float32."""
    taken = step_count(state)
    if taken is None:
        raise ValueError(f"optimizer state: expected a step count beside the moments of {name}, got none")
    k = taken + 1
    wide = torch.promote_types(theta.dtype, torch.float32)
    theta, g = theta.to(wide), g.to(wide)
    total = g if s.decoupled or s.weight_decay == 0 else g + s.weight_decay * theta
    v = (1 - s.beta2) * total.square()
    if "exp_avg_sq" in state:
        v += s.beta2 * state["exp_avg_sq"].to(wide)
    if s.amsgrad and "max_exp_avg_sq" in state:
        v = torch.maximum(v, state["max_exp_avg_sq"])
    denominator = (v / (1 - s.beta2**k)).sqrt_().add_(s.eps)
    if count(~torch.isfinite(denominator)):
        raise ValueError(
            f"update gradient: expected squares within range, got an overflow in {name}; check the advantages"
        )
    scale = s.lr * (1 - s.beta1) / (1 - s.beta1**k) / denominator
    if "exp_avg" in state:
        momentum = state["exp_avg"] / denominator * (-s.lr * s.beta1 / (1 - s.beta1**k))
    else:
        momentum = torch.zeros_like(theta)
    decay = theta * (-s.lr * s.weight_decay) if s.decoupled else scale * theta * -s.weight_decay
    return [-scale * g, momentum, decay, scale]


def shadow_step(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    gradient: Gradient,
    learning_rate: float | None = None,
    kept: Mapping[str, torch.dtype] | None = None,
    then: Callable[[torch.optim.Optimizer], object] | None = None,
) -> dict[str, Tensor]:
    """The parameters after a real step of the optimizer's own kernel, taken on copies.

    One parameter at a time: a fresh optimizer of the same class and flags steps a clone that carries a clone of
    the state, so neither hooks and scheduler patches on the live optimizer nor its memory are involved.

    Beside what :func:`adamw_step` takes, ``kept`` has the type in which training keeps a parameter, its moments and its
    gradient, by name; for all others the step is taken in the widest of theirs. ``then`` is called with the optimizer
    of each copy after its step, to take more.

    Returns:
        The stepped values by name, in the parameters' types, as new tensors. The model and the optimizer are not
        touched.

    Raises:
        ValueError: as :func:`adamw_step`.
    """
    check_adam(optimizer)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    stepped: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        g, state = gradient[name], optimizer.state.get(parameter, {})
        if g is None:
            stepped[name] = parameter.detach().clone()
            continue
        moments = [x for key, x in state.items() if key != "step" and isinstance(x, Tensor)]
        widest = functools.reduce(torch.promote_types, (x.dtype for x in moments), parameter.dtype)
        dtype = (kept or {}).get(name, widest)
        clone = parameter.detach().to(dtype, copy=True)
        group = {key: value for key, value in groups[id(parameter)].items() if key != "params"}
        group["capturable"] = False  # a flag for graph capture; the arithmetic is the same
        group["lr"] = float(group["lr"]) if learning_rate is None else learning_rate
        clone.grad = g.to(dtype)
        kind = torch.optim.AdamW if isinstance(optimizer, torch.optim.AdamW) else torch.optim.Adam
        shadow = kind([{**group, "params": [clone]}])
        if state:
            shadow.state[clone] = {
                key: value.to(value.dtype if key == "step" else dtype, copy=True)
                if isinstance(value, Tensor)
                else value
                for key, value in state.items()
            }
        shadow.step()
        if then is not None:
            then(shadow)
        clone.grad = None
        stepped[name] = clone.to(parameter.dtype)
    return stepped
