"""A sweep over learning rates: up to which rate the change is linear, and what was fitted to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias

from entropy_probe.report.numbers import format_number, format_percent
from entropy_probe.report.sections.base import (
    Axis,
    BarChart,
    Curve,
    LineChart,
    Point,
    Row,
    Rows,
    Section,
    Table,
    Verbatim,
    reach,
    written,
)
from entropy_probe.report.sections.diagnostics import diagnostics_section, optimizer_section
from entropy_probe.report.sections.horizons import within
from entropy_probe.report.sections.run import cautions, settings_sections, step_section
from entropy_probe.results.probe import ProbeResult
from entropy_probe.results.student import critical_value
from entropy_probe.results.sweep import Sweep, SweepPoint

TITLE = "Entropy change at different learning rates"
RATE = "learning rate η"
Points: TypeAlias = tuple[Point, ...]


def sweep_sections(sweeps: Mapping[str, Sweep], config: str | None = None) -> tuple[Section, ...]:
    """Everything that is shown of a sweep, or of several by the checkpoint's name; a single one has the name ""."""
    if len(sweeps) > 1 or "" not in sweeps:
        each = (_one_of_several(sweep, name, k) for k, (name, sweep) in enumerate(sweeps.items()))
        return _summary(sweeps), *each, *settings_sections(config)
    sweep = sweeps[""]
    prediction = sweep.prediction
    optimizer = optimizer_section(prediction.optimizer_state)
    settings = settings_sections(config, prediction)
    return sweep_section(sweep), _largest_step(prediction), diagnostics_section(prediction), optimizer, *settings


def _largest_step(prediction: ProbeResult) -> Section:
    """The parts of the step; the rest of what is said of a run is in the sweep."""
    step = step_section(prediction)
    blocks = tuple(block for block in step.blocks if not (isinstance(block, BarChart) and block.figure == "change"))
    one = Section("The step at the largest rate", step.key, step.short, blocks=blocks, page_only=True)
    return one.without_figures()


def sweep_section(sweep: Sweep) -> Section:
    """One sweep."""
    end = sweep.linear_range.learning_rate
    points = Table(
        title="Numbers of the sweep",
        columns=("rate η", "realized ΔH", "predicted δH₁", "ΔH/δH₁", "ESS"),
        rows=tuple(_cells(point) for point in sweep.points),
        mark="linear",
        marked=tuple(end is not None and point.learning_rate <= end for point in sweep.points),
    )
    fits = _fits(sweep)
    blocks = (_changes(sweep), *_sizes(sweep), *_ratios(sweep), points, *([Rows(fits)] if fits else []))
    of = "" if sweep.horizon is None else f", {within(sweep.horizon)} of a changed one"
    subtitle = f"{len(sweep.points)} rates, {sweep.unit}{of}"
    return Section(TITLE, "sweep", "Sweep", subtitle, None, (sweep_sentence(sweep),),
                   cautions=cautions(sweep.prediction), blocks=blocks, notes=sweep.notes)  # fmt: skip


def _one_of_several(sweep: Sweep, name: str, k: int) -> Section:
    """On the page only, and without notes, which the summary has."""
    one = sweep_section(sweep).without_figures()
    return replace(one, title=Verbatim(name), key=f"sweep-{k}", short="", subtitle="", notes=(), page_only=True)


def _cells(point: SweepPoint) -> tuple[str, ...]:
    rate, predicted = f"{point.learning_rate:.3g}", written(point.predicted)
    if point.realized is None:
        return rate, "failed", predicted, "", ""
    marks = "" if point.status == "ok" else f" {point.status.replace('_', ' ')}"
    ess = f"{format_percent(point.realized.ess_fraction)}{marks}"
    if point.estimate is None:
        return rate, "refused", predicted, "", ess
    ratio = point.estimate.value / point.predicted.value if point.predicted.value else None
    return rate, written(point.estimate), predicted, "undefined" if ratio is None else format_number(ratio, 4), ess


