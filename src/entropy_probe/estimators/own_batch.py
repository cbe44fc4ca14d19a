"""A first-order change from the batch of the step itself: pairs of different prompts only.

Moments and weights come from earlier batches and are independent of these responses; the gradient is not, and its own
prompt is left out of each prompt's product with it. Formulas: ``docs/theory.md``, "One batch". Source: Hoeffding, 1948
(U-statistics).
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

__all__ = ["MIN_PROMPTS", "OwnPairs"]

MIN_PROMPTS = 3
"""Fewer leave nothing to take the spread of pairs from."""


@dataclass(frozen=True, eq=False)
class OwnPairs:
    """The gradient part over pairs of different prompts.

    Attributes:
        entropy_side: ``<x_u, Delta_gradient>`` of every prompt, all pairs.
        update_side: ``<sum_w x_w, Delta_gradient of prompt u>``; sums to the same total.
        own: ``<x_u, Delta_gradient of prompt u>``.
    """

    entropy_side: Float[Tensor, " B"]
    update_side: Float[Tensor, " B"]
    own: Float[Tensor, " B"]

    def __post_init__(self) -> None:
        if len(self.own) < MIN_PROMPTS:
            raise ValueError(
                f"one batch: expected at least {MIN_PROMPTS} distinct prompts, whose responses are compared with each "
                f"other's gradients, got {len(self.own)}; give more prompts, or evaluation rollouts"
            )

    @property
    def by_entropy(self) -> Float[Tensor, " B"]:
        """What each prompt's entropy gradient adds, by the others' step: ``B / (B - 1) (<x_u, all> - <x_u, own>)``."""
        return self._scale * (self.entropy_side - self.own)

    @property
    def by_update(self) -> Float[Tensor, " B"]:
        """What each prompt's gradient adds, through the others' entropy gradients; sums to the same."""
        return self._scale * (self.update_side - self.own)

    @property
    def self_influence(self) -> Float[Tensor, " B"]:
        """What all pairs have more than pairs of different prompts, by prompt of the entropy gradient."""
        return self.entropy_side - self.by_entropy

    @property
    def _scale(self) -> float:
        prompts = len(self.own)
        return prompts / (prompts - 1)
