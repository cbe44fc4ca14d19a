"""Per-sequence gradients read off layers during a backward pass over many sequences.

What a layer was called on and the gradient of its output determine what each sequence adds to the gradient of the
layer's parameters. Linear layers, embeddings and norms have a formula for it; the output layer, which the scorer
applies itself, has its own; any other layer is called again on each cluster's sequences and differentiated on its own
(*by autograd*). :func:`hookable` tries all this on two sequences and says what holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from entropy_probe.gradients.layers import (
    Call,
    Rule,
    Sink,
    UnhookableError,
    call_again,
    in_tensors,
    linear,
    rule_for,
    tolerance,
)
from entropy_probe.named import add_to, gradient_of
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.isolation import hooked_parameters, of_this_thread
from entropy_probe.scoring.packing import Microbatch
from entropy_probe.scoring.sheet import ScoreSheet
from entropy_probe.types import TokenCoefficients


@dataclass(frozen=True, eq=False)
class Hooks:
    """How the gradients of all trained parameters are read off layers; ``str()`` of it is one line for the user.

    Attributes:
        layers: each layer that holds trained parameters, with its rule and {attribute: parameter name}.
        head: {attribute: parameter name} of the output layer, if the scorer applies it itself and it is trained.
    """

    layers: Mapping[nn.Module, tuple[Rule, Mapping[str, str]]]
    head: Mapping[str, str]

    def __str__(self) -> str:
        rules = [rule for rule, _ in self.layers.values()]
        again = sorted(name for rule, names in self.layers.values() if rule is call_again for name in names.values())
        if again:
            more = f" and {len(again) - 3} more" if len(again) > 3 else ""
            return f"hooks; by autograd: {', '.join(again[:3])}{more}"
        return "linear-layer hooks" if all(rule is linear for rule in rules) and not self.head else "hooks"


class _Hook(torch.autograd.Function):
    """The identity on a layer's output; its backward hands the gradient of that output to a consumer.

    ``anchor`` is a scalar that every hook takes as an input: asking for its gradient makes the engine visit all hooks
    and nothing that they do not need, weight gradients in particular.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, call: Call, consume: Any) -> Tensor:
        # saved for their version counters: backward fails if a layer's input was changed in place in between
        ctx.save_for_backward(*(x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)))
        ctx.call, ctx.consume = call, consume
        # the same memory, but no view, which what follows could not change in place
        return output.new_empty(0).set_(output)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grad_outputs
        assert ctx.saved_tensors is not None
        ctx.consume(ctx.call, gradient)
        return gradient, gradient.new_zeros(()), None, None