def _fits(sweep: Sweep) -> tuple[Row, ...]:
    """What was fitted to the points: name, number, and what it is."""
    rows = []
    if sweep.power_law is not None:
        rows.append(("log-log slope", sweep.power_law.slope, f"R² {sweep.power_law.r_squared:.5f}; 1 is linear"))
    if sweep.fit is not None:
        reach = f"{len(sweep.fit.learning_rates)} rates to {sweep.fit.learning_rates[-1]:.3g}"
        rows.append(("slope at 0", sweep.fit.linear, f"per unit of η, from {reach}"))
    if sweep.curvature.from_fit is not None:
        rows.append(("curvature, fit", sweep.curvature.from_fit, "per squared unit of η"))
    if sweep.curvature.direct is not None:
        rows.append(("curvature, direct", sweep.curvature.direct, "by forward-mode differentiation"))
    if sweep.learning_rate_star is not None:
        rows.append(("star rate", sweep.learning_rate_star, "where both parts of the fit cancel"))
    return tuple(Row(label, written(fitted), note) for label, fitted, note in rows)


def sweep_sentence(sweep: Sweep) -> str:
    """Up to where the change is linear, which way entropy goes, and where the fit's two parts would cancel."""
    predicted, linear = sweep.prediction.predicted, sweep.linear_range
    assert predicted is not None
    if linear.learning_rate is None:
        first = "Not linear at any of these rates: add smaller ones."
    else:
        bound = "at least " if linear.at_least else ""
        first = f"Linear up to a learning rate of {bound}{linear.learning_rate:.3g}."
    if not predicted.distinguishable:
        second = "The predicted change does not exceed its 95% margin of error; use more rollouts to resolve it."
    else:
        rate = predicted.value / sweep.points[-1].learning_rate
        way = "falls" if rate < 0 else "rises"
        second = f"For small steps the entropy {way} by {format_number(abs(rate))} {sweep.unit} per unit of η."
    return " ".join(filter(None, (first, second, _star_sentence(sweep))))


def _star_sentence(sweep: Sweep) -> str:
    if sweep.fit is None:
        return ""
    quadratic, star, end = sweep.fit.quadratic, sweep.learning_rate_star, sweep.linear_range.learning_rate
    degrees = sweep.prediction.entropy.num_clusters - 1
    if abs(quadratic.value) <= critical_value(degrees) * quadratic.standard_error:
        return "The curvature does not exceed its 95% margin of error."
    if star is None:
        return "The curvature has the same sign: larger steps change it more than in proportion."
    beyond = ", beyond the linear range and so an extrapolation" if end is None or star.value > end else ""
    return f"The curvature works against it and would cancel it at {star.value:.3g}{beyond}."


def _changes(sweep: Sweep) -> LineChart:
    """The changes themselves, and the fit, from a rate of 0 on; for papers."""
    ok = [point for point in sweep.points if point.status == "ok"]
    shown, origin = ok or list(sweep.points), Point(0.0, 0.0)
    curves = [Curve("predicted", "predicted δH₁", (origin, *_predicted(shown)), "band")]
    if ok:
        curves.append(Curve("realized", "realized ΔH", (origin, *_measured(ok)), "band"))
    largest = shown[-1].learning_rate
    if sweep.fit is not None:
        a, b = sweep.fit.linear.value, sweep.fit.quadratic.value
        rates = [largest * k / 100 for k in range(101)]
        label = f"fit aη + bη² to η ≤ {sweep.fit.learning_rates[-1]:.3g}"
        curves.append(Curve("fit", label, tuple(Point(x, a * x + b * x * x) for x in rates)))
    y = Axis.around(reach(curves), f"entropy change ({sweep.unit})")
    return LineChart("Entropy change", tuple(curves), Axis.around((0.0, largest), RATE), y, "bands: 95% intervals",
                     _linear(sweep, 0.0), "sweep", on_page=False)  # fmt: skip


def _sizes(sweep: Sweep) -> list[LineChart]:
    predicted, measured = (
        tuple(replace(point, y=abs(point.y)) for point in points if point.y)
        for points in (_predicted(sweep.points), _measured(sweep.points))
    )
    sizes = [point.y for point in (*predicted, *measured)]
    if not sizes:
        return []
    low, high = 10.0 ** math.floor(math.log10(min(sizes))), 10.0 ** math.ceil(math.log10(max(sizes) * 1.01))
    y = Axis(low, high, logarithmic=True, label=f"size of the change ({sweep.unit})")
    slope = f"; slope {sweep.power_law.slope.value:.4f} over the linear range" if sweep.power_law is not None else ""
    caption = f"|ΔH| against the learning rate η, both logarithmic{slope}; whiskers: 95% intervals"
    return [_against_rate("Size of the change", sweep, predicted, measured, y, caption, "sweep")]


