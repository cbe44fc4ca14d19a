"""Student's t, for every interval and every verdict: with few independent units 1.96 standard errors are too few.

A standard error from ``n`` units has ``n - 1`` degrees of freedom. See ``docs/theory.md``, "Units and standard errors".
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

__all__ = ["combined_degrees", "critical_value"]

COVERAGE = 0.95


@lru_cache(maxsize=1024)
def critical_value(degrees_of_freedom: int | float) -> float:
    """How many standard errors a 95% interval reaches to either side, by Student's t.

    12.7 for 1 degree of freedom, 2.26 for 9, 1.98 for 99, and towards 1.96.

    Raises:
        ValueError: without a positive number of degrees of freedom, for which there is no interval.
    """
    from scipy.special import stdtrit

    if not degrees_of_freedom > 0:
        raise ValueError(
            f"interval: expected a standard error from at least 2 independent units, got {degrees_of_freedom + 1:g}"
        )
    return float(stdtrit(degrees_of_freedom, 0.5 + COVERAGE / 2))


def combined_degrees(parts: Iterable[tuple[float, float]]) -> float:
    """Degrees of freedom of a standard error that combines independent ones in quadrature.

    ``(sum se^2)^2 / sum(se^4 / df)``: between the least and the sum of theirs. Source: Welch (1938); Satterthwaite
    (1946).

    Args:
        parts: standard error and degrees of freedom of each.
    """
    parts = list(parts)
    largest = max(error for error, _ in parts)
    if largest == 0:
        return min(degrees for _, degrees in parts)
    shares = [((error / largest) ** 2, degrees) for error, degrees in parts]
    return sum(share for share, _ in shares) ** 2 / sum(share**2 / degrees for share, degrees in shares)
