"""The trainers' policy-gradient losses, as the weight each sampled token carries.

At the sampling point (importance ratio 1, no clipping active) every supported loss has the gradient of
``-sum_it omega_it A_it s_it``; they differ only in the weights ``omega``.
See ``docs/theory.md``, "The update gradient".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenCoefficients

__all__ = ["LossType", "divides_by_tokens", "loss_coefficients", "token_weights"]

LossType = Literal["grpo", "bnpo", "dapo", "cispo", "dr_grpo", "per_prompt_max"]
LOSS_TYPES: tuple[str, ...] = get_args(LossType)


def _sequence_mean(mask: Tensor, prompt_ids: Tensor, max_completion_length: int | None) -> Tensor:
    """``1 / (N T_i)``: the mean over sequences of each sequence's token mean, 0 if masked out (Shao et al., 2024)."""
    return (1 / (mask.shape[0] * mask.sum(1, dtype=torch.float64).clamp(min=1)))[:, None]


def _token_mean(mask: Tensor, prompt_ids: Tensor, max_completion_length: int | None) -> Tensor:
    """``1 / sum_i T_i``: the mean over all response tokens of the step (Yu et al., 2025)."""
    return (1 / mask.sum(dtype=torch.float64).clamp(min=1))[None, None]


def _constant_length(mask: Tensor, prompt_ids: Tensor, max_completion_length: int | None) -> Tensor:
    """``1 / (N max_completion_length)``: no dependence on the responses' lengths (Liu et al., 2025)."""
    if max_completion_length is None:
        raise ValueError(
            "loss_type dr_grpo: expected max_completion_length, got None; set it to the "
            "trainer's value, which the loss divides by"
        )
    return torch.full((1, 1), 1 / (mask.shape[0] * max_completion_length), dtype=torch.float64)


def _per_prompt_max(mask: Tensor, prompt_ids: Tensor, max_completion_length: int | None) -> Tensor:
    """``1 / (N Lmax(p))`` with ``Lmax(p)`` the longest response of the prompt's group."""
    _, group = prompt_ids.unique(return_inverse=True)
    lengths = mask.sum(1)
    longest = torch.zeros(int(group.max()) + 1, dtype=lengths.dtype).scatter_reduce(0, group, lengths, "amax")
    return (1 / (mask.shape[0] * longest[group].double().clamp(min=1)))[:, None]


_WEIGHTS: dict[str, Callable[[Tensor, Tensor, int | None], Tensor]] = {
    "grpo": _sequence_mean,
    "bnpo": _token_mean,
    "dapo": _token_mean,
    "cispo": _token_mean,
    "dr_grpo": _constant_length,
    "per_prompt_max": _per_prompt_max,
}


def divides_by_tokens(loss_type: LossType) -> bool:
    """Whether the loss is over the response tokens of the step; otherwise it is over its sequences."""
    return _WEIGHTS[loss_type] is _token_mean


def token_weights(
    response_mask: Bool[Tensor, "N L"],
    prompt_ids: Int[Tensor, " N"],
    loss_type: LossType,
    max_completion_length: int | None = None,
) -> Float[Tensor, "N L"]:
    """The weight ``omega_it`` of every response token in the loss of one whole optimizer step.

    Normalised over all sequences of the step. A trainer that normalises each microbatch by itself (TRL's ``bnpo``)
    agrees when a step is one microbatch. 0 off the response. A sequence without response tokens, which the trainer
    masks out, counts in N; that is all it does.

    Args:
        response_mask: which tokens count.
        prompt_ids: the prompt of each sequence, by which the trainer groups them.
        loss_type: the trainer's name of the loss.
        max_completion_length: the trainer's generation limit in tokens; needed by ``dr_grpo``.

    Returns:
        Weights in float64.

    Raises:
        ValueError: for an unknown loss, or a missing ``max_completion_length``.
    """
    if loss_type not in _WEIGHTS:
        raise ValueError(f"loss_type: expected one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    return _WEIGHTS[loss_type](response_mask, prompt_ids, max_completion_length) * response_mask


def loss_coefficients(
    rollouts: Rollouts, loss_type: LossType, max_completion_length: int | None = None
) -> TokenCoefficients:
    """The loss at the sampling point, ``sum_it -omega_it A_it s_it``, as coefficients of the log-probabilities.

    Raises:
        ValueError: as :func:`token_weights`, or if the batch has no advantages.
    """
    omega = token_weights(rollouts.response_mask, rollouts.prompt_ids, loss_type, max_completion_length)
    return TokenCoefficients(-omega * rollouts.token_advantages, None)
