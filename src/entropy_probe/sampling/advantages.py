"""Group-relative advantages."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

ScaleRewards = Literal["group", "batch", "none"]

TRL_EPSILON = 1e-4
"""What TRL adds to a standard deviation; verl, slime and SkyRL add 1e-6."""


def group_advantages(
    rewards: Float[Tensor, " N"],
    prompt_ids: Int[Tensor, " N"],
    scale_rewards: ScaleRewards = "group",
    epsilon: float = TRL_EPSILON,
) -> Float[Tensor, " N"]:
    """Advantages relative to the other responses to the same prompt.

    ``A_i = (r_i - mean of its group) / (std + epsilon)``, with the unbiased standard deviation of the group
    (``"group"``) or of all rewards (``"batch"``), or without the division (``"none"``). This is TRL's rule
    (``GRPOTrainer``, one reward, ``scale_rewards``), and with another ``epsilon`` verl's. Computed in float64 from
    differences to a member of the group, so equal rewards give exactly 0.

    Args:
        rewards: one finite reward per response.
        prompt_ids: equal ids form a group; groups may differ in size and need not be contiguous.
        scale_rewards: what to divide by.
        epsilon: what is added to it.

    Returns:
        Advantages in the dtype of ``rewards``, without unit.

    Raises:
        ValueError: if a reward is not finite, or a standard deviation is asked of a single reward.
    """
    if not bool(torch.isfinite(rewards).all()):
        index = int((~torch.isfinite(rewards)).nonzero()[0, 0])
        raise ValueError(f"rewards: expected finite numbers, got {float(rewards[index])} at index {index}")
    ids, group, counts = prompt_ids.unique(return_inverse=True, return_counts=True)
    r = rewards.double()
    first = r.new_empty(len(ids)).scatter_(0, group, r)  # any member will do
    centred = r - first[group]
    centred = centred - (r.new_zeros(len(ids)).scatter_add_(0, group, centred) / counts)[group]
    if scale_rewards == "none":
        return centred.to(rewards.dtype)
    if scale_rewards == "batch":
        if len(r) < 2:
            raise ValueError('scale_rewards "batch": expected at least 2 rewards, got 1; use "none" or more responses')
        return (centred / (r.std() + epsilon)).to(rewards.dtype)
    if bool((counts < 2).any()):
        prompt = int(ids[counts < 2][0])
        raise ValueError(
            f'scale_rewards "group": expected at least 2 responses per prompt, got 1 for prompt {prompt}; '
            'raise group_size or use scale_rewards "none"'
        )
    variance = r.new_zeros(len(ids)).scatter_add_(0, group, centred.square()) / (counts - 1)
    return (centred / (variance.sqrt() + epsilon)[group]).to(rewards.dtype)
