"""Baselines for score-function terms: means over the other units at the same response position.

A baseline that does not depend on the sequence's own response changes no expectation. See ``docs/theory.md``,
"Baselines".
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entropy_probe.estimators.uncertainty import Units

__all__ = ["leave_one_out_mean", "position_baseline", "strictly_after"]


def strictly_after(values: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """At each response token the sum of ``values`` over the later response tokens of its sequence, in float64."""
    masked = torch.where(mask, values.double(), 0.0)
    return torch.where(mask, masked.sum(1, keepdim=True) - masked.cumsum(1), 0.0)


def position_baseline(values: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"], units: Units) -> Float[Tensor, "N L"]:
    """At the t-th response token the mean of ``values`` there over the sequences of the other units that reach t.

    0 where no other unit reaches t. Positions count response tokens, so padding does not matter. Float64.
    """
    position = (mask.long().cumsum(1) - 1)[mask]
    unit = units.index[:, None].expand_as(mask)[mask]
    flat = values.double()[mask]
    length = int(position.max()) + 1
    cell = unit * length + position
    own_sum = torch.zeros(units.count * length, dtype=torch.float64).index_add_(0, cell, flat)
    own_count = torch.zeros_like(own_sum).index_add_(0, cell, torch.ones_like(flat))
    other_sum = own_sum.view(-1, length).sum(0)[position] - own_sum[cell]
    other_count = own_count.view(-1, length).sum(0)[position] - own_count[cell]
    out = torch.zeros(mask.shape, dtype=torch.float64)
    out[mask] = torch.where(other_count > 0, other_sum / other_count.clamp(min=1), 0.0)
    return out


def leave_one_out_mean(values: Float[Tensor, " N"], prompt_ids: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """For each sequence the mean of the others of its prompt, or of the whole batch if its prompt has no other.

    Raises:
        ValueError: for a batch of one sequence.
    """
    n = values.numel()
    if n < 2:
        raise ValueError(f"leave-one-out baseline: expected at least 2 sequences, got {n}")
    values = values.double()
    group = Units.prompts(prompt_ids)
    count = group.total(torch.ones_like(values))[group.index]
    within = (group.total(values)[group.index] - values) / (count - 1).clamp(min=1)
    across = (values.sum() - values) / (n - 1)
    return torch.where(count > 1, within, across)
