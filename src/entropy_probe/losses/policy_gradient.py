"""The policy gradients of GRPO and its kin: one weight for each sampled token.

At the sampling point (importance ratio 1, no clipping active) each of them has the gradient of
``-sum_it omega_it A_it s_it``; they differ only in the weights ``omega``.
See ``docs/theory.md``, "The update gradient".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.losses.base import register
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenCoefficients, TokenScores

__all__ = ["DIVIDES_BY", "PolicyGradient"]

Divisor: TypeAlias = Literal["sequence", "tokens", "max_completion_length", "longest"]
DIVIDES_BY: dict[str, Divisor] = {
    "bnpo": "tokens",
    "cispo": "tokens",
    "dapo": "tokens",
    "dr_grpo": "max_completion_length",
    "grpo": "sequence",
    "per_prompt_max": "longest",
}
"""The policy gradients by the trainer's name."""


@dataclass(frozen=True)
class PolicyGradient:
    """The policy gradient with the trainer's normaliser.

    A trainer that normalises each microbatch by itself (TRL's ``bnpo``) agrees when a step is one microbatch. A
    sequence without response tokens, which the trainer masks out, counts in N; that is all it does.

    Attributes:
        divides_by: ``sequence``: the mean over sequences of each sequence's token mean (Shao et al., 2024);
            ``tokens``: the mean over all response tokens of the step (Yu et al., 2025); ``max_completion_length``: N
            times that, whatever the responses' lengths (Liu et al., 2025); ``longest``: N times the longest response
            of the prompt's group.
        max_completion_length: the trainer's generation limit in tokens.
    """

    divides_by: Divisor
    max_completion_length: int | None = None
    needs_scores: ClassVar[bool] = False
    models: ClassVar[tuple[str, ...]] = ()

    @property
    def per_token(self) -> bool:
        """Whether the loss divides by the response tokens of the step."""
        return self.divides_by == "tokens"

    def weights(self, rollouts: Rollouts) -> Float[Tensor, "N L"]:
        """The weight ``omega_it`` of every response token, 0 elsewhere, float64.

        Raises:
            ValueError: if ``max_completion_length`` is missing.
        """
        mask = rollouts.response_mask
        count, lengths = mask.shape[0], mask.sum(1, dtype=torch.float64)
        if self.divides_by == "sequence":
            weight = (1 / (count * lengths.clamp(min=1)))[:, None]
        elif self.divides_by == "tokens":
            weight = (1 / lengths.sum().clamp(min=1))[None, None]
        elif self.divides_by == "longest":
            _, group = rollouts.prompt_ids.unique(return_inverse=True)
            longest = torch.zeros(int(group.max()) + 1, dtype=torch.float64).scatter_reduce(0, group, lengths, "amax")
            weight = (1 / (count * longest[group].clamp(min=1)))[:, None]
        elif self.max_completion_length is None:
            raise ValueError(
                "loss_type dr_grpo: expected max_completion_length, got None; set it to the "
                "trainer's value, which the loss divides by"
            )
        else:
            weight = torch.full((1, 1), 1 / (count * self.max_completion_length), dtype=torch.float64)
        return weight * mask

    def coefficients(self, rollouts: Rollouts, scores: TokenScores | None = None) -> TokenCoefficients:
        """``-omega_it A_it`` for the log-probabilities, nothing for the entropies.

        Raises:
            ValueError: as :meth:`weights`, or if the batch has no advantages.
        """
        return TokenCoefficients(-self.weights(rollouts) * rollouts.token_advantages, None)


for _name, _divides_by in DIVIDES_BY.items():
    register(_name, divides_by=_divides_by)(PolicyGradient)
