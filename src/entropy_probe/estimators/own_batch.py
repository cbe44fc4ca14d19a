"""A first-order change from the batch of the step itself, and its errors, from the step without each prompt.

Moments and weights come from earlier batches and are independent of these responses; the gradient is not. What a
prompt's own responses do to the step is left out of its entropy gradient's product with it. Formulas:
``docs/theory.md``, "One batch". Sources: Hoeffding, 1948 (U-statistics); Efron and Stein, 1981 (the jackknife).
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

MIN_PROMPTS = 3
"""Fewer leave nothing to take the spread of pairs from."""


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Products with ``delta_u``, by how much the step changes when prompt u is left out: the step minus the others'.

    The others' gradients are weighted as those of a whole batch. For a step that is linear in the gradient
    ``delta_u = J (y_u - mean y) B / (B - 1)``, and everything here is that of pairs of different prompts.

    Attributes:
        own: ``<x_u, delta_u>`` with the prompt's own entropy gradient.
        across: ``<sum_w x_w, delta_u> / B``.
    """

    own: Float[Tensor, " B"]
    across: Float[Tensor, " B"]

    def __post_init__(self) -> None:
        if len(self.own) < MIN_PROMPTS:
            raise ValueError(
                f"one batch: expected at least {MIN_PROMPTS} distinct prompts, whose responses are compared with each "
                f"other's gradients, got {len(self.own)}; give more prompts, or evaluation rollouts"
            )

    @property
    def self_influence(self) -> Float[Tensor, " B"]:
        """What each prompt's product with the step has of the prompt's own gradient, ``<x_u - mean x, delta_u>``."""
        return self.own - self.across

    @property
    def of_update(self) -> Float[Tensor, " B"]:
        """Influence of each prompt's gradient on the step's product with ``mean x``, by the jackknife; not centred."""
        return (len(self.own) - 1) * self.across


def pair_contributions(update_side: Float[Tensor, " B"], own: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """What each prompt's gradient adds through the others' entropy gradients, denominators and clipping held.

    Args:
        update_side: ``<sum_w x_w, Delta_gradient of prompt u>``.
        own: ``<x_u, Delta_gradient of prompt u>``.

    Returns:
        ``B / (B - 1) (update_side - own)``; they sum to the gradient part over pairs of different prompts.
    """
    prompts = len(own)
    return prompts / (prompts - 1) * (update_side - own)
