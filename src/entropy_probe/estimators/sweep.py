"""From changes at several learning rates to a slope, a curvature and the range over which the change is linear.

Formulas: ``docs/theory.md``, "Sweeps and curvature". All rates are measured on the same clusters, so their errors are
strongly correlated: coefficients are linear in the changes, and so are their influences. The scatter about a fitted
curve is not used as an error, since noise common to all rates does not scatter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entropy_probe.estimators.uncertainty import Sampled

LINEAR_TOLERANCE = 0.1
"""How far the change may be from the prediction within the linear range, relative to the prediction."""
FIT_REACH = 1 / 3
"""The quadratic is fitted to rates up to this share of the linear range, where the next order is small beside it."""
MIN_RATES = 3
"""Rates that a fit needs; two determine the curve exactly and say nothing about how well it fits."""


@dataclass(frozen=True, eq=False)
class Coefficient(Sampled):
    """A number that is, to first order, linear in the changes.

    Attributes:
        weights: its derivative by each change, ``[K]``.
    """

    weights: Float[Tensor, " K"]

    def error(self, rounding: float) -> float:
        """One standard error, from sampling and from independent rounding errors of that size in every change."""
        return (self.standard_error**2 + (rounding * self.weights.norm().item()) ** 2) ** 0.5


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The curve ``linear * lr + quadratic * lr^2``.

    Attributes:
        linear: slope at 0, nats (per token or sequence) per unit of learning rate.
        quadratic: half the second derivative, nats per squared unit of learning rate.
        r_squared: ``1 - sum (y - fit)^2 / sum y^2``; about 0, as the curve has no intercept.
    """

    linear: Coefficient
    quadratic: Coefficient
    r_squared: float


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """``|change|`` as a power of the learning rate.

    Attributes:
        slope: the exponent; 1 where the change is linear.
        r_squared: share of the variance of ``log |change|`` that the line explains.
    """

    slope: Sampled
    r_squared: float


def _check(learning_rates: Tensor, least: int = MIN_RATES) -> Tensor:
    rates = learning_rates.double()
    if len(rates) < least or bool((rates <= 0).any() | (rates.diff() <= 0).any()):
        raise ValueError(
            f"learning rates: expected at least {least}, positive and increasing, got {learning_rates.tolist()}"
        )
    return rates


def quadratic(
    learning_rates: Float[Tensor, " K"], changes: Float[Tensor, " K"], influences: Float[Tensor, "K U"]
) -> Quadratic:
    """Least squares of ``change = a lr + b lr^2``.

    All changes have the same weight. Their sampling noise grows with the rate, but it is common to all rates and does
    not scatter about the curve; what does is rounding, of one size at all of them. Both coefficients are linear
    in the changes; the same combination of the influences gives their sampling errors. Terms of third order in the
    rate bias ``b``, which is why only rates well inside the linear range should be given (``FIT_REACH``).

    Args:
        learning_rates: positive and increasing, at least three.
        changes: the change measured at each rate, nats.
        influences: of each cluster on each change.

    Raises:
        ValueError: for fewer or unordered rates.
    """
    rates = _check(learning_rates)
    scale = rates[-1]
    x = rates / scale
    for_a, for_b = torch.linalg.pinv(torch.stack([x, x**2], 1))
    y = changes.double()
    a, b = (Coefficient((c @ y).item(), c @ influences.double(), c) for c in (for_a / scale, for_b / scale**2))
    residual = y - a.value * rates - b.value * rates**2
    total = y.square().sum()
    explained = 1.0 if total == 0 else 1 - (residual.square().sum() / total).item()
    return Quadratic(a, b, explained)


def power_law(
    learning_rates: Float[Tensor, " K"], changes: Float[Tensor, " K"], influences: Float[Tensor, "K U"]
) -> PowerLaw | None:
    """Least squares of ``log |change|`` on ``log lr``; the influence on a logarithm is ``influence / change``.

    Args:
        learning_rates: positive and increasing, at least three.
        changes: the change measured at each rate, nats.
        influences: of each cluster on each change.

    Returns:
        ``None`` if the changes are 0 somewhere or differ in sign, since no power of the rate describes them.

    Raises:
        ValueError: for fewer or unordered rates.
    """
    rates, y = _check(learning_rates), changes.double()
    if not bool((y > 0).all() | (y < 0).all()):
        return None
    x, log_y = rates.log(), y.abs().log()
    centred = x - x.mean()
    weights = centred / centred.square().sum()
    slope = weights @ log_y
    residual = log_y - log_y.mean() - slope * centred
    total = (log_y - log_y.mean()).square().sum()
    explained = 1.0 if total == 0 else 1 - (residual.square().sum() / total).item()
    return PowerLaw(Sampled(slope.item(), weights @ (influences.double() / y[:, None])), explained)


def linear_range(
    predicted: Float[Tensor, " K"],
    predicted_errors: Float[Tensor, " K"],
    realized: Float[Tensor, " K"],
    measured: Bool[Tensor, " K"],
) -> int | None:
    """The last rate up to which the measured change stays within a tenth of the predicted one.

    A rate complies if ``|realized - predicted| <= 0.1 max(|predicted|, SE of predicted)``. All smaller rates have to
    comply as well. A rate without a usable measurement does not comply, except below the first usable one, where a
    change can be too small to measure: those rates decide nothing.

    Args:
        predicted: first-order changes, by increasing rate.
        predicted_errors: their standard errors.
        realized: measured changes; ignored where not ``measured``.
        measured: where the measurement can be used.

    Returns:
        The index of that rate, or ``None`` if there is none.
    """
    tolerance = LINEAR_TOLERANCE * torch.maximum(predicted.abs(), predicted_errors)
    complies = measured & ((realized - predicted).abs() <= tolerance)
    last = None
    for k in range(int(measured.int().argmax()) if bool(measured.any()) else len(measured), len(measured)):
        if not bool(complies[k]):
            break
        last = k
    return last


def cancelling_rate(curve: Quadratic) -> Coefficient | None:
    """``-a / b``, the rate at which the linear and the quadratic part cancel, with its influence by the delta method.

    Returns:
        ``None`` unless it is positive and finite: otherwise the two parts have the same sign and never cancel.
    """
    a, b = curve.linear, curve.quadratic
    if a.value * b.value >= 0:
        return None
    rate = -a.value / b.value
    influence, weights = (-(x + rate * y) / b.value for x, y in ((a.influence, b.influence), (a.weights, b.weights)))
    return (
        Coefficient(rate, influence, weights) if bool(torch.isfinite(influence).all()) and rate < float("inf") else None
    )
