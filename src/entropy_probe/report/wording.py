"""Names and formats that the console and the page share."""

from __future__ import annotations

from entropy_probe.report.numbers import common_exponent
from entropy_probe.results.probe import ProbeResult

__all__ = ["ESTIMATORS", "HARMLESS_ESS", "REPORT_FILE", "RESULT_FIGURES", "UNITS", "column_exponent"]

REPORT_FILE = "report.html"
RESULT_FIGURES = ("change", "parts", "prompts", "layers")

UNITS = {"sequence": "sequences", "prompt": "prompts", "trajectory": "trajectories"}

ESTIMATORS = {
    "per_decision": "per-decision importance weights",
    "snis": "self-normalised importance weights",
    "clip": "self-normalised weights, capped",
    "psis": "Pareto-smoothed weights",
    "resampled": "fresh responses after the step",
}

HARMLESS_ESS = 0.99
"""The share of effective sequences from which on a heavy tail of the weights is not held against them."""


def column_exponent(result: ProbeResult) -> int | None:
    """The power of ten that all changes of a result are written with."""
    changes = [change for change in (result.predicted, result.realized and result.realized.estimate) if change]
    numbers = [number for change in changes for number in (change.value, change.standard_error)]
    if result.cross_prompt is not None:
        numbers += [result.cross_prompt.delta_h1, result.cross_prompt.se_jackknife]
    return common_exponent(*numbers)
