"""The sampler's own log-probabilities of its responses against the policy's, and what may be wrong with them.

Formulas: ``docs/theory.md``, "The sampler" and "Do the rollouts fit the policy".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entropy_probe.types import TokenScores

_ONE_SIGN = 1e-3
"""Nats by which rounding may put a sampler's log-probability below the policy's."""
_EXPLAINED = 0.2
"""A mistake explains a mismatch if undoing it leaves at most this share of it."""


@dataclass(frozen=True, eq=False)
class Mismatch:
    """How far the sampler's log-probabilities are from the policy's, on the sampled tokens.

    Attributes:
        mean: mean of ``|log pi - log pi_sampler|`` over tokens, nats.
        max: the largest of them.
        ess: effective sample size of the sequence weights ``pi / pi_sampler``, 1 to N.
        z: how much more likely the tokens are under the policy than under the sampler's log-probabilities; the tokens
            were not drawn with these where it is large.
        never_lower: whether no token is less likely under the sampler than under the policy.
    """

    mean: float
    max: float
    ess: float
    z: float
    never_lower: bool


def sampler_gaps(scores: TokenScores, sampled_logprobs: Float[Tensor, "N L"]) -> Float[Tensor, "6 N"]:
    """What each sequence adds to :func:`sampler_mismatch`, float64.

    With ``d_t = log pi - log pi_sampler`` in nats and ``e_t = min(exp d_t, 2) - 1``: ``sum_t d``, ``sum_t |d|``,
    ``max_t |d|``, ``sum_t e``, ``sum_t e^2``, and the number of tokens with ``d`` above rounding.

    Args:
        scores: of the policy.
        sampled_logprobs: of the sampler, at the same temperature; ignored off the response.
    """
    gap = torch.where(scores.response_mask, scores.logprobs.double() - sampled_logprobs.double(), 0.0)
    size, more = gap.abs(), gap.clamp(max=math.log(2)).exp() - 1
    lower = (gap > _ONE_SIGN).sum(1).double()
    return torch.stack([gap.sum(1), size.sum(1), size.amax(1), more.sum(1), more.square().sum(1), lower])


def squared_gaps(scores: TokenScores, logprobs: Float[Tensor, "N L"]) -> Float[Tensor, "2 N"]:
    """``sum_t (log pi - log q)^2`` and the tokens of each sequence, in nats squared, float64.

    Args:
        scores: of the policy.
        logprobs: others of the same tokens; ignored off the response.
    """
    gap = torch.where(scores.response_mask, scores.logprobs.double() - logprobs.double(), 0.0)
    return torch.stack([gap.square().sum(1), scores.response_lengths.double()])


def sampler_mismatch(gaps: Float[Tensor, "6 N"], num_tokens: int) -> Mismatch:
    """Compare the sampler's own log-probabilities of its responses with the policy's.

    ``z = sum e / sqrt(sum e^2)`` over tokens, ``e = min(pi / pi_sampler, 2) - 1``. Drawn from ``pi_sampler``,
    ``pi / pi_sampler`` has mean 1 given what came before (less if its support is smaller), so ``e`` has mean 0 or less
    and z exceeds 4 about once in 30,000 batches. If the tokens came from the policy, and the log-probabilities from
    elsewhere, the mean is positive.

    Args:
        gaps: of every sequence, from :func:`sampler_gaps`.
        num_tokens: response tokens of the batch.
    """
    log_weights, size, largest, more, squares, lower = gaps
    weights = (log_weights - log_weights.max()).exp()
    return Mismatch(
        (size.sum() / num_tokens).item(),
        largest.max().item(),
        (weights.sum().square() / weights.square().sum()).item(),
        (more.sum() / squares.sum().clamp(min=torch.finfo(torch.float64).tiny).sqrt()).item(),
        bool(lower.sum() == 0),
    )


def adapter_sums(
    scores: TokenScores, base: TokenScores, sampled_logprobs: Float[Tensor, "N L"]
) -> Float[Tensor, "2 N"]:
    """What each sequence adds to :func:`adapter_share`, float64: ``sum_t a^2`` and ``sum_t a g``.

    ``a`` is what the adapter adds to a token's log-probability, ``g = log pi_sampler - log pi``, in nats.

    Args:
        scores: of the policy.
        base: of the policy without its adapter.
        sampled_logprobs: of the sampler; ignored off the response.
    """
    mask, s = scores.response_mask, scores.logprobs.double()
    adds = torch.where(mask, s - base.logprobs.double(), 0.0)
    gap = torch.where(mask, sampled_logprobs.double() - s, 0.0)
    return torch.stack([adds.square().sum(1), (adds * gap).sum(1)])


def adapter_share(sums: Float[Tensor, "2 N"]) -> tuple[float, float]:
    """How much of what the adapter adds the sampler had, and how many errors that is away from all of it.

    The slope of the sampler's log-probabilities along the adapter's part: 1 for the policy itself, however it rounds,
    since rounding knows nothing of the adapter; 0 for the base model; 2 for twice the adapter. The error takes
    sequences as independent.

    Args:
        sums: of every sequence, from :func:`adapter_sums`.
    """
    squares, products = sums
    least = torch.finfo(torch.float64).tiny
    slope = products.sum() / squares.sum().clamp(min=least)
    error = (products - slope * squares).norm() / squares.sum().clamp(min=least)
    return 1 + slope.item(), (slope / error.clamp(min=least)).item()


MISTAKES = (
    "all 0, as where none were recorded",
    "the same number at every token of a response: a sum or mean over the sequence, not one per token",
    "running sums over the response, not one per token",
    "shifted by one token: each is that of the token before it",
    "shifted by one token: each is that of the token after it",
    "of the wrong sign",
    "in base 10, not in nats",
    "in base 2, not in nats",
    "probabilities, not their logarithms",
)
"""What log-probabilities are where recording them went wrong in a known way."""
_MOVED = slice(1, 3)
"""Those of them that spread a response over its tokens."""


def mistake_sums(scores: TokenScores, sampled_logprobs: Float[Tensor, "N L"]) -> Float[Tensor, "k N"]:
    """What each sequence adds to the test for each of :data:`MISTAKES`, float64.

    In three blocks of as many rows: the sum over tokens of how far the sampler's numbers are from what the policy's
    log-probabilities would be after the mistake, the same for the numbers as they are, and the number of tokens that
    tell. A shift leaves out a response's first or last token.

    Args:
        scores: of the policy.
        sampled_logprobs: of the sampler; ignored off the response.
    """
    mask = scores.response_mask
    s = torch.where(mask, scores.logprobs.double(), 0.0)
    q = torch.where(mask, sampled_logprobs.double(), 0.0)
    lengths = mask.sum(1, keepdim=True)
    several = mask & (lengths > 1)
    mean = q.sum(1, keepdim=True) / lengths.clamp(min=1)
    later = mask & (mask.cumsum(1) > 1)
    earlier = mask & (mask.flip(1).cumsum(1).flip(1) > 1)
    before, after = _neighbours(s, mask)
    made: list[tuple[Tensor, Tensor]] = [
        (torch.zeros_like(s), mask),
        (mean.expand_as(s), several),
        (s.cumsum(1), several),
        (before, later),
        (after, earlier),
        (-s, mask),
        (s / math.log(10), mask),
        (s / math.log(2), mask),
        (s.exp(), mask),
    ]
    return torch.cat([torch.stack(block) for block in zip(*(_distances(q, s, *each) for each in made), strict=True)])


def _neighbours(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The value at the response token before and after each one, 0 where there is none."""
    before, after = torch.zeros_like(values), torch.zeros_like(values)
    rows, columns = mask.nonzero(as_tuple=True)
    same = rows[1:] == rows[:-1]
    one, next_one = (rows[:-1][same], columns[:-1][same]), (rows[1:][same], columns[1:][same])
    before[next_one], after[one] = values[one], values[next_one]
    return before, after


