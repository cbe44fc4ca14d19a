"""verl's policy and KL losses as slopes: of each token's loss in its own log-probability, before the aggregation.

Sources: ``verl/trainer/ppo/core_algos.py`` of verl 0.7.0 to 0.9.0. Every function takes a :class:`Tokens` and the
settings, and returns ``[N, L]``, float64; what it says off the response does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entropy_probe.losses.pieces import clipped_slope, kl_slope, kl_value, sequence_mean, trust_region
from entropy_probe.losses.trl_terms import soft_gate_slope

if TYPE_CHECKING:
    from entropy_probe.losses.verl import VerlLoss

_LOG_BOUND = 20.0
"""verl bounds logarithms of ratios by this; beyond it nothing has a gradient."""
KL_KINDS = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
"""Estimates of the KL divergence, by ``kl_loss_type``."""


@dataclass(frozen=True)
class Tokens:
    """What a policy loss depends on."""

    logprobs: Float[Tensor, "N L"]  # at the policy as it is, nats
    log_ratio: Float[Tensor, "N L"]  # to the policy that the ratio is taken to, nats
    advantages: Float[Tensor, "N L"]  # of every token
    mask: Bool[Tensor, "N L"]  # the response tokens that count
    microbatch: Int[Tensor, " N"]  # of each sequence, 0 to the number of them less 1

    @property
    def ratio(self) -> Float[Tensor, "N L"]:
        """The importance ratio within verl's bounds."""
        return self.log_ratio.clamp(-_LOG_BOUND, _LOG_BOUND).exp()

    @property
    def bounded(self) -> Bool[Tensor, "N L"]:
        """Where the bounds leave the ratio as it is."""
        return self.log_ratio.abs() <= _LOG_BOUND

    def microbatches(self) -> list[Int[Tensor, " n"]]:
        """The sequences of each microbatch."""
        return [(self.microbatch == which).nonzero().flatten() for which in range(int(self.microbatch.max()) + 1)]


def vanilla(tokens: Tokens, loss: VerlLoss) -> Tensor:
    """PPO with dual clip."""
    low, high = loss.clip_range
    return clipped_slope(tokens.ratio, tokens.advantages, low, high, dual=loss.clip_ratio_c) * tokens.bounded


def gspo(tokens: Tokens, loss: VerlLoss) -> Tensor:
    """The geometric mean of a sequence's ratios as each token's, with the token's own slope (Zheng et al., 2025)."""
    mean = sequence_mean(tokens.log_ratio, tokens.mask)
    return clipped_slope(mean.clamp(max=10).exp(), tokens.advantages, *loss.clip_range) * (mean <= 10)


def sapo(tokens: Tokens, loss: VerlLoss) -> Tensor:
    """A soft gate around ratio 1 in place of the clip."""
    return soft_gate_slope(tokens.ratio, tokens.advantages, loss.tau_pos, loss.tau_neg) * tokens.bounded


def gpg(tokens: Tokens, loss: VerlLoss) -> Tensor:
    """The plain policy gradient."""
    return -tokens.advantages


def cispo(tokens: Tokens, loss: VerlLoss) -> Tensor:
    """The policy gradient weighted by the ratio, clipped at both ends."""
    return -tokens.ratio.clamp(*loss.clip_range) * tokens.advantages


def dppo(tokens: Tokens, loss: VerlLoss) -> Tensor:
    """The policy gradient weighted by the ratio up to ``clip_ratio_c``, inside a trust region of probabilities."""
    kind = loss.loss_mode.removeprefix("dppo_")
    kept = trust_region(kind, tokens.logprobs, tokens.log_ratio, tokens.advantages, *loss.clip_ratios)
    return -tokens.ratio.clamp(max=loss.clip_ratio_c) * tokens.advantages * kept


def dro(tokens: Tokens, loss: VerlLoss) -> Tensor:
    """The plain policy gradient, held to the old policy by the square of the ratio's logarithm."""
    assert loss.dro_beta is not None
    return loss.dro_beta * tokens.log_ratio - tokens.advantages


