"""Student's t, for every interval and every verdict: with few clusters 1.96 standard errors are too few.

A standard error from ``n`` clusters has ``n - 1`` degrees of freedom, or fewer where they are skew. See
``docs/theory.md``, "Clusters and standard errors".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

OUTSIDE = 0.05
"""What a 95% interval leaves out, half of it at either end."""


@lru_cache(maxsize=1024)
def critical_value(degrees_of_freedom: int | float) -> float:
    """How many standard errors a 95% interval reaches to either side, by Student's t, to 1e-9.

    12.7 for 1 degree of freedom, 2.26 for 9, 1.98 for 99, and towards 1.96. By bisection, without scipy, which a report
    does not need otherwise.

    Raises:
        ValueError: without a positive number of degrees of freedom, for which there is no interval.
    """
    if not degrees_of_freedom > 0:
        raise ValueError(
            f"interval: expected a standard error from at least 2 independent clusters, got {degrees_of_freedom + 1:g}"
        )
    low, high, degrees = 1.0, 2.0, float(degrees_of_freedom)
    while _outside(high, degrees) > OUTSIDE:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _outside(middle, degrees) > OUTSIDE else (low, middle)
    return (low + high) / 2


def degrees_of(clusters: int, skewness: float) -> float:
    """Degrees of freedom of a standard error from so many clusters of this skewness; ``n - 1`` where that is chance.

    With skew clusters the error depends on the estimate: it is small where the clusters of the long tail are missing.
    At another mean ``m`` their variance would be ``s^2 (1 + g (m - mean) / s)``. All ``m`` that a test with this
    variance and ``t`` of ``n - 1`` degrees does not refuse are an interval of half-length ``f t`` standard errors,
    ``f = sqrt(1 + t^2 g^2 / 4n)``. The degrees returned are those whose critical value is ``f t``. ``g^2`` is the
    square of the skewness less what it is on average in normal samples. Source: Johnson (1978), Modified t tests and
    confidence intervals for asymmetrical populations.
    """
    n = clusters
    square = skewness**2 - 6 * (n - 2) / ((n + 1) * (n + 3))
    if not square > 0:
        return float(n - 1)
    critical = critical_value(n - 1)
    wide = critical * math.sqrt(1 + critical**2 * square / (4 * n))
    low, high = 0.0, float(n - 1)
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _outside(wide, middle) > OUTSIDE else (low, middle)
    return high


def _outside(t: float, degrees: float) -> float:
    """The probability that Student's t is farther from 0 than ``t``: ``I_x(degrees / 2, 1 / 2)``, incomplete beta."""
    x, a, b = degrees / (degrees + t * t), degrees / 2, 0.5
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    return _incomplete_beta(x, a, b)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """``I_x(a, b)`` for ``x <= (a + 1) / (a + b + 2)``, by the continued fraction of DLMF 8.17.22, from its end."""
    fraction = 1.0
    for m in range(200, 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        fraction = 1 + odd / (1 + even / fraction)
    front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(front) / (a * fraction)


def combined_degrees(parts: Iterable[tuple[float, int | float]]) -> float:
    """Degrees of freedom of a standard error that combines independent ones in quadrature.

    ``(sum se^2)^2 / sum(se^4 / df)``: between the least and the sum of theirs. Source: Welch (1938); Satterthwaite
    (1946).

    Args:
        parts: standard error and degrees of freedom of each.
    """
    parts = list(parts)
    largest = max(error for error, _ in parts)
    if largest == 0:
        return float(min(degrees for _, degrees in parts))
    shares = [((error / largest) ** 2, degrees) for error, degrees in parts]
    return sum(share for share, _ in shares) ** 2 / sum(share**2 / degrees for share, degrees in shares)
