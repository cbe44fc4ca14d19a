"""Entropy, its gradient as token coefficients, and the first-order change along a step.

Formulas: ``docs/theory.md``, "Entropy", "The entropy gradient" and "The first-order change".
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.estimators.baselines import (
    EntropyKind,
    PositionSums,
    leave_one_out_mean,
    position_baseline,
    strictly_after,
)
from entropy_probe.estimators.uncertainty import Sampled, Units, UnitSums, ratio
from entropy_probe.types import TokenCoefficients, TokenScores

__all__ = [
    "Normalization",
    "entropy",
    "entropy_coefficients",
    "first_order",
    "sequence_entropies",
    "sequence_weights",
    "update_standard_error",
]

Normalization = Literal["token", "sequence"]


def sequence_weights(scores: TokenScores, normalization: Normalization) -> Float[Tensor, " N"]:
    """What each sequence adds to the denominator: its response tokens, or 1 per response, times its weight."""
    return scores.weights * (scores.response_lengths if normalization == "token" else scores.answered)


def sequence_entropies(scores: TokenScores, kind: EntropyKind) -> Float[Tensor, " N"]:
    """``sum_t h_t`` or ``-S`` per sequence, nats: two unbiased estimates of the same expectation."""
    return scores.entropies.sum(1, dtype=torch.float64) if kind == "rao_blackwell" else -scores.sequence_logprobs


def entropy(
    scores: TokenScores,
    units: Units,
    normalization: Normalization = "token",
    kind: EntropyKind = "rao_blackwell",
) -> UnitSums:
    """H in nats per token, ``E[sum_t h_t] / E[T]`` (a ratio of means), or per sequence, ``E[sum_t h_t]``."""
    numerator = scores.weights * sequence_entropies(scores, kind)
    return UnitSums.of(units, numerator, sequence_weights(scores, normalization))


def entropy_coefficients(
    scores: TokenScores,
    prompt_ids: Int[Tensor, " N"],
    units: Units,
    batch: PositionSums,
    normalization: Normalization = "token",
    kind: EntropyKind = "rao_blackwell",
    draws: Units | None = None,
) -> TokenCoefficients:
    """Coefficients of the entropy-gradient surrogate, before division by the tokens or sequences of the batch.

    Rao-Blackwell: ``h_it + (R_it - b_it) s_it`` with ``R_it`` the entropy still to come after token t (minus the
    batch's entropy per token for each of those tokens, under per-token normalisation) and ``b_it`` its mean at
    position t over the other units. Surprisal: ``-(S_i - mean of the others) s_it``, with the same correction for
    length under per-token normalisation. Coefficients are constants: differentiating them too gives another,
    wrong gradient (about twice the right one for surprisal). All of it is times the sequence's weight.

    Args:
        scores: of all or some sequences of a batch, whole units and prompts.
        prompt_ids: their prompts.
        units: their units.
        batch: sums over the whole batch.
        normalization: per token or per sequence.
        kind: how the entropy of a sequence is estimated.
        draws: which of these sequences were sampled together, whole; by default each by itself.

    Returns:
        Float64 coefficients, 0 off the response.
    """
    mask, reaching, weights = scores.response_mask, batch.reaching, scores.weights
    per_token = batch.per_token(kind) if normalization == "token" else 0.0
    sums = batch.of_kind(kind) - per_token * reaching
    if kind == "surprisal":
        surprisal = -scores.sequence_logprobs - per_token * scores.response_lengths.double()
        counted = weights * scores.answered
        others = leave_one_out_mean(surprisal, prompt_ids, sums.sum().item(), reaching[0].item(), counted, draws)
        return TokenCoefficients((weights * (surprisal - others))[:, None] * mask, None)
    to_go = strictly_after(scores.entropies.double() - per_token, mask)
    centred = to_go - position_baseline(to_go, mask, units, reaching, sums, weights)
    return TokenCoefficients(weights[:, None] * centred, weights[:, None] * mask)


def first_order(contributions: Float[Tensor, " U"], weights: Float[Tensor, " U"]) -> Sampled:
    """The first-order change ``sum_u d_u / sum_u b_u`` along a fixed step.

    Args:
        contributions: ``d_u``, the inner product of each unit's surrogate gradient with the step.
        weights: ``b_u``, each unit's tokens or sequences (:func:`sequence_weights` summed over the unit).
    """
    return ratio(contributions, weights)


def update_standard_error(contributions: Float[Tensor, " B"]) -> float:
    """The error of the gradient part from the choice of update prompts, everything else held fixed.

    ``sd_m(q_m) / sqrt(B)`` with ``q_m = B`` times the contribution of prompt m, so that their mean is the gradient
    part of the first-order change.

    Args:
        contributions: what each update prompt adds to the first-order change; they sum to the gradient part.

    Raises:
        ValueError: with fewer than two prompts.
    """
    prompts = contributions.numel()
    if prompts < 2:
        raise ValueError(f"update batch: expected at least 2 prompts for a standard error, got {prompts}")
    return (prompts * contributions.double().std() / prompts**0.5).item()
