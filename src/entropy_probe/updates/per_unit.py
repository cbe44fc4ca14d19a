"""Gradients of token surrogates: their sum over a batch, and their share per unit, in one streaming pass.

Two paths give the same numbers. ``taps``: when everything trainable is the weight or bias of plain ``nn.Linear``
layers (LoRA), one backward pass over a microbatch of many sequences is enough, since the input and the output
gradient of a linear layer determine each sequence's weight gradient. ``per unit``: for any module, one backward pass
per unit. Only one microbatch's graph is alive at a time, and ``.grad`` is never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import Parameter

from entropy_probe.named import NamedVector
from entropy_probe.scoring.forward import Progress, Scorer
from entropy_probe.scoring.packing import Microbatch
from entropy_probe.types import Rollouts, TokenCoefficients

__all__ = ["Side", "UnitGradients", "tappable", "unit_backward", "unit_gradients"]

_BLOCK_ELEMENTS = 2**23
"""Per-sequence gradients of one layer are formed for at most this many elements at a time."""
_CACHED_ELEMENTS = 2**26
"""Directions up to this size are kept in float64 for the whole pass; larger ones are converted piece by piece."""


@dataclass(frozen=True, eq=False)
class UnitGradients:
    """The outcome of one pass over a batch.

    Attributes:
        total: the gradient of the whole surrogate by parameter name; ``None`` where it does not reach.
        dots: inner products of each unit's gradient with the given directions, ``[K, U]``, float64.
        stored: each unit's gradient, parameters laid out in order, ``[U, P]`` on the CPU; ``None`` unless asked for.
    """

    total: dict[str, Tensor | None]
    dots: Float[Tensor, "K U"]
    stored: Float[Tensor, "U P"] | None

    def dot_stored(self, direction: NamedVector) -> Float[Tensor, " U"]:
        """Inner products of the stored gradients with one more direction, in float64."""
        assert self.stored is not None
        flat = torch.cat([direction[name].reshape(-1) for name in self.total]).double().cpu()
        return torch.stack([row.double() @ flat for row in self.stored])


class _Sums:
    """Where a pass accumulates, one contribution at a time."""

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        directions: Sequence[NamedVector],
        num_units: int,
        store: bool,
    ) -> None:
        self.total: dict[str, Tensor | None] = dict.fromkeys(parameters)
        self.dots = torch.zeros(len(directions), num_units, dtype=torch.float64)
        sizes = [p.numel() for p in parameters.values()]
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self._slices = {name: slice(a, b) for name, a, b in zip(parameters, starts[:-1], starts[1:], strict=True)}
        self.stored = torch.zeros(num_units, starts[-1]) if store else None
        if store and any(p.dtype == torch.float64 for p in parameters.values()):
            self.stored = torch.zeros(num_units, starts[-1], dtype=torch.float64)
        self._directions = directions
        small = len(directions) * starts[-1] <= _CACHED_ELEMENTS
        self._cache = {name: self._stack(name) for name in parameters} if directions and small else {}

    def part(self, num_units: int) -> _Sums:
        """Empty sums for one microbatch, which :meth:`merge` adds once it is known to be complete."""
        part = copy.copy(self)
        part.total = dict.fromkeys(self.total)
        part.dots = torch.zeros(len(self._directions), num_units, dtype=torch.float64)
        part.stored = None if self.stored is None else self.stored.new_zeros(num_units, self.stored.shape[1])
        return part

    def merge(self, part: _Sums, units: Tensor) -> None:
        """Add the sums of a microbatch whose units are ``units``, distinct."""
        for name, gradient in part.total.items():
            if gradient is not None:
                self.add_total(name, gradient)
        self.dots[:, units] += part.dots
        if self.stored is not None and part.stored is not None:
            self.stored.index_add_(0, units, part.stored)

    def _stack(self, name: str) -> Tensor:
        """The directions of one parameter in float64, ``[K, p]``."""
        return torch.stack([d[name].reshape(-1).double() for d in self._directions])

    def add_total(self, name: str, gradient: Tensor) -> None:
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        seen = self.total[name]
        self.total[name] = gradient.clone() if seen is None else seen.add_(gradient)

    def add_units(self, name: str, units: Tensor, gradients: Tensor) -> None:
        """Gradients of one parameter, ``[n, ...]``, each belonging to ``units[n]``; their sum joins the total."""
        self.add_total(name, gradients.sum(0))
        flat = gradients.reshape(len(units), -1)
        if self._directions:
            along = self._cache[name] if self._cache else self._stack(name)
            self.dots.index_add_(1, units, (along @ flat.double().T).cpu())
        if self.stored is not None:
            block = flat.to("cpu", self.stored.dtype)
            for unit, row in zip(units.tolist(), block, strict=True):
                self.stored[unit, self._slices[name]] += row


@dataclass(frozen=True, eq=False)
class Side:
    """One surrogate to differentiate, and what is wanted of its gradient besides the total.

    Attributes:
        coefficients: of the surrogate ``sum_it a_it s_it + c_it h_it``.
        directions: vectors to take each unit's inner product with.
        store: keep each unit's gradient.
    """

    coefficients: TokenCoefficients
    directions: Sequence[NamedVector] = ()
    store: bool = False


def unit_gradients(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    units: Tensor,
    sides: Sequence[Side],
    *,
    taps: bool = False,
    progress: Progress | None = None,
) -> list[UnitGradients]:
    """Differentiate one or more surrogates over a batch, with one forward pass for all of them.

    Args:
        scorer: the policy.
        parameters: what to differentiate with respect to, by name.
        rollouts: the batch.
        units: the unit of each sequence, ``[N]``, numbered from 0.
        sides: the surrogates.
        taps: read per-sequence gradients off the linear layers; only if :func:`tappable` says so.
        progress: called with sequences done and in all.

    Returns:
        One outcome per side.
    """
    counts = units.bincount().tolist()
    sums = [_Sums(parameters, side.directions, len(counts), side.store) for side in sides]
    coefficients = [side.coefficients for side in sides]
    by_unit = any(side.directions or side.store for side in sides)
    done = 0

    def report(rows: Tensor) -> None:
        nonlocal done
        done += len(rows)
        if progress:
            progress(done, len(rollouts))

    if taps:
        share = _prompts_are_whole(rollouts.prompt_ids, units)

        def tapped(batch: Microbatch) -> tuple[Tensor, list[_Sums]]:
            return _tapped_backward(scorer, parameters, batch, coefficients, units, sums)

        for batch, (present, parts) in scorer.each(rollouts, tapped, share=share):
            for side, part in zip(sums, parts, strict=True):
                side.merge(part, present)
            report(batch.rows)
    elif by_unit:
        for unit, rows in enumerate(torch.split(units.argsort(stable=True), counts)):
            index = torch.tensor([unit])
            for side, gradients in zip(
                sums, unit_backward(scorer, parameters, rollouts, rows, coefficients), strict=True
            ):
                for name, gradient in gradients.items():
                    side.add_units(name, index, gradient[None])
            report(rows)
    else:
        work = partial(_backward, scorer, parameters, coefficients)
        for batch, gradients_by_side in scorer.each(rollouts, work):
            for side, gradients in zip(sums, gradients_by_side, strict=True):
                for name, gradient in gradients.items():
                    side.add_total(name, gradient)
            report(batch.rows)
    return [UnitGradients(side.total, side.dots, side.stored) for side in sums]


def _prompts_are_whole(prompt_ids: Tensor, units: Tensor) -> bool:
    """Whether no prompt's sequences are spread over several units, so that they may share a row."""
    pairs = torch.stack([prompt_ids, units], 1).unique(dim=0)
    return len(pairs) == prompt_ids.unique().numel()


