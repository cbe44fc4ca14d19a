"""Numbers of a run's steps as points and charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from entropy_probe.report.sections.base import Axis, Curve, LineChart, Point, reach
from entropy_probe.results.estimate import Estimate
from entropy_probe.results.live import Number, StepRecord

DRAWN = 600
"""Steps in a chart."""

Steps: TypeAlias = Sequence[StepRecord]


def cumulated(probed: Steps) -> list[tuple[int, float, float]]:
    """The predictions of all steps since the first probed one, added up: step, sum until it, and the sum's error.

    Between probed steps the prediction is interpolated linearly. Up to the first step that was not predicted.
    """
    sums, weights, value = [], [0.0], 0.0
    predicted: list[Estimate] = []
    for k, record in enumerate(probed):
        if record.predicted is None:
            break
        predicted.append(record.predicted)
        if k:
            gap = record.step - probed[k - 1].step
            weights[-1] += (gap + 1) / 2
            weights.append((gap - 1) / 2)
            value = sum(w * p.value for w, p in zip(weights, predicted, strict=True))
        error = math.hypot(*(w * p.standard_error for w, p in zip(weights, predicted, strict=True)))
        sums.append((record.step, value, error))
    return sums


def chart_of(
    title: str,
    curves: Sequence[Curve],
    unit: str,
    caption: str,
    shaded: tuple[float, float, str] | None = None,
    zero: bool = False,
) -> list[LineChart]:
    """The chart of these curves over the steps; none without points."""
    drawn = [curve for curve in curves if curve.points]
    points = [point for curve in drawn for point in curve.points]
    if not points:
        return []
    ends = reach(drawn) + [0.0] * zero
    steps = [point.x for point in points]
    x = Axis.around((min(steps) - 0.5, max(steps) + 0.5), "optimizer step", share=0.0)
    return [
        LineChart(title, tuple(drawn), x, Axis.around(ends, unit), f"{unit}; {caption}" if unit else caption, shaded)
    ]


def points_of(records: Steps, pick: Callable[[StepRecord], Estimate | None]) -> tuple[Point, ...]:
    """An estimate of every step that has it, with its interval."""
    picked = [(record.step, one) for record in records if (one := pick(record)) is not None]
    return tuple(Point(float(step), one.value, one.margin) for step, one in thinned(picked, DRAWN))


def logged_points(records: Steps, what: Number) -> tuple[Point, ...]:
    """What the trainer logged, or recorded of the step, of something."""
    picked = [(record.step, x) for record in records if (x := record.number(what)) is not None]
    return tuple(Point(float(step), x) for step, x in thinned(picked, DRAWN))


def thinned(items: Sequence, most: int) -> Sequence:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]
