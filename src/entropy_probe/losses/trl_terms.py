"""Terms of TRL's losses: pure functions of settings and per-token values, float64."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entropy_probe.losses.pieces import by_sequence, gap, sequence_mean, sequence_sum
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenScores

LOG_LEAST, LOG_MOST = math.log(1e-8), 20.0
"""Where VESPO clamps logarithms of ratios."""


def soft_gate_slope(
    ratio: Float[Tensor, "N _"], advantages: Float[Tensor, "N L"], positive: float, negative: float
) -> Float[Tensor, "N L"]:
    """The slope of SAPO's ``-4 sigmoid(tau (rho - 1)) A / tau`` in ``log rho``, ``tau`` by the sign of ``A``."""
    temperature = torch.where(advantages > 0, positive, negative).double()
    gate = torch.sigmoid(temperature * (ratio - 1))
    return -4 * gate * (1 - gate) * ratio * advantages


def gamma_weights(
    log_ratio: Float[Tensor, "N L"],
    correction: Float[Tensor, "N _"] | None,
    advantages: Float[Tensor, "N L"],
    positive: tuple[float, float],
    negative: tuple[float, float],
) -> Float[Tensor, "N L"]:
    """VESPO's weight of each sequence, ``exp(lambda + k log w - lambda w)``, ``k`` and ``lambda`` by the sign of ``A``.

    Args:
        log_ratio: of every token, 0 off the response.
        correction: ratios between the old policy and the sampler, which ``w`` takes in.
        advantages: of every token.
        positive: ``k`` and ``lambda`` for advantages of at least 0.
        negative: those for the others.
    """
    log_weight = log_ratio.clamp(-LOG_MOST, LOG_MOST).sum(1, keepdim=True)
    if correction is not None:
        log_weight = log_weight + correction.log().clamp(LOG_LEAST, LOG_MOST).sum(1, keepdim=True)
    log_weight = log_weight.clamp(LOG_LEAST, LOG_MOST)
    k, decay = (torch.where(advantages >= 0, *pair).double() for pair in zip(positive, negative, strict=True))
    decay = decay.clamp(min=1e-4)
    return (decay + k * log_weight - decay * log_weight.exp()).exp()


def geometric_mean(
    log_ratio: Float[Tensor, "N L"],
    advantages: Float[Tensor, "N L"],
    keep: Bool[Tensor, "N L"],
    low: float,
    high: float,
) -> Float[Tensor, "N L"]:
    """Coefficients of GMPO's policy term: minus ``A`` times the geometric mean of clipped ratios, mean over sequences.

    Args:
        log_ratio: of every token.
        advantages: of every token.
        keep: the tokens that count.
        low: how far the logarithm of a ratio may fall, for advantages of at most 0.
        high: how far it may rise, for the others.
    """
    rising = advantages > 0
    active = torch.where(rising, log_ratio <= high, log_ratio >= -low)
    clipped = torch.where(rising, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))
    return -by_sequence(keep) * sequence_mean(clipped, keep).exp() * advantages * active


def off_policy_mask(fallen: Float[Tensor, "N L"], rollouts: Rollouts, threshold: float) -> Bool[Tensor, "N L"]:
    """Tokens that stay: of an advantage of at least 0, or in sequences whose mean log-probability fell little.

    ``fallen`` is by how much each log-probability fell, nats; little is the threshold, nats per token.
    """
    return (rollouts.token_advantages >= 0) | (sequence_mean(fallen, rollouts.response_mask) <= threshold)


def sampler_ratio(
    old: Float[Tensor, "N L"], rollouts: Rollouts, mode: str, least: float | None, most: float | None
) -> Float[Tensor, "N _"]:
    """The importance sampling correction for vLLM: ``old`` over sampled probabilities, held within bounds.

    The mode is ``token`` or ``sequence``, with ``_truncate`` to the bounds or ``_mask`` of what is beyond.
    """
    beyond = gap(old, rollouts.sampled_logprobs, rollouts.response_mask)
    if mode.startswith("sequence"):
        beyond = sequence_sum(beyond, rollouts.response_mask)
    ratio, low, high = beyond.exp(), -math.inf if least is None else least, math.inf if most is None else most
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def by_longest(rollouts: Rollouts) -> Float[Tensor, "N L"]:
    """One over N times the longest response of the prompt's group."""
    lengths = rollouts.response_mask.sum(1, dtype=torch.float64)
    _, group = rollouts.prompt_ids.unique(return_inverse=True)
    longest = torch.zeros(int(group.max()) + 1, dtype=torch.float64).scatter_reduce(0, group, lengths, "amax")
    return rollouts.response_mask / (len(lengths) * longest[group].clamp(min=1))[:, None]


def check_balance(own: float | None, config: object) -> None:
    """Refuse a mixture of experts that TRL balances by a loss of its own, which is no sum over tokens.

    ``own`` is ``router_aux_loss_coef`` of the loss; ``None`` for that of the model's configuration.
    """
    config = getattr(config, "text_config", config)
    if not hasattr(config, "output_router_logits"):
        return
    weight = getattr(config, "router_aux_loss_coef", 0.0) if own is None else own
    if weight:
        source = "the model's" if own is None else "the loss's"
        raise ValueError(
            f"loss.router_aux_loss_coef: expected 0, got {weight:g} ({source}) on a mixture of experts: the loss that "
            "balances them is taken over whole microbatches, and is not in the step here; give the trainer's own "
            "gradient (gradient=...), or set it to 0 if training does without"
        )


def log_ratio_to_old(rollouts: Rollouts, scores: TokenScores | None) -> Float[Tensor, "N L"]:
    """``log rho`` to the policy that sampled; 0 where it is not known."""
    return gap(None if scores is None else scores.logprobs, rollouts.old_logprobs, rollouts.response_mask)