class _Hooked:
    """Taps on the layers of a model, for one microbatch of ``n`` rows."""

    def __init__(self, hooks: Hooks, anchor: Tensor, clusters: Tensor, sinks: Sequence[Sink]) -> None:
        self.hooks, self.anchor, self.clusters, self.sinks = hooks, anchor, clusters, sinks
        self.current = 0
        self.reading = False

    def attached(self) -> ExitStack:
        stack = ExitStack()
        for layer in self.hooks.layers:
            stack.enter_context(layer.register_forward_hook(of_this_thread(self._hook), with_kwargs=True))
        return stack

    def _hook(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        if self.reading:  # a rule calls its layer again
            return None
        rule, names = self.hooks.layers[layer]
        n = len(self.clusters)
        if not isinstance(output, Tensor) or output.dim() < 3 or output.shape[0] != n:
            raise UnhookableError(layer, "was not called on [sequences, tokens, features]")
        if rule is not call_again and (len(args) != 1 or kwargs or args[0].shape[:2] != output.shape[:2]):
            raise UnhookableError(layer, "was not called on one [sequences, tokens, features]")
        args, kwargs = (in_tensors(lambda x: x.detach(), given) for given in (args, kwargs))
        call = Call(layer, names, args, kwargs, output.detach().clone() if rule is call_again else None)
        return _Hook.apply(output, self.anchor, call, self._read)  # pyright: ignore[reportReturnType]

    def _read(self, call: Call, gradient: Tensor) -> None:
        self.reading = True
        try:
            self.hooks.layers[call.layer][0](call, gradient, self.clusters, self.sinks[self.current])
        finally:
            self.reading = False


class _HeadShares:
    """What each row of a microbatch adds to the output layer, from the scorer's chunks of tokens.

    Tokens come row by row; one row's gradient, ``[V, D]``, is held at a time.
    """

    def __init__(self, names: Mapping[str, str], batch: Microbatch, clusters: Tensor, sinks: Sequence[Sink]) -> None:
        self.names, self.clusters, self.sinks = names, clusters, sinks
        self.row_of_token = (batch.source // batch.input_ids.shape[1]).tolist()
        self.held: dict[str, Tensor] = {}

    def __call__(self, side: int, tokens: slice, d_logits: Tensor, hidden: Tensor) -> None:
        """Take a chunk: derivatives in the untempered logits, ``[T, V]``, and hidden states, ``[T, D]``."""
        rows = torch.tensor(self.row_of_token[tokens])
        values, counts = rows.unique_consecutive(return_counts=True)
        end = tokens.start
        for row, d, h in zip(
            values.tolist(), d_logits.split(counts.tolist()), hidden.split(counts.tolist()), strict=True
        ):
            end += len(d)
            if "weight" in self.names:
                held = self.held.get("weight")
                self.held["weight"] = d.T @ h if held is None else held.addmm_(d.T, h)
            if "bias" in self.names:
                self.held["bias"] = self.held.get("bias", 0) + d.sum(0)
            if end == len(self.row_of_token) or self.row_of_token[end] != row:
                for kind, gradient in self.held.items():
                    self.sinks[side].add_clusters(self.names[kind], self.clusters[row : row + 1], gradient[None])
                self.held = {}


def hooked_backward(
    scorer: Scorer,
    hooks: Hooks,
    batch: Microbatch,
    coefficients: Sequence[TokenCoefficients],
    clusters: Tensor,
    sinks: Sequence[Sink],
    sheet: ScoreSheet | None = None,
) -> None:
    """One forward pass with hooks, then one backward pass per surrogate.

    Each row of the microbatch belongs to one of the ``clusters``, ``[rows]``. The gradients of each surrogate go to its
    sink, the scores of the tokens to the sheet.
    """
    anchor = torch.zeros((), device=scorer.device, requires_grad=True)
    hooked = _Hooked(hooks, anchor, clusters, sinks)
    head = _HeadShares(hooks.head, batch, clusters, sinks) if hooks.head else None
    with hooked.attached():
        values = scorer.surrogates(batch, coefficients, head, sheet)
        for hooked.current, value in enumerate(values):
            if value.requires_grad:
                last = hooked.current + 1 == len(values)
                torch.autograd.grad(value, anchor, allow_unused=True, retain_graph=not last)


class _Weighted(Sink):
    """The sum of contributions, each times its unit's weight."""

    def __init__(self, parameters: Mapping[str, Parameter], weights: Tensor) -> None:
        self.parameters, self.weights = parameters, weights
        self.total: dict[str, Tensor] = {}

    def _to(self, name: str, like: Tensor) -> Tensor:
        if name not in self.total:
            wide = torch.promote_types(like.dtype, torch.float32)
            self.total[name] = torch.zeros(self.parameters[name].shape, dtype=wide, device=like.device)
        return self.total[name]

    def add_clusters(self, name: str, clusters: Tensor, gradients: Tensor) -> None:
        out = self._to(name, gradients)
        out += torch.tensordot(self.weights[clusters].to(out), gradients.to(out), 1)

    def add_lookups(self, name: str, clusters: Tensor, ids: Tensor, gradients: Tensor) -> None:
        out = self._to(name, gradients)
        weighted = self.weights[clusters].to(out)[:, None, None] * gradients.to(out)
        out.index_add_(0, ids.flatten(), weighted.flatten(0, 1))


def hookable(scorer: Scorer, parameters: Mapping[str, Parameter], rollouts: Rollouts) -> Hooks | str:
    """How per-sequence gradients of the parameters can be read off layers, or why they cannot.

    On the shortest and the longest sequence, the hooked gradients of both, weighted differently, are compared with
    autograd's own: a gradient given to the wrong sequence, or a weight that also acts outside its layer's forward pass,
    would show there. A layer that fails with its formula is called again in place of it, one that fails then is a
    reason.
    """
    if hooked := hooked_parameters(parameters):
        return f"{hooked[0]} has a gradient hook" + (f"; {len(hooked) - 1} more" if hooked[1:] else "")
    layers = _layers(scorer.model, parameters)
    head = {} if scorer.head is None else _layers(scorer.head, parameters).get(scorer.head, {})
    rules = {layer: rule_for(layer, kinds) for layer, kinds in layers.items()}
    by_length = rollouts.shortest_first
    few = rollouts.select(by_length[[0, -1]] if len(by_length) > 1 else by_length)
    expected = _autograd(scorer, parameters, few)
    while True:
        hooks = Hooks({layer: (rules[layer], names) for layer, names in layers.items()}, head)
        try:
            actual = _hooked_sum(scorer, parameters, hooks, few)
        except UnhookableError as error:
            why = f"belongs to {type(error.layer).__name__}, which {error.why}"
            failed = dict.fromkeys(layers[error.layer].values(), why)
            to_blame = {error.layer}
        else:
            failed = dict.fromkeys(_wrong(scorer, parameters, actual, expected), "also acts outside its layer")
            to_blame = {layer for layer, names in layers.items() if failed.keys() & names.values()}
        if not failed:
            return hooks
        formulas = [layer for layer in to_blame if rules[layer] is not call_again]
        if not formulas:
            return f"{min(failed)} {failed[min(failed)]}" + (f"; {len(failed) - 1} more" if len(failed) > 1 else "")
        rules.update(dict.fromkeys(formulas, call_again))


_WEIGHTS = torch.tensor([1.0, -0.5], dtype=torch.float64)
"""Powers of two, by which a backward pass in low precision scales its gradients without rounding."""


def _hooked_sum(scorer: Scorer, parameters: Mapping[str, Parameter], hooks: Hooks, few: Rollouts) -> dict[str, Tensor]:
    """The weighted gradient as read off the layers."""
    ones = few.response_mask.double()

    def work(batch: Microbatch) -> dict[str, Tensor]:
        sink = _Weighted(parameters, _WEIGHTS)
        hooked_backward(scorer, hooks, batch, [TokenCoefficients(ones, ones)], batch.leaders, [sink])
        return sink.total

    return _sum(scorer, few, work)


def _autograd(scorer: Scorer, parameters: Mapping[str, Parameter], few: Rollouts) -> dict[str, Tensor]:
    """The weighted gradient by autograd; parameters that it does not reach are left out."""
    weighted = _WEIGHTS[: len(few), None] * few.response_mask

    def work(batch: Microbatch) -> dict[str, Tensor]:
        (value,) = scorer.surrogates(batch, [TokenCoefficients(weighted, weighted)])
        return gradient_of(value, parameters)

    return _sum(scorer, few, work)


def _sum(scorer: Scorer, few: Rollouts, work: Callable[[Microbatch], dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for _, gradient in scorer.each(few, work, share=False):
        add_to(total, gradient)
    return total


def _wrong(
    scorer: Scorer, parameters: Mapping[str, Parameter], actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> list[str]:
    """Parameters whose two gradients differ by more than rounding explains, that of autocast included."""
    device = scorer.device.type
    least = tolerance(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else 0.0
    largest = max((float(g.norm()) for g in expected.values()), default=0.0)
    wrong = []
    for name, p in parameters.items():
        a, b = actual.get(name), expected.get(name)
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        slack = max(least, tolerance(p.dtype))
        # gradients that vanish but for rounding agree to no digit
        if not bool((a - b).norm() <= slack * max(float(b.norm()), 1e-4 * largest)):
            wrong.append(name)
    return wrong


def _layers(model: nn.Module, parameters: Mapping[str, Parameter]) -> dict[nn.Module, dict[str, str]]:
    """Every module that holds trained parameters: {attribute: parameter name}; shared ones appear in each."""
    names = {id(p): name for name, p in parameters.items()}
    held = {
        module: {kind: names[id(p)] for kind, p in module.named_parameters(recurse=False) if id(p) in names}
        for module in model.modules()
    }
    return {module: kinds for module, kinds in held.items() if kinds}
