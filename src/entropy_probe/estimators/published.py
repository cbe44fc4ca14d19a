"""What other work would forecast of a step from its tokens alone: which way, and how far, each moves entropy.

None needs a gradient: advantages and the policy's scores are all they take. None knows the optimizer, the parameters
that prefixes share, or what later tokens become. Formulas and sources: ``docs/theory.md``, "Validation".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.estimators.attribution import covariance_terms
from entropy_probe.types import TokenScores

Advantages = Float[Tensor, "N L"]
Forecasts = Float[Tensor, "N L"]


def covariance(advantages: Advantages, scores: TokenScores) -> Forecasts:
    """``-(A - mean A) (log pi - mean log pi)``, means over all response tokens.

    Source: Cui et al. (2025), arXiv:2505.22617, whose Clip-Cov and KL-Cov pick tokens by it.
    """
    return -covariance_terms(advantages, scores.logprobs, scores.response_mask)


def logit_step(advantages: Advantages, scores: TokenScores) -> Forecasts:
    """``-A [pi (log pi + h) - sum_v pi_v^2 (log pi_v + h)]``: exact for a step on the logits of this one prefix.

    Source: Wang et al. (2026), arXiv:2602.03392, theorem 3.3.

    Args:
        advantages: of every token.
        scores: of the policy, with their discriminants.
    """
    assert scores.discriminants is not None
    return -advantages.double() * (_discriminant(scores) - scores.discriminants.double())


def repo(advantages: Advantages, scores: TokenScores) -> Forecasts:
    """``-A pi (log pi + h)``.

    Source: Petrenko et al. (2026), arXiv:2603.11682, theorem 1, whose centred log-probability is ``log pi + h``.
    """
    return -advantages.double() * _discriminant(scores)


def steer(advantages: Advantages, scores: TokenScores) -> Forecasts:
    """``-A (1 - pi) (log pi + h)``, as the authors' code has it where the policy is the one that sampled.

    Source: Hao et al. (2025), arXiv:2510.10150, and their repository zz-haooo/STEER.
    """
    return -advantages.double() * (1 - scores.logprobs.double().exp()) * _excess(scores)


def natural_step(advantages: Advantages, scores: TokenScores) -> Forecasts:
    """``-A (log pi + h)``: a step of the natural gradient on the logits of this one prefix.

    Source: Cui et al. (2025), arXiv:2505.22617, theorem 2, whose covariance within a prefix is its mean.
    """
    return -advantages.double() * _excess(scores)


def surprisal(advantages: Advantages, scores: TokenScores) -> Forecasts:
    """``-A log pi``: rewarded rare tokens raise entropy, rewarded frequent ones lower it."""
    return -advantages.double() * scores.logprobs.double()


def _excess(scores: TokenScores) -> Forecasts:
    """``log pi + h``: how much likelier a token is than the mean of what could have been drawn; 0 off the response."""
    return scores.logprobs.double() + scores.entropies.double()


def _discriminant(scores: TokenScores) -> Forecasts:
    return torch.where(scores.response_mask, scores.logprobs.double().exp() * _excess(scores), 0.0)


PUBLISHED: Mapping[str, Callable[[Advantages, TokenScores], Forecasts]] = MappingProxyType(
    {f.__name__: f for f in (covariance, logit_step, natural_step, steer, repo, surprisal)}
)
"""By name."""