def _ratios(sweep: Sweep) -> list[LineChart]:
    measured = tuple(
        Point(p.learning_rate, e.value / p.predicted.value, _ratio_margin(p), p.status == "ok")
        for p in sweep.points
        if (e := p.estimate) is not None and p.predicted.value
    )
    if not measured:
        return []
    ends = [x for point in measured for x in point.ends]
    y = Axis.around((max(-1.0, min(0.9, *ends)), min(3.0, max(1.1, *ends))), "ΔH/δH₁", share=0.08)
    x = _rates([sweep])
    one = (Point(x.low, 1.0), Point(x.high, 1.0))
    caption = (
        "ΔH/δH₁ against η, 1 where the change is linear; whiskers: 95% intervals of the paired difference, over δH₁"
    )
    return [_against_rate("Realized over predicted", sweep, one, measured, y, caption)]


def _against_rate(
    title: str, sweep: Sweep, predicted: Points, measured: Points, y: Axis, caption: str, figure: str = ""
) -> LineChart:
    curves = Curve("predicted", "predicted δH₁", predicted), Curve("realized", "realized ΔH", measured, "points")
    x = _rates([sweep])
    return LineChart(title, curves, x, y, caption, _linear(sweep, x.low), figure)


def _ratio_margin(point: SweepPoint) -> float:
    """From the paired difference: both share their sampling noise, which cancels in the ratio."""
    return abs(point.difference.margin / point.predicted.value) if point.difference is not None else 0.0


def _predicted(points: Iterable[SweepPoint]) -> Points:
    return tuple(Point(p.learning_rate, p.predicted.value, p.predicted.margin) for p in points)


def _measured(points: Iterable[SweepPoint]) -> Points:
    """Those that have a measurement."""
    return tuple(
        Point(p.learning_rate, e.value, e.margin, p.status == "ok") for p in points if (e := p.estimate) is not None
    )


def _rates(sweeps: Iterable[Sweep]) -> Axis:
    rates = [point.learning_rate for sweep in sweeps for point in sweep.points]
    return Axis(min(rates) / 1.6, max(rates) * 1.6, logarithmic=True, label=RATE)


def _linear(sweep: Sweep, start: float) -> tuple[float, float, str] | None:
    end = sweep.linear_range.learning_rate
    return None if end is None else (start, end, "linear range")


def _summary(sweeps: Mapping[str, Sweep]) -> Section:
    """Several sweeps beside each other."""
    unit = next(iter(sweeps.values())).unit
    columns = ("checkpoint", "entropy", "slope at 0", "linear up to", "star rate")
    table = Table("Sweeps by checkpoint", columns, tuple((Verbatim(k), *_summary_cells(x)) for k, x in sweeps.items()))
    notes = tuple(note.about(name) for name, sweep in sweeps.items() for note in sweep.notes)
    subtitle = f"{len(sweeps)} checkpoints, {unit}"
    return Section(TITLE, "sweep", "Sweep", subtitle, blocks=(table, *_comparison(sweeps, unit)), notes=notes)


def _summary_cells(sweep: Sweep) -> tuple[str, str, str, str]:
    end, star = sweep.linear_range, sweep.learning_rate_star
    bound = "none" if end.learning_rate is None else f"{'≥ ' if end.at_least else ''}{end.learning_rate:.3g}"
    slope = "no fit" if sweep.fit is None else written(sweep.fit.linear)
    return written(sweep.prediction.entropy), slope, bound, "none" if star is None else written(star)


def _comparison(sweeps: Mapping[str, Sweep], unit: str) -> tuple[LineChart, LineChart]:
    """The change over the rate, and the end of the linear range, of every checkpoint; for papers."""
    rates, scaled, ranges = _rates(sweeps.values()), [], []
    for k, (name, sweep) in enumerate(sweeps.items()):
        points = (replace(p, y=p.y / p.x, margin=p.margin / p.x) for p in _measured(sweep.points) if p.usable)
        scaled.append(Curve("", name, tuple(points), "band"))
        end = sweep.linear_range
        at = () if end.learning_rate is None else (Point(float(k), end.learning_rate, usable=not end.at_least),)
        ranges.append(Curve("", "", at, "points"))
    y = Axis.around((0.0, *reach(scaled)), f"ΔH / η ({unit} per unit of η)")
    across, end = Axis(-0.5, len(sweeps) - 0.5, names=tuple(sweeps)), replace(rates, label="end of the linear range")
    return (
        LineChart("Change over rate", tuple(scaled), rates, y, "bands: 95% intervals", None, "sweeps", on_page=False),
        LineChart("Linear range", tuple(ranges), across, end, "hollow: at least", None, "sweeps", on_page=False),
    )
