"""What each sequence of a microbatch adds to the gradient of a layer's parameters.

A rule turns one call of a layer and the gradient of its output into contributions per row. Linear layers, embeddings
and norms have a formula; any other layer is called again on each cluster's rows and differentiated on its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from entropy_probe.scoring.isolation import substituted

_BLOCK_ELEMENTS = 2**23
"""Per-sequence gradients of one layer are formed for at most this many elements at a time."""


class Sink(ABC):
    """Where gradients go, one contribution at a time."""

    @abstractmethod
    def add_clusters(self, name: str, clusters: Tensor, gradients: Tensor) -> None:
        """Gradients of one parameter, ``[n, ...]``, each belonging to ``clusters[n]``."""

    @abstractmethod
    def add_lookups(self, name: str, clusters: Tensor, ids: Tensor, gradients: Tensor) -> None:
        """Gradients of rows ``ids[n, t]`` of an embedding, ``[n, t, D]``, each belonging to ``clusters[n]``."""


class UnhookableError(RuntimeError):
    """A layer was called in a way that does not show which sequence is which, or depends on more than its inputs."""

    def __init__(self, layer: nn.Module, why: str) -> None:
        super().__init__(f"a {type(layer).__name__} {why}, unlike when two sequences were tried; please report this")
        self.layer, self.why = layer, why


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer on a microbatch.

    Attributes:
        layer: the layer.
        names: attribute of the layer -> parameter name.
        args: positional arguments, without a graph.
        kwargs: keyword arguments, likewise.
        output: what it returned, likewise; kept for :func:`call_again` only.
    """

    layer: nn.Module
    names: Mapping[str, str]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor | None


Rule = Callable[[Call, Tensor, Tensor, Sink], None]
"""What each row adds to a layer's parameters: from a call, the gradient of its output, and the rows' clusters."""


def linear(call: Call, gradient: Tensor, clusters: Tensor, sink: Sink) -> None:
    """``sum_t delta_t x_t^T`` and ``sum_t delta_t``; Goodfellow (2015)."""
    n = len(clusters)
    gradient = gradient.reshape(n, -1, gradient.shape[-1])
    if "bias" in call.names:
        sink.add_clusters(call.names["bias"], clusters, gradient.sum(1))
    if "weight" in call.names:
        inputs = call.args[0].reshape(n, -1, call.args[0].shape[-1])
        size = max(1, _BLOCK_ELEMENTS // (gradient.shape[-1] * inputs.shape[-1]))
        for block in (slice(start, start + size) for start in range(0, n, size)):
            # [n, l, out] and [n, l, in] -> the weight gradient of each row, [n, out, in]
            product = torch.bmm(gradient[block].transpose(1, 2), inputs[block].to(gradient.dtype))
            sink.add_clusters(call.names["weight"], clusters[block], product)


def embedding(call: Call, gradient: Tensor, clusters: Tensor, sink: Sink) -> None:
    """``sum_t delta_t`` over the positions that look up a row; the padding row gets none."""
    n, ids = len(clusters), call.args[0]
    padding = cast(nn.Embedding, call.layer).padding_idx
    if padding is not None:
        gradient = gradient.masked_fill((ids == padding)[..., None], 0)
    sink.add_lookups(call.names["weight"], clusters, ids.reshape(n, -1), gradient.reshape(n, -1, gradient.shape[-1]))


def norm(call: Call, gradient: Tensor, clusters: Tensor, sink: Sink) -> None:
    """``sum_t delta_t * x_hat_t`` and ``sum_t delta_t``, for ``w * x_hat + b``, or ``(1 + w) * x_hat``, per element."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    own = dict(call.layer.named_parameters(recurse=False))
    rows = (len(clusters), -1, *own["weight"].shape)
    gradient = gradient.to(wide)
    if "bias" in call.names:
        sink.add_clusters(call.names["bias"], clusters, gradient.reshape(rows).sum(1))
    if "weight" in call.names:
        at = []
        for value in (1.0, 0.0):
            filled = {kind: torch.full_like(p, value if kind == "weight" else 0.0) for kind, p in own.items()}
            with substituted(call.layer, own, filled):
                at.append(call.layer(*call.args))
        sink.add_clusters(call.names["weight"], clusters, (gradient * (at[0] - at[1]).to(wide)).reshape(rows).sum(1))


def call_again(call: Call, gradient: Tensor, clusters: Tensor, sink: Sink) -> None:
    """Any layer that treats sequences independently: called again on each cluster's rows, and differentiated."""
    parameters = [call.layer.get_parameter(kind) for kind in call.names]
    n = len(clusters)
    for unit in clusters.unique():
        rows = (clusters == unit).nonzero()[:, 0].to(gradient.device)
        args, kwargs = (in_tensors(partial(_select, n, rows), given) for given in (call.args, call.kwargs))
        try:
            with torch.enable_grad():
                output = call.layer(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, LookupError) as error:  # states of its last call are of other rows
            raise UnhookableError(call.layer, "cannot be called again on one of its sequences") from error
        assert call.output is not None
        first = call.output[rows]
        if output.shape != first.shape or bool(
            (output.detach() - first).norm() > tolerance(first.dtype) * first.norm()
        ):
            raise UnhookableError(call.layer, "depends on more than one sequence")
        gradients = torch.autograd.grad(output, parameters, gradient[rows], allow_unused=True)
        for name, g in zip(call.names.values(), gradients, strict=True):
            if g is not None:
                sink.add_clusters(name, unit[None], g[None])


def _select(n: int, rows: Tensor, value: Tensor) -> Tensor:
    """Some rows of a tensor that has ``n`` of them."""
    return value[rows] if value.dim() and value.shape[0] == n else value


def in_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same arguments with every tensor in them changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: in_tensors(change, x) for key, x in value.items()}
    return type(value)(in_tensors(change, x) for x in value) if type(value) in (tuple, list) else value


def tolerance(dtype: torch.dtype) -> float:
    """The relative difference that two orders of summation may leave."""
    return 5e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-3 if dtype == torch.float32 else 1e-6


def rule_for(layer: nn.Module, kinds: Collection[str]) -> Rule:
    """How to read the gradients of a layer's parameters, given the attributes that hold them."""
    if not {*kinds} <= {"weight", "bias"}:
        return call_again
    if type(layer) is nn.Linear:
        return linear
    if type(layer) is nn.Embedding and layer.max_norm is None and not layer.scale_grad_by_freq:
        return embedding
    if "weight" in layer._parameters and (isinstance(layer, nn.LayerNorm) or type(layer).__name__.endswith("RMSNorm")):
        return norm
    return call_again
