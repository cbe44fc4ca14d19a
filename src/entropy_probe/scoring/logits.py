"""Log-probabilities and exact next-token entropies from logits, or from hidden states in chunks of tokens.

The chunked functions never hold more than one chunk of ``[tokens, V]``. Logits are divided by the temperature, which
is part of the policy. A masked vocabulary entry (logit ``-inf``) has probability 0 and adds nothing to the entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

# Below the largest logit by this much the probability is exactly 0 in float64, and 0 * floor is 0 where 0 * inf is not.
_FLOOR = -1e4
_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_OFF_CPU = 2**22, 2**26
"""A chunk of logits that stays in a processor's cache; and one with enough tokens to keep an accelerator busy."""


class FlatScores(NamedTuple):
    """What the policy makes of tokens, ``[T]`` each, without a graph.

    Attributes:
        logprobs: ``s``, nats.
        entropies: ``h``, nats.
        variances: of the surprisal ``-log p`` of a token drawn at the same place, ``sum_v p_v (log p_v)^2 - h^2``, nats
            squared.
        discriminants: the mean of ``p (log p + h)`` over tokens drawn at the same place, ``sum_v p_v^2 (log p_v + h)``,
            nats.
    """

    logprobs: Float[Tensor, " T"]
    entropies: Float[Tensor, " T"]
    variances: Float[Tensor, " T"]
    discriminants: Float[Tensor, " T"]

    @classmethod
    def joined(cls, chunks: Iterable[FlatScores]) -> FlatScores:
        """Those of consecutive tokens."""
        return cls(*(torch.cat(column) for column in zip(*chunks, strict=True)))


@dataclass(frozen=True, eq=False)
class OutputHead:
    """The final linear layer and the temperature of the policy ``softmax((hidden W^T + bias) / temperature)``.

    Attributes:
        weight: ``[V, D]``.
        bias: ``[V]`` or ``None``.
        temperature: the sampling temperature.
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None
    temperature: float

    def chunk_tokens(self) -> int:
        """Tokens per chunk: logits of around 16 MiB in float32, 256 MiB off the CPU (at least 64 tokens)."""
        return _chunk_tokens(self.weight)

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        """Tempered logits in at least float32, as a new tensor."""
        z = torch.nn.functional.linear(hidden, self.weight, self.bias)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return z if self.temperature == 1.0 else z.div_(self.temperature)


def _chunk_tokens(by_vocabulary: Tensor) -> int:
    elements = _CHUNK_ELEMENTS if by_vocabulary.device.type == "cpu" else _CHUNK_ELEMENTS_OFF_CPU
    return max(64, elements // by_vocabulary.shape[0])


def logit_scores(
    logits: Float[Tensor, "T V"], targets: Int[Tensor, " T"], temperature: float
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """Log-probabilities of the targets and entropies, in nats, differentiable, from whole logits."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_p = torch.log_softmax(z, -1)
    logprobs = log_p.gather(-1, targets[:, None])[:, 0]
    log_p = log_p.clamp(min=_FLOOR)
    return logprobs, -(log_p.exp() * log_p).sum(-1)


@dataclass(eq=False)
class _Chunk:
    """Softmax quantities of one chunk: ``z`` shifted logits, ``e = exp(z)``, their sum, and the scores."""

    rows: slice
    z: Tensor
    e: Tensor
    total: Tensor
    logprobs: Tensor
    entropies: Tensor

    def scores(self) -> FlatScores:
        """With what takes one more sweep over the vocabulary."""
        # log p = z - log total: the constant changes no variance
        mean = self.total.log() - self.entropies
        weighted = self.e * self.z
        variances = (torch.linalg.vecdot(weighted, self.z) / self.total - mean.square()).clamp_(min=0)
        squares, products = (torch.linalg.vecdot(self.e, x) for x in (self.e, weighted))
        return FlatScores(self.logprobs, self.entropies, variances, (products - mean * squares) / self.total.square())


def _chunks(head: OutputHead, hidden: Tensor, targets: Tensor) -> Iterator[_Chunk]:
    return _softmax(head.logits, head.chunk_tokens(), hidden, targets)


def _softmax(logits: Callable[[Tensor], Tensor], size: int, inputs: Tensor, targets: Tensor) -> Iterator[_Chunk]:
    """Chunks of ``size`` tokens; ``logits`` makes tempered ones, as a new tensor, of a piece of the inputs."""
    for start in range(0, max(1, inputs.shape[0]), size):
        rows = slice(start, min(start + size, inputs.shape[0]))
        z = logits(inputs[rows])
        z.sub_(z.max(-1, keepdim=True).values)
        target_logits = z.gather(-1, targets[rows, None])[:, 0]
        e = z.clamp_(min=_FLOOR).exp()
        total = e.sum(-1)
        log_total = total.log()
        logprobs = target_logits - log_total
        entropies = log_total - torch.linalg.vecdot(e, z) / total
        yield _Chunk(rows, z, e, total, logprobs, entropies)


