"""How fast each response token's log-probability and entropy change along one direction in parameter space.

Forward mode carries the derivative along with the value and keeps nothing for a backward pass. Where a model has an
operation without a forward-mode rule, or with a wrong one, reverse mode takes over: the gradient of
``sum_t u_t s_t + w_t h_t`` is linear in ``u`` and ``w``, so differentiating its inner product with the direction once
more, in these, gives all slopes of a microbatch (double backward; Griewank and Walther, Evaluating Derivatives, 2008,
chapter 3), and two backward passes per token always work.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel

from entropy_probe.named import NamedVector, dot, gradient_of
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.forward import Progress, Scorer
from entropy_probe.scoring.isolation import lookups_masked, substituted
from entropy_probe.scoring.packing import Microbatch
from entropy_probe.types import TokenCoefficients, TokenScores

_FlatSlopes = tuple[Tensor, Tensor, Tensor, Tensor]
"""Log-probabilities and entropies of a microbatch, and the slopes of both, ``[T]`` each."""
Method = Callable[[Scorer, Mapping[str, Parameter], NamedVector, Microbatch], _FlatSlopes]

NUM_TRIED = 2
ATTENTION_ELEMENTS = 2**27
"""Largest attention matrix of a microbatch, all heads; forward mode holds several of that size in one layer."""


@dataclass(frozen=True, eq=False)
class TokenSlopes:
    """Slopes along a direction, beside the scores they belong to.

    Attributes:
        slopes: derivatives of log-probabilities and entropies along the direction, nats, 0 off the response.
        scores: log-probabilities and entropies, from the same pass.
        method: ``forward-mode``, or ``reverse-mode (WHY)`` with why not forward mode.
    """

    slopes: TokenScores
    scores: TokenScores
    method: str


def _forward(
    scorer: Scorer, parameters: Mapping[str, Parameter], direction: NamedVector, batch: Microbatch
) -> _FlatSlopes:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        moved = {name: forward_ad.make_dual(p.detach(), direction[name].to(p.dtype)) for name, p in parameters.items()}
        with substituted(scorer.model, parameters, moved), lookups_masked(scorer.model):
            return scorer.token_slopes(batch)


def _double_backward(
    scorer: Scorer, parameters: Mapping[str, Parameter], direction: NamedVector, batch: Microbatch
) -> _FlatSlopes:
    with sdpa_kernel(SDPBackend.MATH):
        s, h = scorer.token_scores(batch)
        uw = tuple(torch.ones_like(x, requires_grad=True) for x in (s, h))
        gradients = torch.autograd.grad((s, h), list(parameters.values()), uw, create_graph=True, allow_unused=True)
        products = [
            (g * direction[name].to(g.dtype)).sum()
            for name, g in zip(parameters, gradients, strict=True)
            if g is not None
        ]
        slopes = torch.autograd.grad(torch.stack(products).sum(), uw) if products else map(torch.zeros_like, uw)
        of_logprobs, of_entropies = slopes
    return s.detach(), h.detach(), of_logprobs, of_entropies


def _token_by_token(
    scorer: Scorer, parameters: Mapping[str, Parameter], direction: NamedVector, batch: Microbatch
) -> _FlatSlopes:
    s, h = scorer.token_scores(batch)
    of_logprobs, of_entropies = (
        torch.tensor([sum(_slope_terms(value, parameters, direction)) for value in x], dtype=x.dtype, device=x.device)
        for x in (s, h)
    )
    return s.detach(), h.detach(), of_logprobs, of_entropies


def _slope_terms(value: Tensor, parameters: Mapping[str, Parameter], direction: NamedVector) -> list[float]:
    """The inner product of a scalar's gradient with the direction by parameter, by one backward pass."""
    gradient = gradient_of(value, parameters, again=True)
    return [dot({name: g}, {name: direction[name]}) for name, g in gradient.items()]


