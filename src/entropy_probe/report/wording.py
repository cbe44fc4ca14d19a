"""Names that sections, files and judgements share."""

from __future__ import annotations

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
