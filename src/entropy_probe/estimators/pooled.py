"""Two estimates of what one step does, from its own batch and from other rollouts, weighted by their variances.

Given the step the other rollouts are independent of its own batch, and their error has mean 0, so the errors of the two
are uncorrelated. Formulas: ``docs/theory.md``, "Both together".
"""

from __future__ import annotations

from dataclasses import dataclass

from entropy_probe.estimators.uncertainty import Sampled


@dataclass(frozen=True)
class Pool:
    """How two estimates go together.

    Attributes:
        weight: of the first; the other has the rest.
        z: the second minus the first, over the error of that difference.
    """

    weight: float
    z: float

    def value(self, one: Sampled, other: Sampled) -> float:
        """Both together."""
        return self.weight * one.value + (1 - self.weight) * other.value

    def standard_error(self, one: Sampled, other: Sampled) -> float:
        """The error of both together, where theirs are uncorrelated."""
        return ((self.weight * one.standard_error) ** 2 + ((1 - self.weight) * other.standard_error) ** 2) ** 0.5


def pool(one: Sampled, other: Sampled) -> Pool:
    """Weights inverse to the variances, ``SE_2^2 / (SE_1^2 + SE_2^2)``, and the z of the difference.

    Raises:
        ValueError: if neither has an error.
    """
    variances = one.standard_error**2, other.standard_error**2
    if not sum(variances) > 0:
        raise ValueError("pooled: expected errors above 0 to weight two batches by, got 0 for both; use one of them")
    return Pool(variances[1] / sum(variances), (other.value - one.value) / sum(variances) ** 0.5)
