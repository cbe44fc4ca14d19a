"""Ratios over independent units, and their standard errors by the delta method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Sampled", "Units", "ratio"]


@dataclass(frozen=True, eq=False)
class Units:
    """Which sequences belong to the same independent sampling unit.

    Attributes:
        index: the unit of each sequence, 0 to ``count - 1``, ``[N]``.
        count: the number of units, ``U``.
    """

    index: Int[Tensor, " N"]
    count: int

    @classmethod
    def sequences(cls, num_sequences: int) -> Units:
        """Every sequence is a unit: responses drawn independently, prompts with replacement."""
        return cls(torch.arange(num_sequences), num_sequences)

    @classmethod
    def prompts(cls, prompt_ids: Int[Tensor, " N"]) -> Units:
        """The sequences of a prompt form a unit: distinct prompts, several responses each."""
        distinct, index = prompt_ids.unique(return_inverse=True)
        return cls(index, distinct.numel())

    def total(self, values: Float[Tensor, " N"]) -> Float[Tensor, " U"]:
        """Sum over the sequences of each unit, in float64."""
        return torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.index, values.double())


@dataclass(frozen=True, eq=False)
class Sampled:
    """An estimate and the influence of each unit on it.

    To first order the estimate is ``value = truth + mean(influence)``, so two estimates from the same units can be
    subtracted influence by influence: that is the paired comparison.

    Attributes:
        value: the estimate.
        influence: centred influence of each unit, ``[U]``, float64.
    """

    value: float
    influence: Float[Tensor, " U"]

    @property
    def standard_error(self) -> float:
        """``sd(influence) / sqrt(U)`` with the unbiased standard deviation."""
        return (self.influence.std() / self.influence.numel() ** 0.5).item()

    def __sub__(self, other: Sampled) -> Sampled:
        return Sampled(self.value - other.value, self.influence - other.influence)


def ratio(numerator: Float[Tensor, " U"], denominator: Float[Tensor, " U"]) -> Sampled:
    """``sum(a) / sum(b)`` over units, with influence ``(a_u - r b_u) / mean(b)``.

    With ``b = 1`` this is the mean and its ordinary standard error. Bias of order ``1 / U`` otherwise. Source:
    Cochran, Sampling Techniques, 1977, chapter 6.

    Raises:
        ValueError: with fewer than two units, or if a sum is not finite.
    """
    units = numerator.numel()
    if units < 2:
        raise ValueError(f"standard error: expected at least 2 independent units, got {units}; give more rollouts")
    a, b = numerator.double(), denominator.double()
    value = a.sum() / b.sum()
    if not bool(torch.isfinite(value)):
        raise ValueError(f"estimate: expected finite sums, got {a.sum().item()} / {b.sum().item()}")
    return Sampled(value.item(), (a - value * b) / b.mean())
