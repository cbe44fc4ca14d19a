"""Importance weights between the policy before and after a step, and their health.

Formulas: ``docs/theory.md``, "Importance weights". Sources: Owen, 2013, chapter 9 (self-normalised importance
sampling); Ionides, 2008 (truncation); Vehtari et al., 2024 (Pareto smoothing and its diagnostic).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.types import TokenScores

ImportanceMode = Literal["snis", "clip", "psis"]
"""Weights as they are, capped, or with their largest ones replaced by quantiles of a fitted Pareto tail."""

_LEAST_FOR_TAIL = 25
"""A Pareto tail is fitted to a fifth of the weights of a small sample, and needs 5."""
_HARMLESS_ESS = 0.99
"""Above this share of effective samples (a coefficient of variation below 0.1) no tail of the weights matters yet."""


@dataclass(frozen=True, eq=False)
class SequenceWeights:
    """Self-normalised importance weights of whole responses.

    Attributes:
        normalized: non-negative weights with mean 1, in the mode asked for, ``[N]``, float64.
        ess: effective sample size ``(sum w)^2 / sum w^2`` of the weights before capping or smoothing, 1 to N.
        max_weight: the largest of those in units of their mean.
        pareto_k: shape of the Pareto tail fitted to those; ``None`` with fewer than 25 sequences, or where many
            of the largest weights are equal.
    """

    normalized: Float[Tensor, " N"]
    ess: float
    max_weight: float
    pareto_k: float | None

    @property
    def ess_fraction(self) -> float:
        """``ess / N``."""
        return self.ess / self.normalized.numel()

    @property
    def pareto_k_threshold(self) -> float:
        """``min(1 - 1 / log10 N, 0.7)``: above it, N is too small for the tail (Vehtari et al., 2024)."""
        return min(1 - 1 / math.log10(max(2, self.normalized.numel())), 0.7)

    @property
    def heavy_tailed(self) -> bool:
        """Whether the Pareto diagnostic fails; never while more than 99% of the samples are effective."""
        k = self.pareto_k
        return k is not None and k > self.pareto_k_threshold and self.ess_fraction < _HARMLESS_ESS


def sequence_log_weights(before: TokenScores, after: TokenScores) -> Float[Tensor, "2 N"]:
    """``S+_i - S_i``, and the logarithm of what each sequence counts before the step (0 unless reweighted), float64.

    In nats; scores of the same responses at the old and at the new parameters. The two add up to the whole way from the
    sampler to the new policy.
    """
    step = after.sequence_logprobs - before.sequence_logprobs
    return torch.stack([step, torch.zeros_like(step) if before.log_weights is None else before.log_weights])


def sequence_importance_weights(
    log_weights: Float[Tensor, " N"],
    mode: ImportanceMode = "snis",
    *,
    base: Float[Tensor, " N"] | None = None,
    log_weight_clamp: float | None = None,
    weight_clip: float | None = None,
) -> SequenceWeights:
    """``w_i = exp(S+_i - S_i)`` divided by their mean, computed with the largest log-weight subtracted.

    In a reweighted batch times ``v_i``, what the sequence counts before the step. Clamping, capping and smoothing act
    on ``w`` alone: they vanish with the step, as the change does. The health of the weights is that of the products.

    Args:
        log_weights: ``S+_i - S_i`` of every sequence of the batch, from :func:`sequence_log_weights`.
        mode: ``snis`` leaves the weights as they are; ``clip`` caps them, which adds a bias and bounds the
            variance; ``psis`` replaces the largest ``min(N / 5, 3 sqrt N)`` by quantiles of a fitted Pareto tail,
            none above the largest weight.
        base: ``log v_i``, from :func:`sequence_log_weights`; ``None`` where all sequences count the same.
        log_weight_clamp: clamp ``S+_i - S_i`` to plus and minus this, in nats, before anything else.
        weight_clip: for ``clip``, the cap in units of the mean weight; ``None`` is ``sqrt N`` (Ionides, 2008).

    Raises:
        ValueError: if a log-weight is not finite, or for ``psis`` with fewer than 25 sequences.
    """
    if not bool(torch.isfinite(log_weights).all()):
        raise ValueError(
            "importance weights: expected finite log-probabilities before and after the step, got non-finite ones; "
            "the step is too large or the logits overflow"
        )
    if log_weight_clamp is not None:
        log_weights = log_weights.clamp(-log_weight_clamp, log_weight_clamp)
    count = log_weights.numel()
    if mode == "psis" and count < _LEAST_FOR_TAIL:
        raise ValueError(
            f"is_mode psis: expected at least {_LEAST_FOR_TAIL} evaluation sequences to fit a tail to, got {count}; "
            "give more, or use is_mode snis"
        )
    base = torch.zeros_like(log_weights) if base is None else base
    whole = log_weights + base
    raw = (whole - whole.max()).exp()
    normalized = raw / raw.mean()
    _, k = _pareto_smoothed(whole)
    used = normalized
    if mode == "clip":
        w = (log_weights - log_weights.max()).exp()
        most = count**0.5 if weight_clip is None else weight_clip
        used = base.exp() * w.clamp(max=most * ((base.exp() * w).sum() / base.exp().sum()).item())
    elif mode == "psis":
        used = base.exp() * _pareto_smoothed(log_weights)[0]
    ess = raw.sum().square() / raw.square().sum()
    return SequenceWeights(used / used.mean(), ess.item(), normalized.max().item(), k)


def _pareto_smoothed(log_weights: Tensor) -> tuple[Tensor, float | None]:
    """Pareto-smoothed weights and the shape of their tail; the exponentials as they are where no tail can be fitted."""
    from arviz_stats.base.array import array_stats

    shifted = log_weights - log_weights.max()
    if log_weights.numel() < _LEAST_FOR_TAIL or _tail_is_flat(shifted):
        return shifted.exp(), None
    # this function takes log-likelihoods, whose negatives are the log-weights of leave-one-out cross-validation
    smoothed, k = array_stats.psislw(-shifted.numpy())
    weights = torch.from_numpy(smoothed).exp()
    if weights[shifted.argmax()] < weights[shifted.argmin()]:
        raise RuntimeError("arviz-stats: expected smoothed weights in the order of the given ones; please report this")
    return weights, float(k)


def _tail_is_flat(log_weights: Tensor) -> bool:
    """Whether too many of the largest weights equal the largest of the others, as repeated responses make them."""
    count = log_weights.numel()
    tail = count // 5 if count <= 225 else math.floor(3 * count**0.5)
    largest = log_weights.topk(tail + 1).values.exp()
    quartile = largest[tail - max(1, math.floor(tail / 4 + 0.5))]
    return bool(torch.minimum(quartile - largest[-1], largest[0] - largest[-2]) < 64 * torch.finfo(torch.float64).eps)
