"""Importance weights between the policy before and after a step, and their health.

Source: Owen, Monte Carlo theory, methods and examples, 2013, chapter 9.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.types import TokenScores

__all__ = ["SequenceWeights", "sequence_importance_weights"]


@dataclass(frozen=True, eq=False)
class SequenceWeights:
    """Self-normalised importance weights of whole responses.

    Attributes:
        normalized: non-negative weights with mean 1, ``[N]``, float64.
        ess: effective sample size ``(sum w)^2 / sum w^2``, between 1 and N.
    """

    normalized: Float[Tensor, " N"]
    ess: float

    @property
    def ess_fraction(self) -> float:
        """``ess / N``."""
        return self.ess / self.normalized.numel()

    @property
    def max_weight(self) -> float:
        """The largest weight in units of the mean weight."""
        return self.normalized.max().item()


def sequence_importance_weights(before: TokenScores, after: TokenScores) -> SequenceWeights:
    """``w_i = exp(S+_i - S_i)`` divided by their mean, computed with the largest log-weight subtracted.

    Raises:
        ValueError: if a log-weight is not finite.
    """
    log_weights = after.sequence_logprobs - before.sequence_logprobs
    if not bool(torch.isfinite(log_weights).all()):
        raise ValueError(
            "importance weights: expected finite log-probabilities before and after the step, got non-finite ones; "
            "the step is too large or the logits overflow"
        )
    weights = (log_weights - log_weights.max()).exp()
    ess = weights.sum().square() / weights.square().sum()
    return SequenceWeights(weights / weights.mean(), ess.item())
