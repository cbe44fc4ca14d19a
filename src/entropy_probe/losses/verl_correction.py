"""verl's rollout correction: weights and rejections by the ratio of the trained policy to the sampler's.

Source: ``verl/trainer/ppo/rollout_corr_helper.py`` of verl 0.7.1 to 0.9.0. A threshold is a number, or
``"lower_upper"``; several, one for each option of ``rollout_rs``, are separated by commas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

REJECTIONS = tuple(
    f"{level}_{kind}"
    for level, kinds in (("token", "123"), ("seq_sum", "123"), ("seq_mean", "123"), ("seq_max", "23"))
    for kind in (f"k{number}" for number in kinds)
)
"""The options of ``rollout_rs``."""
_LOG_BOUND = 20.0


@dataclass(frozen=True)
class Rejection:
    """One option of ``rollout_rs``: what is outside the bounds is rejected."""

    level: str  # ``token``, or ``seq_sum``, ``seq_mean``, ``seq_max`` of the tokens
    kind: str  # ``k1``, ``k2`` or ``k3``, the estimate of the divergence
    bounds: tuple[float, float]  # of it, in nats

    def kept(self, log_ratio: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"]) -> Bool[Tensor, "N L"]:
        """Which tokens are not rejected."""
        d = log_ratio.clamp(-_LOG_BOUND, _LOG_BOUND)
        value = {"k1": -d, "k2": d.square() / 2, "k3": d.expm1() - d}[self.kind]
        if self.level == "seq_max":
            value = value.masked_fill(~mask, -math.inf).amax(1, keepdim=True)
        elif self.level != "token":
            value = (value * mask).sum(1, keepdim=True)
            if self.level == "seq_mean":
                value = value / mask.sum(1, keepdim=True).clamp(min=1)
        return ((value >= self.bounds[0]) & (value <= self.bounds[1])).expand_as(mask)


def threshold(name: str, text: float | str) -> tuple[float | None, float]:
    """The lower bound, if any, and the upper one: positive numbers in their order."""
    low, _, high = str(text).strip().rpartition("_")
    try:
        bounds = (float(low) if low else None, float(high))
    except ValueError:
        bounds = (None, math.nan)
    if not 0 < (bounds[1] if bounds[0] is None else bounds[0]) <= bounds[1] < math.inf:
        raise ValueError(f"loss.{name}: expected a number above 0 or 'lower_upper', got {text!r}")
    return bounds


def rejections(options: str, thresholds: float | str | None) -> tuple[Rejection, ...]:
    """What ``rollout_rs`` and ``rollout_rs_threshold`` say."""
    names = list(dict.fromkeys(option.strip() for option in options.split(",") if option.strip()))
    unknown = [name for name in names if name not in REJECTIONS]
    if unknown or not names:
        got = repr(unknown[0] if unknown else options)
        raise ValueError(f"loss.rollout_rs: expected one or more of {', '.join(REJECTIONS)}, got {got}")
    texts = [] if thresholds is None else [text for text in str(thresholds).split(",") if text.strip()]
    if len(texts) not in (1, len(names)):
        raise ValueError(
            f"loss.rollout_rs_threshold: expected one number, or {len(names)} with commas between, got {thresholds!r}"
        )
    return tuple(_rejection(name, text) for name, text in zip(names, texts * (len(names) // len(texts)), strict=True))


def _rejection(name: str, text: str) -> Rejection:
    level, _, kind = name.rpartition("_")
    low, high = threshold("rollout_rs_threshold", text)
    if kind != "k1":
        if low is not None:
            raise ValueError(f"loss.rollout_rs_threshold: expected one number for {name}, got {text!r}")
        return Rejection(level, kind, (-math.inf, high))
    return Rejection(level, kind, (math.log(1 / high if low is None else low), math.log(high)))


def importance_weights(
    log_ratio: Float[Tensor, "N L"],
    mask: Bool[Tensor, "N L"],
    level: str,
    bounds: tuple[float | None, float],
    *,
    normalize: bool,
) -> Float[Tensor, "N L"]:
    """What each token's policy loss is multiplied by.

    Args:
        log_ratio: of the trained policy to the sampler's, in nats, 0 off the response.
        mask: the response tokens, before any rejection.
        level: ``token``, or ``sequence``: the product of a sequence's ratios for all of its tokens.
        bounds: the weight beyond which it is cut off; with a lower bound it is 0 outside instead.
        normalize: to mean 1, over tokens or over sequences.
    """
    summed = log_ratio if level == "token" else log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    weights = summed.clamp(-_LOG_BOUND, _LOG_BOUND).exp() * mask
    low, high = bounds
    if low is None:
        weights = weights.clamp(max=high)
    else:
        weights = torch.where((weights >= low) & (weights <= high), weights, 0.0)
    if normalize:
        per_sequence = weights.sum(1) / mask.sum(1).clamp(min=1)
        whole = weights.sum() / mask.sum() if level == "token" else per_sequence.sum() / mask.any(1).sum()
        if whole > 1e-8:
            weights = weights / whole
    return weights
