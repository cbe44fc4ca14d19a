"""Entropy, its gradient as token coefficients, and the first-order change along a step.

Formulas: ``docs/theory.md``, "Entropy", "The entropy gradient" and "The first-order change".
"""

from __future__ import annotations

from dataclasses import dataclass
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
from entropy_probe.estimators.uncertainty import ClusterSums, Sampled, check_prompts, ratio
from entropy_probe.types import Clusters, TokenCoefficients, TokenScores

Normalization = Literal["token", "sequence"]


def sequence_weights(scores: TokenScores, normalization: Normalization) -> Float[Tensor, " N"]:
    """What each sequence adds to the denominator: its response tokens, or 1 per response, times its weight."""
    return scores.weights * (scores.response_lengths if normalization == "token" else scores.answered)


def sequence_entropies(scores: TokenScores, kind: EntropyKind) -> Float[Tensor, " N"]:
    """``sum_t h_t`` or ``-S`` per sequence, nats: two unbiased estimates of the same expectation."""
    return scores.entropies.sum(1, dtype=torch.float64) if kind == "rao_blackwell" else -scores.sequence_logprobs


def entropy(
    scores: TokenScores,
    clusters: Clusters,
    normalization: Normalization = "token",
    kind: EntropyKind = "rao_blackwell",
) -> ClusterSums:
    """H in nats per token, ``E[sum_t h_t] / E[T]`` (a ratio of means), or per sequence, ``E[sum_t h_t]``."""
    numerator = scores.weights * sequence_entropies(scores, kind)
    return ClusterSums.of(clusters, numerator, sequence_weights(scores, normalization))


def entropy_coefficients(
    scores: TokenScores,
    prompt_ids: Int[Tensor, " N"],
    clusters: Clusters,
    batch: PositionSums,
    normalization: Normalization = "token",
    kind: EntropyKind = "rao_blackwell",
    draws: Clusters | None = None,
    horizon: int | None = None,
) -> TokenCoefficients:
    """Coefficients of the entropy-gradient surrogate, before division by the tokens or sequences of the batch.

    Rao-Blackwell: ``h_it + (R_it - b_it) s_it`` with ``R_it`` the entropy still to come after token t (minus the
    batch's entropy per token for each of those tokens, under per-token normalisation) and ``b_it`` its mean at
    position t over the other clusters. Surprisal: ``-(S_i - mean of the others) s_it``, with the same correction for
    length under per-token normalisation. Coefficients are constants: differentiating them too gives another,
    wrong gradient (about twice the right one for surprisal). All of it is times the sequence's weight.

    Args:
        scores: of all or some sequences of a batch, whole clusters and prompts.
        prompt_ids: their prompts.
        clusters: the cluster of each of these sequences.
        batch: sums over the whole batch.
        normalization: per token or per sequence.
        kind: how the entropy of a sequence is estimated.
        draws: which of these sequences were sampled together, whole; by default each by itself.
        horizon: how many later tokens ``R_it`` reaches; all by default. Only for Rao-Blackwell.

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
    to_go = strictly_after(scores.entropies.double() - per_token, mask, horizon)
    centred = to_go - position_baseline(to_go, mask, clusters, reaching, sums, weights, horizon)
    return TokenCoefficients(weights[:, None] * centred, weights[:, None] * mask)


def length_coefficients(
    scores: TokenScores, clusters: Clusters, batch: PositionSums, horizon: int | None = None
) -> TokenCoefficients:
    """Coefficients of the length-gradient surrogate, before division by the tokens of the batch.

    ``(L_it - b_it) s_it`` with ``L_it`` the response tokens still to come after token t and ``b_it`` their mean at
    position t over the other clusters: the entropy gradient with 1 in place of ``h``, which depends on no parameter.
    Its expectation over the mean length is the relative change of that length, whatever ``b``. All of it is times the
    sequence's weight.

    Args:
        scores: of all or some sequences of a batch.
        clusters: the cluster of each of these sequences.
        batch: sums over the whole batch.
        horizon: how many later tokens ``L_it`` counts; all by default.

    Returns:
        Float64 coefficients, 0 off the response.
    """
    mask, weights = scores.response_mask, scores.weights
    to_go = strictly_after(mask.double(), mask, horizon)
    centred = to_go - position_baseline(to_go, mask, clusters, batch.reaching, batch.reaching, weights, horizon)
    return TokenCoefficients(weights[:, None] * centred, None)


@dataclass(frozen=True, eq=False)
class FirstOrder(Sampled):
    """A first-order change along a fixed step.

    Attributes:
        length_change: sigma, the relative first-order change of the mean response length by which H moves the change;
            0 per sequence.
    """

    length_change: float

    def __add__(self, other: FirstOrder) -> FirstOrder:
        """The change along both steps together."""
        longer = self.length_change + other.length_change
        return FirstOrder(self.value + other.value, self.influence + other.influence, longer)

    def times(self, factor: float) -> FirstOrder:
        """The change along that many times the step."""
        return FirstOrder(factor * self.value, factor * self.influence, factor * self.length_change)


def first_order(
    contributions: Float[Tensor, " U"], weights: Float[Tensor, " U"], entropy: Sampled, length_change: float
) -> FirstOrder:
    """The first-order change ``sum_u d_u / sum_u b_u`` along a fixed step.

    Influence of cluster u, with ``sigma = length_change``::

        (d_u - value b_u) / mean b  -  sigma I_u

    where ``I_u`` is that of H. Per token ``d_u`` contains the batch's own H, which has an error: ``d_u`` falls by the
    cluster's part of the length gradient along the step for every nat per token that H rises, and ``sigma`` is what
    those sum to, over the tokens. Per sequence there is no such term. Bias of order ``1 / U`` per token. Source:
    ``docs/theory.md``, "Error from the evaluation batch".

    Args:
        contributions: ``d_u``, the inner product of each cluster's surrogate gradient with the step.
        weights: ``b_u``, each cluster's tokens or sequences (:func:`sequence_weights` summed over the cluster).
        entropy: H on the same clusters.
        length_change: the relative first-order change of the mean length along the step; 0 per sequence.
    """
    held = ratio(contributions, weights)
    return FirstOrder(held.value, held.influence - length_change * entropy.influence, length_change)


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
    check_prompts(prompts)
    return (prompts * contributions.double().std() / prompts**0.5).item()


def check_sums(by_prompt: Float[Tensor, " B"], gradient_part: float, tolerance: float) -> None:
    """The gradient part, summed over evaluation clusters, must equal its sum over update prompts.

    Raises:
        RuntimeError: if it does not, by more than this share of the sum of absolute contributions.
    """
    error = abs(by_prompt.sum().item() - gradient_part)
    if error > tolerance * by_prompt.abs().sum().item() + 1e-12:
        raise RuntimeError(
            f"gradient part: {gradient_part:.6g} summed over evaluation clusters but {by_prompt.sum().item():.6g} "
            "summed over update prompts; please report this"
        )