@torch.no_grad()
def head_scores(head: OutputHead, hidden: Float[Tensor, "T D"], targets: Int[Tensor, " T"]) -> FlatScores:
    """Scores of the targets from hidden states."""
    return FlatScores.joined(chunk.scores() for chunk in _chunks(head, hidden, targets))


@torch.no_grad()
def plain_scores(logits: Float[Tensor, "T V"], targets: Int[Tensor, " T"], temperature: float) -> FlatScores:
    """Scores of the targets from whole logits."""

    def tempered(piece: Tensor) -> Tensor:
        return piece.to(torch.promote_types(piece.dtype, torch.float32), copy=True).div_(temperature)

    return FlatScores.joined(c.scores() for c in _softmax(tempered, _chunk_tokens(logits.T), logits, targets))


@torch.no_grad()
def head_slopes(
    head: OutputHead, hidden: Float[Tensor, "T D"], targets: Int[Tensor, " T"]
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"], Float[Tensor, " T"], Float[Tensor, " T"]]:
    """Log-probabilities, entropies, and the derivatives of both along the tangents, inside a level of forward mode.

    ``d s / d z = onehot - p`` and ``d h / d z = -p (log p + h)``, so with ``d z`` the tangent of the logits the
    derivative of ``s`` is ``d z_target - sum_v p_v d z_v``, and that of ``h`` is ``-sum_v p_v (log p_v + h) d z_v``.

    Args:
        head: the output layer; its parameters carry tangents where they are moved.
        hidden: final hidden states at the positions that predict the targets, with their tangent.
        targets: token ids.
    """
    (h, d_h), (weight, d_weight) = unpack_dual(hidden), unpack_dual(head.weight)
    bias, d_bias = (None, None) if head.bias is None else unpack_dual(head.bias)
    per_chunk = []
    for chunk in _chunks(OutputHead(weight, bias, head.temperature), h, targets):
        rows = chunk.rows
        d_z = torch.zeros((), dtype=h.dtype, device=h.device) if d_bias is None else d_bias
        if d_h is not None:
            d_z = d_z + torch.nn.functional.linear(d_h[rows], weight)
        if d_weight is not None:
            d_z = d_z + torch.nn.functional.linear(h[rows], d_weight)
        d_z = d_z.to(chunk.e.dtype).expand_as(chunk.e) / head.temperature
        at_target = d_z.gather(-1, targets[rows, None])[:, 0]
        mean, weighted = (torch.linalg.vecdot(x, d_z) / chunk.total for x in (chunk.e, chunk.e * chunk.z))
        of_entropies = (chunk.total.log() - chunk.entropies) * mean - weighted  # with log p = z - log total
        per_chunk.append((chunk.logprobs, chunk.entropies, at_target - mean, of_entropies))
    logprobs, entropies, of_logprobs, of_entropies = (torch.cat(column) for column in zip(*per_chunk, strict=True))
    return logprobs, entropies, of_logprobs, of_entropies


@dataclass(frozen=True, eq=False)
class HeadBasis:
    """Scores of tokens and their derivatives in the hidden states, from one sweep over the vocabulary.

    Every surrogate's gradient is a combination of these, as long as the output layer is not trained.

    Attributes:
        scores: of the targets.
        of_logprobs: ``d s_t / d hidden_t``, ``[T, D]``.
        of_entropies: ``d h_t / d hidden_t``, ``[T, D]``.
    """

    scores: FlatScores
    of_logprobs: Float[Tensor, "T D"]
    of_entropies: Float[Tensor, "T D"]

    @classmethod
    @torch.no_grad()
    def of(cls, head: OutputHead, hidden: Float[Tensor, "T D"], targets: Int[Tensor, " T"]) -> HeadBasis:
        """``(W_y - sum_v p_v W_v) / temperature`` and ``-sum_v p_v (log p_v + h) W_v / temperature``."""
        scores, of_logprobs, of_entropies = [], torch.empty_like(hidden), torch.empty_like(hidden)
        for chunk in _chunks(head, hidden, targets):
            scores.append(chunk.scores())  # before the chunk's memory is used for its derivatives
            log_p_and_h = chunk.z.sub_((chunk.total.log() - chunk.entropies)[:, None])
            p = chunk.e.div_(chunk.total[:, None])
            mean = p.to(hidden.dtype) @ head.weight
            of_logprobs[chunk.rows] = (head.weight[targets[chunk.rows]] - mean) / head.temperature
            of_entropies[chunk.rows] = log_p_and_h.mul_(p).to(hidden.dtype) @ head.weight / -head.temperature
        return cls(FlatScores.joined(scores), of_logprobs, of_entropies)

    def surrogate(
        self, hidden: Float[Tensor, "T D"], a: Float[Tensor, " T"], c: Float[Tensor, " T"] | None
    ) -> Float[Tensor, ""]:
        """:func:`head_surrogate` on the graph of the hidden states, in float64."""
        value = torch.dot(a.double(), self.scores.logprobs.double())
        gradient = a.to(hidden.dtype)[:, None] * self.of_logprobs
        if c is not None:
            value += torch.dot(c.double(), self.scores.entropies.double())
            gradient += c.to(hidden.dtype)[:, None] * self.of_entropies
        along = (hidden * gradient).sum()
        return value + (along - along.detach())


class _HeadSurrogate(torch.autograd.Function):
    """``sum_t a_t s_t + c_t h_t`` with its gradient taken in the same sweep over the vocabulary.

    ``d s / d z = onehot - p`` and ``d h / d z = -p (log p + h)``, so one chunk of logits serves value and gradient
    and the backward pass is free. Constant coefficients ``a`` and ``c`` get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, a: Tensor, c: Tensor | None,
        temperature: float, consume: Callable[[slice, Tensor, Tensor], None] | None,
        scores: Callable[[FlatScores], None] | None,
    ) -> Tensor:  # fmt: skip
        head = OutputHead(weight, bias, temperature)
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if needs_weight else None
        d_bias = torch.zeros_like(bias) if needs_bias and bias is not None else None
        value = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for chunk in _chunks(head, hidden, targets):
            rows, d_z = chunk.rows, chunk.z
            if scores is not None:  # before the chunk's memory is used for its derivatives
                scores(chunk.scores())
            a_rows = a[rows].to(d_z.dtype)
            value += torch.dot(a[rows].double(), chunk.logprobs.double())
            if c is None:
                d_z = chunk.e.mul_((-a_rows / chunk.total)[:, None])
            else:
                c_rows = c[rows].to(d_z.dtype)
                value += torch.dot(c[rows].double(), chunk.entropies.double())
                # d_z = p * (-a - c (log p + h)), with log p = z - log total
                d_z.mul_(-c_rows[:, None]).add_((c_rows * (chunk.total.log() - chunk.entropies) - a_rows)[:, None])
                d_z.mul_(chunk.e).div_(chunk.total[:, None])
            d_z.scatter_add_(-1, targets[rows, None], a_rows[:, None])
            d_z = d_z.div_(temperature).to(hidden.dtype)
            d_hidden[rows] = d_z @ weight
            if d_weight is not None:
                d_weight.addmm_(d_z.T, hidden[rows])
            if d_bias is not None:
                d_bias += d_z.sum(0)
            if consume is not None:
                consume(rows, d_z, hidden[rows])
        ctx.gradients = d_hidden, d_weight, d_bias
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad_outputs[0]
        scaled = [None if g is None else g * factor.to(g.dtype) for g in ctx.gradients]
        return (*scaled, None, None, None, None, None, None)


def head_surrogate(
    head: OutputHead,
    hidden: Float[Tensor, "T D"],
    targets: Int[Tensor, " T"],
    logprob_coefficients: Float[Tensor, " T"],
    entropy_coefficients: Float[Tensor, " T"] | None,
    consume: Callable[[slice, Tensor, Tensor], None] | None = None,
    scores: Callable[[FlatScores], None] | None = None,
) -> Float[Tensor, ""]:
    """The scalar ``sum_t a_t s_t + c_t h_t``, differentiable once in ``hidden`` and the head's parameters.

    Args:
        head: the output layer.
        hidden: final hidden states at the positions that predict the targets.
        targets: token ids.
        logprob_coefficients: ``a``, constants.
        entropy_coefficients: ``c``, constants; ``None`` for none, which skips the entropies' share of the work.
        consume: called for each chunk of tokens with the scalar's derivatives in ``hidden W^T + bias``, ``[t, V]``,
            and the hidden states, ``[t, D]``; the head's parameters then count as constants.
        scores: called for each chunk of tokens, in order, with their scores.

    Returns:
        A float64 scalar.
    """
    weight, bias = head.weight, head.bias
    if consume is not None:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return _HeadSurrogate.apply(
        hidden, weight, bias, targets, logprob_coefficients, entropy_coefficients, head.temperature, consume, scores
    )  # pyright: ignore[reportReturnType]
