"""A sweep with chosen numbers."""

from __future__ import annotations

from typing import Any

from entropy_probe.report import page, sweep_sections
from entropy_probe.results.probe import Estimate, Predicted, Realized
from entropy_probe.results.sweep import Curvature, Fitted, LinearRange, PowerLawFit, QuadraticFit, Sweep, SweepPoint
from tests.report.results import COMMON, make_result


def sweep_page(sweeps: dict[str, Sweep], name: str = "", **settings: Any) -> str:
    """The page of a sweep, or of several."""
    return page(sweep_sections(sweeps, **settings), name=name)


RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def make_sweep(a: float = -9.0, b: float = 570.0, *, error: float = 0.3, end: float | None = 1e-3, **changes) -> Sweep:
    """A sweep along ``a lr + b lr^2``, the last rate beyond what can be measured."""
    points = []
    for rate in RATES:
        value, spread = a * rate + b * rate**2, error * rate
        predicted = Predicted(value=a * rate, standard_error=spread, se_evaluation=spread, se_update=0, **COMMON)
        status = "low_ess" if rate == RATES[-1] else "ok"
        low = status == "low_ess"
        realized = Realized(value=None if low else value, standard_error=None if low else spread, status=status,
                            estimator="per_decision", ess=200, ess_fraction=0.1 if low else 0.9, max_weight=2,
                            pareto_k=0.2, pareto_k_threshold=0.7, noise_floor=1e-8, step_rounding=0.0,
                            **COMMON)  # fmt: skip
        difference = Estimate(value=value - predicted.value, standard_error=0.1 * spread, **COMMON)
        points.append(SweepPoint(learning_rate=rate, predicted=predicted, realized=realized,
                                 difference=None if low else difference))  # fmt: skip
    star = -a / b if b else -1.0
    settings = {
        "prediction": make_result((a * RATES[-1], error * RATES[-1]), None, None),
        "own_learning_rates": (3e-4,),
        "points": tuple(points),
        "linear_range": LinearRange(learning_rate=end, at_least=False),
        "fit": QuadraticFit(
            linear=Fitted(value=a, standard_error=error),
            quadratic=Fitted(value=b, standard_error=50.0),
            r_squared=0.9999,
            learning_rates=RATES[:3],
        ),
        "power_law": PowerLawFit(
            slope=Fitted(value=0.99, standard_error=1e-3), r_squared=0.9999, learning_rates=RATES[:4]
        ),
        "curvature": Curvature(
            from_fit=Fitted(value=2 * b, standard_error=100.0), direct=Fitted(value=2 * b, standard_error=90.0)
        ),
        "learning_rate_star": Fitted(value=star, standard_error=0.1 * star) if star > 0 else None,
    }
    return Sweep(**settings | changes)