@dataclass(frozen=True, eq=False)
class SlopeMethod:
    """A way to get slopes that is right for a policy and a batch.

    Attributes:
        name: ``forward-mode``, or ``reverse-mode (WHY)`` with why not forward mode.
        method: what computes them.
        scorer: prepared for the batch.
        narrow: the same with microbatches that the method has room for.
        parameters: what directions move, by name.
    """

    name: str
    method: Method
    scorer: Scorer
    narrow: Scorer
    parameters: Mapping[str, Parameter]

    def along(self, direction: NamedVector, rollouts: Rollouts, progress: Progress | None = None) -> TokenSlopes:
        """The slopes of sequences of the batch along a direction.

        Raises:
            ValueError: if a slope is not finite.
        """
        wide = torch.promote_types(next(self.scorer.model.parameters()).dtype, torch.float32)
        columns = [torch.zeros(rollouts.input_ids.shape, dtype=wide) for _ in range(4)]
        work = partial(self.method, self.narrow, self.parameters, direction)
        for batch, values in self.narrow.each(rollouts, work, progress=progress):
            for flat, into in zip(values, columns, strict=True):
                batch.scatter(flat, into)
        self.scorer.notes = self.narrow.notes
        bad = ~(torch.isfinite(columns[2]) & torch.isfinite(columns[3])).all(1)
        if bool(bad.any()):
            raise ValueError(
                f"attribution: expected finite slopes, got others in {int(bad.sum())} sequences (first index "
                f"{int(bad.nonzero()[0])}); look for non-finite weights or second moments"
            )
        scores, slopes = (TokenScores(s, h, rollouts.response_mask) for s, h in (columns[:2], columns[2:]))
        return TokenSlopes(slopes, scores, self.name)


def slope_method(
    scorer: Scorer, rollouts: Rollouts, parameters: Mapping[str, Parameter], direction: NamedVector, tolerance: float
) -> SlopeMethod:
    """The first way to the slopes of every response token at ``theta`` that is right along a direction.

    As training's gradients do, slopes leave out the lookups of a row ``padding_idx``. In forward mode the cost is about
    two forward passes. A method is used only if, on two sequences of middling length, it reproduces what one backward
    pass says of each.

    Args:
        scorer: prepared for the batch.
        rollouts: the batch.
        parameters: what directions move, by name.
        direction: with the same names.
        tolerance: how far a method may be off there, relative to what single parameters add to a slope. A wrong rule is
            off by percents.
    """
    narrow, reasons = _narrowed(scorer, rollouts), []
    for method, without in ((_forward, "no forward mode"), (_double_backward, "no double backward")):
        why = _why_not(method, narrow, rollouts, parameters, direction, tolerance)
        if why is None:
            name = f"reverse-mode ({reasons[0]})" if reasons else "forward-mode"
            return SlopeMethod(name, method, scorer, narrow, parameters)
        reasons.append(f"{without}: {why}")
    name = f"reverse-mode (one pass per token; {'; '.join(reasons)})"
    return SlopeMethod(name, _token_by_token, scorer, narrow, parameters)


def _narrowed(scorer: Scorer, rollouts: Rollouts) -> Scorer:
    """The scorer with microbatches small enough for attention that keeps whole matrices."""
    heads = getattr(getattr(scorer.model, "config", None), "num_attention_heads", None) or 1
    elements = ATTENTION_ELEMENTS // heads
    longest = int(rollouts.attention_mask.sum(1).max())
    # rows of one sequence are at most that long; rows with a shared prompt may fill the microbatch
    most = math.isqrt(elements) if scorer.prefix_sharing == "on" else elements // longest
    narrow = copy.copy(scorer)
    narrow.max_tokens = min(scorer.max_tokens, max(most, longest))
    return narrow


def _why_not(
    method: Method,
    scorer: Scorer,
    rollouts: Rollouts,
    parameters: Mapping[str, Parameter],
    direction: NamedVector,
    tolerance: float,
) -> str | None:
    """Why a method cannot be used; ``None`` if it can.

    Tried on two sequences against one backward pass for each, because an operation without a rule raises an error but
    one with a wrong rule does not. Tokens have different weights, so that their errors do not cancel.
    """
    shape, generator = rollouts.input_ids.shape, torch.Generator().manual_seed(0)
    weights = TokenCoefficients(*torch.rand(2, *shape, generator=generator, dtype=torch.float64))
    by_length = rollouts.shortest_first
    middle = max(0, len(by_length) // 2 - 1)
    for row in by_length[middle : middle + NUM_TRIED]:
        try:
            ((batch, (_, _, *slopes)),) = scorer.each(
                rollouts, partial(method, scorer, parameters, direction), row[None]
            )
        except RuntimeError as error:  # what torch raises for an operation without a rule
            return " ".join(re.split(r"\.\s", str(error))[0].rstrip(".").split())
        of_both = zip((weights.logprobs, weights.entropies), slopes, strict=True)
        slope = sum(torch.dot(batch.gather(w), x.double()).item() for w, x in of_both if w is not None)
        (value,) = scorer.surrogates(batch, [weights])
        terms = torch.tensor(_slope_terms(value, parameters, direction), dtype=torch.float64)
        error, size = abs(slope - terms.sum().item()), terms.abs().sum().item()
        if not error <= tolerance * size + torch.finfo(torch.float32).tiny:
            return f"its slopes are off by {error / (size or 1.0):.2g} on a sequence"
    return None