def unit_backward(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    rows: Tensor,
    coefficients: Sequence[TokenCoefficients],
) -> list[dict[str, Tensor]]:
    """Gradients of each surrogate over the given rows; parameters a surrogate does not reach are left out."""
    totals: list[dict[str, Tensor]] = [{} for _ in coefficients]
    work = partial(_backward, scorer, parameters, coefficients)
    for _, gradients_by_side in scorer.each(rollouts, work, rows):
        for total, gradients in zip(totals, gradients_by_side, strict=True):
            for name, gradient in gradients.items():
                total[name] = total[name] + gradient if name in total else gradient
    return totals


def _backward(
    scorer: Scorer, parameters: Mapping[str, Parameter], coefficients: Sequence[TokenCoefficients], batch: Microbatch
) -> list[dict[str, Tensor]]:
    """One forward pass over a microbatch, then one backward pass per surrogate."""
    values, found = scorer.surrogates(batch, coefficients), []
    for k, value in enumerate(values):
        gradients = torch.autograd.grad(
            value, list(parameters.values()), allow_unused=True, retain_graph=k + 1 < len(values)
        )
        found.append({name: g for name, g in zip(parameters, gradients, strict=True) if g is not None})
    return found


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward hands the layer's input and output gradient to a consumer.

    ``anchor`` is a scalar that every tap takes as an input: asking for its gradient makes the engine visit all taps
    and nothing that they do not need, weight gradients in particular.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, layer_input: Tensor, consume: Any) -> Tensor:
        ctx.save_for_backward(layer_input)
        ctx.consume = consume
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grad_outputs
        ctx.consume(ctx.saved_tensors[0], gradient)
        return gradient, gradient.new_zeros(()), None, None


