"""How many evaluation sequences an error takes, and how long one takes here, from what a probe has measured."""

from __future__ import annotations

import math
from typing import NamedTuple

from entropy_probe.results.probe import ProbeResult

PHASES = ("score evaluation", "evaluation gradient", "length gradient", "score after step", "score opposite step")
"""What takes a time in proportion to the evaluation batch."""
SAMPLING = "sample evaluation"


class Size(NamedTuple):
    """What an error takes.

    Attributes:
        sequences: of an evaluation batch drawn like the one that was probed.
        at_least: whether the change is not told from 0, so that the size is that for the largest one not excluded.
    """

    sequences: int
    at_least: bool


def size_for(result: ProbeResult, relative_error: float) -> Size | None:
    """The size at which the error from the evaluation rollouts is this share of the predicted change.

    ``None`` without a prediction on evaluation rollouts, or for one of exactly 0.
    """
    predicted = result.predicted
    if predicted is None or predicted.se_update_method == "pairs" or not predicted.value:
        return None
    margin = predicted.of_this_step.margin
    ratio = predicted.se_evaluation / (relative_error * max(abs(predicted.value), margin))
    sequences = result.diagnostics.num_evaluation_sequences * ratio**2
    return Size(max(2, math.ceil(sequences)), abs(predicted.value) <= margin)


def seconds_per_sequence(result: ProbeResult) -> float | None:
    """What one more evaluation sequence takes to sample and probe; ``None`` where none was sampled here."""
    sampled, timing = result.timing.get(SAMPLING), result.timing
    if not sampled:
        return None
    return (sampled + sum(timing.get(phase, 0.0) for phase in PHASES)) / result.diagnostics.num_evaluation_sequences