def _covariances(tokens: Tokens, rows: Int[Tensor, " n"]) -> Float[Tensor, "n L"]:
    """Of advantages and log-probabilities over the tokens of some sequences; -inf off the response."""
    mask = tokens.mask[rows]
    centred = [x[rows] - x[rows][mask].sum() / mask.sum().clamp(min=1) for x in (tokens.advantages, tokens.logprobs)]
    return (centred[0] * centred[1]).masked_fill(~mask, -torch.inf)


def _candidates(tokens: Tokens, loss: VerlLoss, rows: Int[Tensor, " n"]) -> Int[Tensor, "m 2"]:
    """The tokens of some sequences that Clip-Cov draws from: the sequence's place in ``rows``, and the position."""
    (low, high), ratio, advantages = loss.clip_range, tokens.log_ratio[rows].exp(), tokens.advantages[rows]
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    covariances = _covariances(tokens, rows)
    return ((covariances > loss.clip_cov_lb) & (covariances < loss.clip_cov_ub) & ~clipped).nonzero()


def clip_cov(tokens: Tokens, loss: VerlLoss) -> Tensor:
    """PPO without some tokens of high covariance, drawn at random in each microbatch (Cui et al., 2025)."""
    slope = clipped_slope(tokens.log_ratio.exp(), tokens.advantages, *loss.clip_range)
    generator = torch.Generator().manual_seed(loss.seed)
    for rows in tokens.microbatches():
        candidates = _candidates(tokens, loss, rows)
        count = max(int(loss.clip_cov_ratio * int(tokens.mask[rows].sum())), 1)
        drawn = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
        slope[rows[drawn[:, 0]], drawn[:, 1]] = 0.0
    return slope


def kl_cov(tokens: Tokens, loss: VerlLoss) -> Tensor:
    """No clip; ``ppo_kl_coef`` times the absolute log ratio at each microbatch's tokens of highest covariance."""
    slope = -tokens.log_ratio.exp() * tokens.advantages
    for rows in tokens.microbatches():
        size = int(tokens.mask[rows].sum())
        count = min(max(1, int(size * loss.kl_cov_ratio)), size)
        chosen = _covariances(tokens, rows).flatten().topk(count).indices
        row, position = rows[chosen // slope.shape[1]], chosen % slope.shape[1]
        slope[row, position] += loss.ppo_kl_coef * tokens.log_ratio[row, position].sign()
    return slope


def geo_mean(tokens: Tokens, loss: VerlLoss) -> Tensor:
    """GMPO (Zhao et al., 2025): the geometric mean of ratios, each clipped where its advantage gains."""
    low, high = loss.clip_ratios
    d, sign = tokens.log_ratio, tokens.advantages.sign()
    least = sign * torch.minimum(sign * d, sign * d.clamp(-low, high))
    active = torch.where(sign > 0, d <= high, d >= -low) & (sign != 0)
    return -sequence_mean(tokens.advantages, tokens.mask) * sequence_mean(least, tokens.mask).exp() * active


POLICY_SLOPES: dict[str, Callable[[Tokens, VerlLoss], Tensor]] = {
    "vanilla": vanilla,
    "dppo_tv": dppo,
    "dppo_kl": dppo,
    "gspo": gspo,
    "sapo": sapo,
    "gpg": gpg,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "geo_mean": geo_mean,
    "dro": dro,
    "cispo": cispo,
}
"""By ``loss_mode``, verl's name."""


def kl_loss_slope(kl_loss_type: str, above: Float[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """The slope of the KL loss of each token in its log-probability; with a ``+`` behind it always that of ``k2``.

    ``above`` is how far the log-probabilities are above the reference's, nats.
    """
    kind = "k2" if kl_loss_type.endswith("+") else KL_KINDS[kl_loss_type]
    if kind == "abs":
        return above.sign()
    if kind == "k3":
        bounded = above.clamp(-_LOG_BOUND, _LOG_BOUND)
        return kl_slope("k3", bounded) * (kl_value("k3", bounded) <= 10)
    return kl_slope("k1" if kind == "k1" else "k2", above)