def _linear_layers(model: nn.Module, parameters: Mapping[str, Parameter]) -> dict[nn.Linear, dict[str, str]] | str:
    """The plain linear layers that hold the parameters: layer -> {"weight" or "bias": name}. Or why not."""
    names = {id(p): name for name, p in parameters.items()}
    layers: dict[nn.Linear, dict[str, str]] = {}
    seen: set[str] = set()
    for module in model.modules():
        for kind, parameter in module.named_parameters(recurse=False):
            name = names.get(id(parameter))
            if name is None:
                continue
            if type(module) is not nn.Linear:
                return f"{name} belongs to a {type(module).__name__}"
            if name in seen:
                return f"{name} is shared between layers"
            seen.add(name)
            layers.setdefault(module, {})[kind] = name
    missing = parameters.keys() - seen
    return f"{min(missing)} was not found in a layer" if missing else layers


class _UntappableError(Exception):
    """A linear layer was called on something other than ``[sequences, tokens, features]``."""


@contextmanager
def _tapped(
    model: nn.Module,
    parameters: Mapping[str, Parameter],
    anchor: Tensor,
    consume: Callable[[str, slice, Tensor], None],
    n: int,
) -> Iterator[None]:
    """Tap the linear layers during a forward pass over ``n`` rows.

    ``consume`` gets a parameter's name, a range of rows, and their gradients, during the backward pass.
    """
    layers = _linear_layers(model, parameters)
    assert not isinstance(layers, str)

    def tap(kinds: dict[str, str], args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if len(args) != 1 or args[0].dim() != 3 or args[0].shape[0] != n:
            raise _UntappableError(f"{min(kinds.values())} was not called on one [sequences, tokens, features]")

        def receive(layer_input: Tensor, gradient: Tensor) -> None:
            if "bias" in kinds:
                consume(kinds["bias"], slice(0, n), gradient.sum(1))
            if "weight" in kinds:
                size = max(1, _BLOCK_ELEMENTS // (gradient.shape[-1] * layer_input.shape[-1]))
                for start in range(0, n, size):
                    block = slice(start, min(start + size, n))
                    # [n, l, out] and [n, l, in] -> the weight gradient of each sequence, [n, out, in]
                    inputs = layer_input[block].to(gradient.dtype)
                    consume(kinds["weight"], block, torch.bmm(gradient[block].transpose(1, 2), inputs))

        return _Tap.apply(output, anchor, args[0].detach(), receive)  # pyright: ignore[reportReturnType]

    handles = [
        layer.register_forward_hook(lambda module, args, output, kinds=kinds: tap(kinds, args, cast(Tensor, output)))
        for layer, kinds in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tapped_backward(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    batch: Microbatch,
    coefficients: Sequence[TokenCoefficients],
    units: Tensor,
    sums: Sequence[_Sums],
) -> tuple[Tensor, list[_Sums]]:
    """One forward pass with taps, then one backward pass per surrogate.

    Returns:
        The units of the microbatch, and the sums over it for each surrogate, units in that order.
    """
    anchor = torch.zeros((), device=scorer.device, requires_grad=True)
    present, row_units = units[batch.leaders].unique(return_inverse=True)
    parts = [side.part(len(present)) for side in sums]
    current = 0

    def consume(name: str, block: slice, gradients: Tensor) -> None:
        parts[current].add_units(name, row_units[block], gradients)

    with _tapped(scorer.model, parameters, anchor, consume, len(batch.leaders)):
        values = scorer.surrogates(batch, coefficients)
        for current, value in enumerate(values):
            torch.autograd.grad(value, anchor, allow_unused=True, retain_graph=current + 1 < len(values))
    return present, parts


def tappable(scorer: Scorer, parameters: Mapping[str, Parameter], rollouts: Rollouts) -> str | None:
    """Why per-sequence gradients cannot be read off the linear layers, or ``None`` if they can.

    Beyond the layers' types this compares, on the two shortest sequences, the sum of per-sequence gradients with
    autograd's own: a weight that also acts outside its layer's forward pass would show there.
    """
    layers = _linear_layers(scorer.model, parameters)
    if isinstance(layers, str):
        return layers
    shortest = rollouts.attention_mask.sum(1).argsort(stable=True)[:2]
    few = rollouts.select(shortest)
    ones = few.response_mask.double()
    both = [Side(TokenCoefficients(ones, ones))]
    try:
        tapped = unit_gradients(scorer, parameters, few, torch.arange(len(few)), both, taps=True)[0].total
    except _UntappableError as error:
        return str(error)
    plain = unit_gradients(scorer, parameters, few, torch.arange(len(few)), both)[0].total
    for name, expected in plain.items():
        actual = tapped[name]
        if expected is None or actual is None:
            if expected is not actual:
                return f"{name} is reached by only one of taps and autograd"
            continue
        low = parameters[name].dtype in (torch.bfloat16, torch.float16)
        tolerance = 5e-2 if low else 1e-3 if expected.dtype == torch.float32 else 1e-6
        if bool((actual - expected).norm() > tolerance * expected.norm().clamp(min=1e-12)):
            return f"{name} also acts outside its layer"
    return None
