"""Scores with their first and second derivative along a direction in parameter space, by nested forward mode.

Forward mode carries derivatives along with the values, so nothing is kept for a backward pass. Source: Griewank and
Walther, Evaluating Derivatives, 2008, chapter 13 (Taylor coefficients).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from entropy_probe.named import NamedVector
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.forward import Progress, Scorer
from entropy_probe.scoring.isolation import substituted
from entropy_probe.scoring.packing import Microbatch
from entropy_probe.types import TokenScores


class _TwiceDifferentiable(TorchFunctionMode):
    """Writes out operations whose second derivative torch's forward mode lacks (silu) or gets wrong (layer_norm)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.silu:
            return args[0] * torch.sigmoid(args[0])
        if func is torch.nn.functional.layer_norm:
            return _layer_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    scaled = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    scaled = scaled if weight is None else scaled * weight
    return scaled if bias is None else scaled + bias


class _Line:
    """The scores of one microbatch along ``theta + eta v``."""

    def __init__(
        self, scorer: Scorer, batch: Microbatch, parameters: Mapping[str, Parameter], direction: NamedVector
    ) -> None:
        self.scorer, self.batch, self.parameters, self.direction = scorer, batch, parameters, direction
        self.one = torch.ones((), dtype=torch.float64, device=scorer.device)

    def _at(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        moved = {
            name: p.detach() + eta.to(p.dtype) * self.direction[name].to(p.dtype) for name, p in self.parameters.items()
        }
        with substituted(self.scorer.model, self.parameters, moved):
            return self.scorer.token_scores(self.batch)

    def _slope_at(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(self._at, (eta,), (self.one,))[1]

    def slope(self, eta: float) -> tuple[Tensor, Tensor]:
        """First derivatives of ``s`` and ``h`` at a point of the line."""
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _TwiceDifferentiable():
            return self._slope_at(eta * self.one)

    def derivatives(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """First and second derivatives of ``s`` and ``h`` at 0."""
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _TwiceDifferentiable():
            derivatives = jvp(self._slope_at, (0 * self.one,), (self.one,))
        return derivatives[0], derivatives[1]


def why_not_forward_mode(
    scorer: Scorer, rollouts: Rollouts, parameters: Mapping[str, Parameter], direction: NamedVector
) -> str | None:
    """Why a model cannot be differentiated twice in forward mode; ``None`` if it can.

    Tried on a few short sequences: the second derivative has to match differences of first derivatives, because an
    operation without a rule raises an error but one with a wrong rule does not.
    """
    if scorer.sharded:
        return "its parameters are sharded"
    shortest = rollouts.shortest_first[:NUM_TRIED]
    batch = next(scorer.microbatches(rollouts, shortest, share=False))
    line = _Line(scorer, batch, parameters, direction)
    try:
        first, second = (torch.cat(pair).double() for pair in line.derivatives())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what torch raises for an operation without a forward-mode rule
        return " ".join(str(error).split(". ")[0].rstrip(".").split())
    if not float(second.norm()) > 0:
        return None if bool((second == 0).all()) else "its second derivative is not finite"
    eta = 0.05 * float(first.norm() / second.norm())
    at = {k: torch.cat(line.slope(k * eta)).double() for k in (-2, -1, 1, 2)}
    difference = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * eta)
    error = float((difference - second).norm() / second.norm())
    return None if error < MAX_ERROR else f"its second derivative is off by {error:.2g} of a finite difference"


NUM_TRIED = 4
MAX_ERROR = 0.01
"""In float32 the difference is good to about a thousandth; torch's rule for layer_norm was off by 3% and more."""


def directional_derivatives(
    scorer: Scorer,
    rollouts: Rollouts,
    parameters: Mapping[str, Parameter],
    direction: NamedVector,
    progress: Progress | None = None,
) -> tuple[TokenScores, TokenScores]:
    """First and second derivatives at ``eta = 0`` of the scores at ``theta + eta v``, token by token.

    Responses never share a prompt here, and attention takes torch's plain path, which has forward-mode rules.

    Returns:
        Derivatives of log-probabilities and entropies in the caller's layout, ``[N, L]``, nats per (squared) unit of
        ``eta``, 0 off the response.

    Raises:
        ValueError: if a derivative is not finite.
        RuntimeError: if the model has an operation without a forward-mode rule; see :func:`why_not_forward_mode`.
    """
    wide = torch.promote_types(next(scorer.model.parameters()).dtype, torch.float32)
    orders = [[torch.zeros(rollouts.input_ids.shape, dtype=wide) for _ in range(2)] for _ in range(2)]

    def work(batch: Microbatch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return _Line(scorer, batch, parameters, direction).derivatives()

    for batch, derivatives in scorer.each(rollouts, work, share=False, progress=progress):
        for order, pair in zip(orders, derivatives, strict=True):
            for into, values in zip(order, pair, strict=True):
                batch.scatter(values, into)
    if not all(bool(torch.isfinite(values).all()) for order in orders for values in order):
        raise ValueError(
            "directional derivatives: expected finite numbers, got others; look for non-finite weights or second "
            "moments, or leave out the direct curvature"
        )
    first, second = (TokenScores(s, h, rollouts.response_mask) for s, h in orders)
    return first, second
