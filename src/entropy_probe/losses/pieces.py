"""What losses are put together from: weights, ratios, clipping, KL terms. Pure functions, float64.

A loss ``sum_it w_it l_it`` of the current log-probabilities ``s`` and entropies ``h`` has the gradient of
``sum_it a_it s_it + c_it h_it`` with constant ``a``, ``c``. *Slopes* are derivatives of a per-token loss ``l`` with
respect to the logarithm of its importance ratio, which is ``s`` minus a constant.
See ``docs/theory.md``, "The update gradient".
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entropy_probe.rollouts.batch import Rollouts

KLKind = Literal["k1", "k2", "k3"]


def by_sequence(mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """Weights of the mean over sequences of each one's mean over tokens: ``1 / (N T_i)``."""
    return mask / (len(mask) * mask.sum(1, keepdim=True, dtype=torch.float64).clamp(min=1))


def by_sequence_sum(mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """Weights of the mean over sequences of each one's sum over tokens: ``1 / N``."""
    return mask.double() / len(mask)


def by_max_length(mask: Bool[Tensor, "N L"], longest: int) -> Float[Tensor, "N L"]:
    """Weights of the mean over sequences of each one's sum over tokens by one length: ``1 / (N longest)``."""
    return mask.double() / (len(mask) * longest)


def by_token(mask: Bool[Tensor, "N L"], groups: Int[Tensor, " N"] | None = None) -> Float[Tensor, "N L"]:
    """Weights of the mean over all tokens of a mask, or of the mean over groups of each one's mean over its tokens."""
    if groups is None:
        groups = torch.zeros(len(mask), dtype=torch.long)
    return mask / (len(groups.unique()) * group_sum(mask.sum(1).double(), groups).clamp(min=1))[:, None]


def by_token_of_shares(mask: Bool[Tensor, "N L"], groups: Int[Tensor, " N"]) -> Float[Tensor, "N L"]:
    """Weights of each group's mean over its tokens, times its share of the sequences."""
    lengths = mask.sum(1).double()
    share = group_sum(torch.ones_like(lengths), groups) / len(mask)
    return mask * (share / group_sum(lengths, groups).clamp(min=1))[:, None]


def microbatches(rollouts: Rollouts) -> Int[Tensor, " N"]:
    """The microbatch of each sequence; all one where the batch does not say."""
    ids = rollouts.microbatch_ids
    return torch.zeros(len(rollouts), dtype=torch.long) if ids is None else ids


def check_microbatches(rollouts: Rollouts, gradient_accumulation_steps: int, num_processes: int) -> None:
    """Make sure that a batch has no more microbatches than a step."""
    most, ids = gradient_accumulation_steps * num_processes, rollouts.microbatch_ids
    if ids is not None and (count := ids.unique().numel()) > most:
        raise ValueError(
            f"microbatch_ids: expected at most {most} different ones in a step (gradient_accumulation_steps "
            f"{gradient_accumulation_steps}, num_processes {num_processes}), got {count}; set these to the trainer's, "
            "or give one step's rollouts"
        )


def gap(
    above: Float[Tensor, "N L"] | None, below: Float[Tensor, "N L"] | None, mask: Bool[Tensor, "N L"]
) -> Float[Tensor, "N L"]:
    """The difference of two log-probabilities at response tokens, nats, 0 elsewhere; 0 where one of them is not given.

    The logarithm of an importance ratio is the gap between the current log-probabilities and the old ones.
    """
    if above is None or below is None:
        return torch.zeros(mask.shape, dtype=torch.float64)
    return (above.double() - below.double()).masked_fill(~mask, 0.0)


ROUNDING = 1e-4
"""Nats by which two computations of a log-probability may differ."""


def is_one(log_ratio: Float[Tensor, "N L"]) -> bool:
    """Whether every importance ratio is 1, up to rounding."""
    return float(log_ratio.abs().max()) < ROUNDING


def group_sum(values: Float[Tensor, " N"], groups: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """For each sequence the sum over its group."""
    distinct, index = groups.unique(return_inverse=True)
    return torch.zeros(len(distinct), dtype=torch.float64).index_add_(0, index, values.double())[index]


def sequence_sum(values: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N 1"]:
    """Each sequence's sum over its tokens."""
    return values.masked_fill(~mask, 0.0).sum(1, keepdim=True)


def sequence_mean(values: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N 1"]:
    """Each sequence's mean over its tokens; 0 without any."""
    return sequence_sum(values, mask) / mask.sum(1, keepdim=True).clamp(min=1)


def clipped_slope(
    ratio: Float[Tensor, "N _"],
    advantages: Float[Tensor, "N L"],
    low: float,
    high: float,
    largest: float | None = None,
    dual: float | None = None,
) -> Float[Tensor, "N L"]:
    """The slope of ``-min(min(rho, largest) A, clip(rho, low, high) A)``, PPO's loss of a token.

    Schulman et al. (2017).

    Args:
        ratio: ``rho`` of each token, or one for each sequence.
        advantages: ``A`` of each token.
        low: the lower end of the clip range, such as 0.8.
        high: its upper end, such as 1.2.
        largest: bounds the ratio before the minimum is taken (TRL's ``delta``).
        dual: ``c`` of dual clipping (Ye et al., 2020): for negative advantages the loss is at most ``-c A``.
    """
    bounded = ratio if largest is None else ratio.clamp(max=largest)
    free, clipped = bounded * advantages, ratio.clamp(low, high) * advantages
    of_free = ratio * ((ratio <= largest) if largest is not None else 1.0)
    of_clipped = ratio * ((ratio >= low) & (ratio <= high))
    slope = torch.where(free < clipped, of_free, torch.where(free > clipped, of_clipped, (of_free + of_clipped) / 2))
    if dual is not None:
        slope = slope * ~((advantages < 0) & (torch.minimum(free, clipped) < dual * advantages))
    return -slope * advantages


def trust_region(
    kind: str,
    logprobs: Float[Tensor, "N L"],
    log_ratio: Float[Tensor, "N L"],
    advantages: Float[Tensor, "N L"],
    low: float,
    high: float,
) -> Bool[Tensor, "N L"]:
    """DPPO's tokens: those whose probability the advantage has not yet moved too far (Qi et al., 2026).

    Args:
        kind: how far it moved, of the token against all others: ``tv`` the difference, ``kl`` the KL divergence.
        logprobs: at the policy as it is, nats.
        log_ratio: to the policy that the distance is taken from, nats.
        advantages: of every token.
        low: how far it may fall, for advantages of at most 0.
        high: how far it may rise, for the others.
    """
    new, old = logprobs.exp(), (logprobs - log_ratio).exp()
    if kind == "tv":
        up, down = new - old <= high, new - old >= -low
    else:
        divergence = (1 - old) * ((1 - old + 1e-8) / (1 - new + 1e-8)).log() - old * log_ratio
        up, down = (divergence <= high) | (new <= old), (divergence <= low) | (new >= old)
    return torch.where(advantages > 0, up, down)


def kl_value(kind: KLKind, above_reference: Float[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """An estimate of the KL divergence to a reference at each token, nats (Schulman, 2020).

    With ``d = s - s_ref``: ``d`` (k1), ``d^2 / 2`` (k2), ``exp(-d) + d - 1`` (k3).
    """
    d = above_reference
    return {"k1": d, "k2": d.square() / 2, "k3": (-d).expm1() + d}[kind]


def kl_slope(kind: KLKind, above_reference: Float[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """The derivative of :func:`kl_value` with respect to the current log-probability: 1, ``d``, ``1 - exp(-d)``."""
    d = above_reference
    return {"k1": torch.ones_like(d), "k2": d, "k3": -(-d).expm1()}[kind]


def top_entropy_mask(
    entropies: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"], share: float, groups: Int[Tensor, " N"]
) -> Bool[Tensor, "N L"]:
    """Tokens whose entropy is at least the ``1 - share`` quantile of their group's (Wang et al., 2025)."""
    keep = torch.zeros_like(mask)
    for group in groups.unique():
        own = mask & (groups == group)[:, None]
        if bool(own.any()):
            # the quantile in float32, as trainers compute it
            keep |= own & (entropies >= torch.quantile(entropies[own].float(), 1 - share))
    return keep
