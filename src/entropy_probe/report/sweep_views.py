"""What the page says of a sweep over learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from entropy_probe.report.charts import Axis, Curve, Marker, line_chart
from entropy_probe.report.numbers import format_estimate, typeset
from entropy_probe.report.sweep import fit_rows, point_row, sweep_sentence
from entropy_probe.results.note import Note
from entropy_probe.results.sweep import Sweep, SweepPoint

__all__ = ["SweepView", "sweep_view"]


@dataclass(frozen=True)
class SweepView:
    """A sweep for the template.

    Attributes:
        name: of the checkpoint; "" for a single one.
        sentence: what the sweep says.
        sizes: chart of the size of the change against the rate, both logarithmic; None if every change is 0.
        ratios: chart of measured over predicted; None likewise.
        rows: of each rate: the rate, four columns as written, and whether it is in the linear range.
        fits: name, number, what it is.
        notes: on the sweep.
    """

    name: str
    sentence: str
    sizes: dict[str, Markup] | None
    ratios: dict[str, Markup] | None
    rows: tuple[tuple[str, tuple[str, ...], bool], ...]
    fits: tuple[tuple[str, str, str], ...]
    notes: tuple[Note, ...]


def sweep_view(sweep: Sweep, name: str = "") -> SweepView:
    """Everything the page shows of one sweep."""
    end = sweep.linear_range.learning_rate
    return SweepView(
        name=name,
        sentence=typeset(sweep_sentence(sweep)),
        sizes=_sizes(sweep),
        ratios=_ratios(sweep),
        rows=tuple(
            (
                typeset(f"{point.learning_rate:.3g}"),
                tuple(typeset(text.strip()) for text in point_row(point)),
                end is not None and point.learning_rate <= end,
            )
            for point in sweep.points
        ),
        fits=tuple(
            (label, typeset(format_estimate(fitted.value, fitted.standard_error)), note)
            for label, fitted, note in fit_rows(sweep)
        ),
        notes=sweep.notes,
    )


def _sizes(sweep: Sweep) -> dict[str, Markup] | None:
    predicted = [(p.learning_rate, abs(p.predicted.value)) for p in sweep.points if p.predicted.value]
    measured = [
        Marker(p.learning_rate, abs(e.value), e.margin, p.status == "ok")
        for p in sweep.points
        if (e := p.estimate) is not None and e.value
    ]
    sizes = [y for _, y in predicted] + [marker.y for marker in measured]
    if not sizes:
        return None
    curves = [Curve("predicted", "", predicted), Curve("realized", "", markers=measured)]
    return line_chart(curves, _rates(sweep), _powers(min(sizes), max(sizes)), _linear(sweep))


def _ratios(sweep: Sweep) -> dict[str, Markup] | None:
    found = [
        Marker(p.learning_rate, e.value / p.predicted.value, _ratio_margin(p), p.status == "ok")
        for p in sweep.points
        if (e := p.estimate) is not None and p.predicted.value
    ]
    if not found:
        return None
    ends = [x for m in found for x in (m.y - m.margin, m.y + m.margin)]
    low, high = max(-1.0, min(0.9, *ends)), min(3.0, max(1.1, *ends))
    x, margin = _rates(sweep), 0.08 * (high - low)
    curves = [Curve("predicted", "", [(x.low, 1.0), (x.high, 1.0)]), Curve("realized", "", markers=found)]
    return line_chart(curves, x, Axis(low - margin, high + margin), _linear(sweep))


def _ratio_margin(point: SweepPoint) -> float:
    """From the paired difference: both share their sampling noise, which cancels in the ratio."""
    return abs(point.difference.margin / point.predicted.value) if point.difference is not None else 0.0


def _rates(sweep: Sweep) -> Axis:
    rates = [point.learning_rate for point in sweep.points]
    return Axis(rates[0] / 1.6, rates[-1] * 1.6, logarithmic=True)


def _powers(low: float, high: float) -> Axis:
    return Axis(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high * 1.01)), logarithmic=True)


def _linear(sweep: Sweep) -> tuple[float, float] | None:
    end = sweep.linear_range.learning_rate
    return None if end is None else (sweep.points[0].learning_rate / 1.6, end)
