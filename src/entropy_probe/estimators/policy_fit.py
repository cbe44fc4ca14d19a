"""Whether sampled tokens are the policy's own: surprisal minus entropy has mean zero on policy, and only there.

Formulas: ``docs/theory.md``, "Do the rollouts fit the policy". Source: Delyon, 2009 (self-normalised martingales).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.types import TokenScores

MAX_Z = 4.0
"""The policy's own rollouts exceed it about once in 16,000 batches."""
_ROUNDING = 1e-5
"""Nats by which a token's surprisal and entropy may be off, all in one direction."""


@dataclass(frozen=True, eq=False)
class Fit:
    """How well a batch fits the policy.

    Attributes:
        z: the sum of surprisal minus entropy over its own error; about standard normal on policy.
        excess: mean of surprisal minus entropy, nats per token.
        num_sequences: sequences of the batch with response tokens.
    """

    z: float
    excess: float
    num_sequences: int

    @property
    def holds(self) -> bool:
        """Whether the batch may well be the policy's."""
        return abs(self.z) <= MAX_Z


def excess_sums(scores: TokenScores) -> Float[Tensor, "4 N"]:
    """``sum_t x_t``, ``sum_t x_t^2``, ``sum_t v_t`` and tokens of each sequence, with ``x_t = -s_t - h_t``, float64.

    ``v_t`` is the variance of a drawn token's surprisal given what came before it.

    Args:
        scores: of the policy, with their variances.
    """
    assert scores.variances is not None
    x = -scores.logprobs.double() - scores.entropies.double()
    return torch.stack(
        [x.sum(1), x.square().sum(1), scores.variances.double().sum(1), scores.response_lengths.double()]
    )


def policy_fit(sums: Float[Tensor, "4 N"], log_weights: Float[Tensor, " N"] | None = None) -> Fit:
    """The z statistic of surprisal minus entropy.

    ``z = sum x / sqrt(sum x^2 / 3 + 2 sum v / 3 + (1e-5 T)^2)``, sums over all tokens of the batch and ``T`` of them.
    Tokens drawn from the policy make ``x_t`` a martingale difference with variance ``v_t``, whatever the lengths and
    prompts, so both parts of the denominator estimate the variance of the numerator and z is standard normal in large
    batches. In small ones, or where a few surprising tokens carry the sum, the mixture still bounds the tail:
    ``P(sum x >= z sqrt(V), denominator^2 <= V) <= exp(-z^2 / 2)``. Either part alone does not: a batch without a
    rare token has next to no spread of its own, and one with a few has more than was predicted. The last term is
    rounding, which matters where the policy is all but deterministic. Unbiased and free of nuisance parameters. It
    assumes that responses were kept whatever they turned out to be: choosing them by reward or length moves the mean.

    A reweighted batch: ``sum v_i x_i / sqrt(sum (v_i x_i)^2)`` with ``x_i`` summed over a sequence and ``v_i`` its
    weight, which has mean zero if the weights are the right ones.

    Args:
        sums: of every sequence, from :func:`excess_sums`.
        log_weights: of what each sequence counts; ``None`` where all count the same.
    """
    x, squares, variances, tokens = sums.double()
    count = tokens.sum()
    if log_weights is None:
        error = squares.sum() / 3 + 2 * variances.sum() / 3
    else:
        x = x * log_weights.double().exp()
        error = x.square().sum()
    excess = x.sum() / count.clamp(min=1)
    z = x.sum() / (error + (_ROUNDING * count.clamp(min=1)).square()).sqrt()
    return Fit(z.item(), excess.item(), int((tokens > 0).sum()))
