"""Several responses to a prompt: what they have in common, and how many to draw.

Formulas: ``docs/theory.md``, "Draws per prompt". Sources: Cochran, Sampling Techniques, 1977, chapters 9 and 10
(two-stage sampling); Kish, Survey Sampling, 1965 (design effect).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.types import Clusters

MOST_DRAWS, LEAST_SHARE = 16, 0.02
"""Bounds where a pilot finds next to nothing in common: more draws would save little and rest on that alone."""


@dataclass(frozen=True)
class Between:
    """How the variance of an influence divides between prompts and within them.

    Attributes:
        share: of the variance of a single draw that its prompt explains, by the unbiased components; below 0 where
            draws of one prompt differ more than those of different ones.
        design_effect: variance of the mean over that of as many draws with a prompt each: ``1 + (K - 1) share``.
        draws: draws per prompt, as unequal numbers count.
    """

    share: float
    design_effect: float
    draws: float


def between(influence: Float[Tensor, " N"], prompts: Clusters) -> Between | None:
    """Components of variance, by one-way analysis of variance; ``None`` where nothing varies or no prompt repeats.

    Args:
        influence: of each draw on an estimate, centred.
        prompts: the prompt of each draw.
    """
    counts = prompts.total(torch.ones_like(influence))
    number, total = prompts.count, counts.sum()
    if number < 2 or total <= number:
        return None
    means = prompts.total(influence) / counts
    within = (influence.double() - means[prompts.index]).square().sum() / (total - number)
    outside = (counts * (means - influence.double().mean()).square()).sum() / (number - 1)
    draws = (total - counts.square().sum() / total) / (number - 1)
    of_prompts = (outside - within) / draws
    if not bool(of_prompts + within > 0):
        return None
    share = (of_prompts / (of_prompts + within)).item()
    return Between(share, 1 + (draws.item() - 1) * share, draws.item())


def best_draws(share: float, prompt_cost: float, response_cost: float) -> int:
    """The number of draws per prompt with the smallest variance for a cost, ``sqrt(c_p / c_r (1 - share) / share)``.

    Args:
        share: the between-prompt share of the variance.
        prompt_cost: of a prompt, once however often it is answered.
        response_cost: of a response, in the same unit.
    """
    share = min(max(share, LEAST_SHARE), 1.0)
    return min(MOST_DRAWS, max(1, round((prompt_cost / response_cost * (1 - share) / share) ** 0.5)))
