"""How far a changed token echoes: the change of entropy with only the last ``k`` tokens of each prefix drawn anew.

``H^(k)`` is the entropy under the policy after the step at prefixes whose last ``k`` tokens are from that policy and
the earlier ones from the policy before. ``k = 0`` keeps the visited prefixes; without a bound it is the entropy itself.
The error of a fixed horizon falls with the length of the responses, that of the whole does not. Formulas:
``docs/theory.md``, "A horizon".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.estimators.first_order import Normalization, entropy_coefficients, length_coefficients
from entropy_probe.estimators.realized import windowed_weights
from entropy_probe.estimators.uncertainty import Sampled
from entropy_probe.types import Clusters, TokenScores


def horizons(longest: int, also: int | None = None) -> tuple[int | None, ...]:
    """0, 1, 2, 4, ... up to what the longest response has after its first token, one more, and ``None`` for all."""
    doubling = {2**power for power in range(longest.bit_length()) if 2**power < longest - 1}
    return (*sorted({0, *doubling} | ({also} if also is not None else set())), None)


def differences(before: TokenScores, after: TokenScores) -> TokenScores:
    """By how much every score changes with a step: its derivative along the step, up to second order."""
    logprobs = after.logprobs.double() - before.logprobs.double()
    return TokenScores(logprobs, after.entropies.double() - before.entropies.double(), before.response_mask)


def second_order(before: TokenScores, there: TokenScores, opposite: TokenScores) -> TokenScores:
    """What :func:`differences` have beyond derivatives: the mean of those after a step and after the opposite one.

    Without it they are derivatives up to third order.
    """
    gains, losses = differences(before, there), differences(before, opposite)
    logprobs, entropies = (gains.logprobs + losses.logprobs) / 2, (gains.entropies + losses.entropies) / 2
    return TokenScores(logprobs, entropies, before.response_mask)


def first_order_along(
    before: TokenScores,
    slopes: TokenScores,
    clusters: Clusters,
    batch: PositionSums,
    normalization: Normalization = "token",
    horizon: int | None = None,
) -> Float[Tensor, "2 U"]:
    """What each cluster adds to the first-order change within a horizon, and to that of the number of tokens.

    Args:
        before: scores of all or some sequences of a batch, whole clusters.
        slopes: derivatives of these scores along the step.
        clusters: the cluster of each of these sequences.
        batch: sums over the whole batch.
        normalization: per token or per sequence; the number of tokens is 0 per sequence.
        horizon: how many later tokens count; all by default.
    """
    given = (before, clusters.index, clusters, batch, normalization)
    of_entropy = entropy_coefficients(*given, horizon=horizon)
    assert of_entropy.entropies is not None
    change = of_entropy.logprobs * slopes.logprobs + of_entropy.entropies * slopes.entropies
    lengths = torch.zeros_like(change)
    if normalization == "token":
        lengths = length_coefficients(before, clusters, batch, horizon).logprobs * slopes.logprobs
    return torch.stack([clusters.total(change.sum(1)), clusters.total(lengths.sum(1))])


def squared_weights(before: TokenScores, after: TokenScores, horizon: int | None = None) -> Float[Tensor, 3]:
    """Sums over tokens of the windowed weights, of their squares, and of 1; the effective share is ``a^2 / (b c)``."""
    weights = windowed_weights(before, after, horizon)[0] * before.weights[:, None]
    return torch.stack([weights.sum(), weights.square().sum(), before.response_mask.sum().double()])


def settled(changes: Sequence[Sampled], critical: float) -> int:
    """The first place from which no later change differs by more than ``critical`` errors of the paired difference."""
    for place, change in enumerate(changes):
        gaps = (later - change for later in changes[place + 1 :])
        if all(abs(gap.value) <= critical * gap.standard_error for gap in gaps):
            return place
    return len(changes) - 1
