"""A policy gradient with a KL term that holds the policy near a reference.

The term is the k3 estimate of Schulman (2020), ``beta omega (exp(s_ref - s) - (s_ref - s) - 1)`` at each sampled token,
as TRL's GRPO adds it: its gradient is ``beta omega (1 - exp(s_ref - s))`` times that of the log-probability ``s``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from entropy_probe.losses.base import register
from entropy_probe.losses.policy_gradient import DIVIDES_BY, PolicyGradient
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenCoefficients, TokenScores

__all__ = ["PolicyGradientWithKL"]


@register("policy_gradient_with_kl")
@dataclass(frozen=True)
class PolicyGradientWithKL:
    """A policy gradient plus ``beta`` times the KL divergence to a reference.

    Attributes:
        beta: the trainer's coefficient of the term.
        policy_loss: the ``loss_type`` of the policy gradient.
        max_completion_length: the trainer's generation limit in tokens, for policy gradients that divide by it.
    """

    beta: float
    policy_loss: str = "dapo"
    max_completion_length: int | None = None
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise ValueError(f"loss_settings.beta: expected at least 0, got {self.beta}")
        if self.policy_loss not in DIVIDES_BY:
            raise ValueError(
                f"loss_settings.policy_loss: expected one of {', '.join(DIVIDES_BY)}, got {self.policy_loss!r}"
            )

    @property
    def _policy(self) -> PolicyGradient:
        return PolicyGradient(DIVIDES_BY[self.policy_loss], self.max_completion_length)

    @property
    def models(self) -> tuple[str, ...]:
        """The KL term, unless its coefficient is 0."""
        return ("the KL term",) if self.beta else ()

    @property
    def per_token(self) -> bool:
        """Whether the loss divides by the response tokens of the step."""
        return self._policy.per_token

    def weights(self, rollouts: Rollouts) -> Float[Tensor, "N L"]:
        """Those of the policy gradient, which the term shares."""
        return self._policy.weights(rollouts)

    def coefficients(self, rollouts: Rollouts, scores: TokenScores | None) -> TokenCoefficients:
        """``omega_it (beta (1 - exp(s_ref - s)) - A_it)`` for the log-probabilities.

        Raises:
            ValueError: as those of the policy gradient, or if the batch has no log-probabilities of the reference.
        """
        assert scores is not None
        if rollouts.reference_logprobs is None:
            raise ValueError(
                "reference_logprobs: expected [N, L] on an update batch of a loss with a KL term, got None; record the "
                "reference's log-probabilities of the sampled tokens"
            )
        beyond = (rollouts.reference_logprobs.double() - scores.logprobs.double()).masked_fill(
            ~rollouts.response_mask, 0.0
        )
        policy = self._policy.coefficients(rollouts, None).logprobs
        return TokenCoefficients(policy - self.beta * self.weights(rollouts) * beyond.expm1(), None)