def _distances(q: Tensor, s: Tensor, mistaken: Tensor, telling: Bool[Tensor, "N L"]) -> tuple[Tensor, Tensor, Tensor]:
    return ((q - mistaken).abs() * telling).sum(1), ((q - s).abs() * telling).sum(1), telling.sum(1).double()


def recorded_amiss(sums: Float[Tensor, "k N"], mismatch: Mismatch) -> str | None:
    """The mistake that explains a mismatch: undone, at most a fifth of it is left; ``None`` if none does.

    Sums and means move log-probabilities between the tokens of a response, which makes these tokens less likely on
    average than under the policy; numbers that make them likelier are a sampler's (a uniform one's are all equal, say).

    Args:
        sums: of every sequence, from :func:`mistake_sums`.
        mismatch: as it is.
    """
    undone, as_is, tokens = sums.sum(1).view(3, len(MISTAKES))
    left = undone / tokens.clamp(min=1)
    fits = (undone <= _EXPLAINED * as_is) & (left <= _EXPLAINED * mismatch.mean) & (tokens > 0)
    fits[0] &= bool(undone[0] == 0)  # log-probabilities near 0 are far from those of any tokens that the policy rejects
    if mismatch.z <= 0:
        fits[_MOVED] = False
    best = int(torch.where(fits, left, torch.inf).argmin())
    return MISTAKES[best] if bool(fits[best]) else None
