"""The page's charts as inline SVG: positions in percent, so that they fit any width while text keeps its size.

Colours come from the page's style sheet by class, so one drawing serves light and dark. Every number drawn is also
written beside the drawing, which is hidden from screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from entropy_probe.report.numbers import common_exponent, typeset
from entropy_probe.report.sections.base import Axis, Bar, BarChart, HeatMap, LineChart

ROW, BAR = 30, 12
PLOT_HEIGHT = 240
LEVELS = 6
_TOP, _BOTTOM = (ROW - BAR) / 2, (ROW + BAR) / 2


def draw_bars(chart: BarChart) -> tuple[list[tuple[Bar, Markup]], Markup, str]:
    """Each bar with its drawing, the axis under them, and its scale in words."""
    low, high = (pick(x for bar in chart.bars for x in (0.0, *bar.reach)) for pick in (min, max))
    exponent = common_exponent(low, high)
    assert exponent is not None, "a chart of zeros"
    axis = Axis.around((low, high))
    power = 0 if -3 < exponent < 4 else exponent
    ticks = [(_percent(axis, x), _tick(x / 10.0**power)) for x in axis.ticks()]
    lines = "".join(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{ROW}"/>' for x, _ in ticks)
    followed = [later.linked for later in chart.bars[1:]] + [False]
    rows = [(bar, _bar(bar, axis, lines, link)) for bar, link in zip(chart.bars, followed, strict=True)]
    labels = "".join(f'<text x="{x}" y="14">{label}</text>' for x, label in ticks)
    scale = chart.unit if power == 0 else f"{typeset(f'1e{power}')[1:]} {chart.unit}"
    return rows, _svg(labels, 18, "axis"), scale


def _bar(bar: Bar, axis: Axis, grid: str, followed: bool) -> Markup:
    start, end, zero = _percent(axis, bar.start), _percent(axis, bar.end), _percent(axis, 0.0)
    sign = "up" if bar.value > 0 else "down"
    parts = [grid, f'<line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="{ROW}"/>']
    if bar.linked:
        parts.append(f'<line class="link" x1="{start}" x2="{start}" y1="0" y2="{_TOP}"/>')
    if followed:
        parts.append(f'<line class="link" x1="{end}" x2="{end}" y1="{_BOTTOM}" y2="{ROW}"/>')
    if bar.look != "dot":
        left, right = sorted((axis.at(bar.start), axis.at(bar.end)))
        look = f"{sign} total" if bar.look == "total" else sign
        width = f"{100 * (right - left):.3f}%"
        parts.append(f'<rect class="{look}" x="{100 * left:.3f}%" width="{width}" y="{_TOP}" height="{BAR}"/>')
    if bar.margin:
        low, high = (_percent(axis, bar.end + k * bar.margin) for k in (-1, 1))
        middle = ROW / 2
        parts.append(f'<line class="whisker" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>')
        for x in (low, high):
            parts.append(f'<line class="whisker" x1="{x}" x2="{x}" y1="{middle - 4}" y2="{middle + 4}"/>')
    if bar.look == "dot":
        parts.append(f'<circle class="{sign}" cx="{end}" cy="{ROW / 2}" r="5"/>')
    return _svg("".join(parts), ROW, "bars")


def draw_lines(chart: LineChart) -> dict[str, Markup]:
    """The parts of a line chart: ``plot``, and the labels along its ``left`` and ``bottom``."""
    x, y, curves, shaded = chart.x, chart.y, chart.curves, chart.shaded

    def height(value: float) -> float:
        return PLOT_HEIGHT * (1 - y.at(value))

    parts = []
    if shaded is not None:
        left, right = x.at(shaded[0]), x.at(shaded[1])
        parts.append(
            f'<rect class="shade" x="{100 * left:.3f}%" width="{100 * (right - left):.3f}%" y="0" '
            f'height="{PLOT_HEIGHT}"/>'
        )
    rows, columns = [(height(v), v) for v in y.ticks(5)], [(_percent(x, v), v) for v in x.ticks(5)]
    parts += [f'<line class="grid" x1="0" x2="100%" y1="{h:.1f}" y2="{h:.1f}"/>' for h, _ in rows]
    parts += [f'<line class="grid" x1="{at}" x2="{at}" y1="0" y2="{PLOT_HEIGHT}"/>' for at, _ in columns]

    def path(points: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{1000 * x.at(across):.1f},{height(up):.1f}" for across, up in points)

    lines = []
    for curve in (curve for curve in curves if curve.style != "points"):
        if curve.style == "band":
            lower, upper = ([(p.x, p.ends[side]) for p in curve.points] for side in (0, 1))
            lines.append(f'<polygon class="{curve.look}" points="{path([*upper, *lower[::-1]])}"/>')
        lines.append(f'<polyline class="{curve.look}" points="{path((p.x, p.y) for p in curve.points)}"/>')
    parts.append(
        f'<svg viewBox="0 0 1000 {PLOT_HEIGHT}" width="100%" height="{PLOT_HEIGHT}" preserveAspectRatio="none">'
        f"{''.join(lines)}</svg>"
    )
    for curve in (curve for curve in curves if curve.style == "points"):
        for point in curve.points:
            at = _percent(x, point.x)
            low, high = map(height, point.ends)
            look = curve.look if point.usable else f"{curve.look} hollow"
            parts.append(f'<line class="{curve.look}" x1="{at}" x2="{at}" y1="{low:.1f}" y2="{high:.1f}"/>')
            parts.append(f'<circle class="{look}" cx="{at}" cy="{height(point.y):.1f}" r="4"/>')
    left = "".join(f'<text x="100%" dx="-6" y="{h + 4:.1f}">{_label(v, y)}</text>' for h, v in rows)
    bottom = "".join(f'<text x="{at}" y="16">{_label(v, x)}</text>' for at, v in columns)
    return {
        "plot": _svg("".join(parts), PLOT_HEIGHT, "lines"),
        "left": _svg(left, PLOT_HEIGHT, "axis left"),
        "bottom": _svg(bottom, 20, "axis"),
    }


@dataclass(frozen=True)
class Cell:
    """A number with the strength of its colour: -6 to 6, by the square root of its share of the largest."""

    text: str
    level: int


def heat_cells(chart: HeatMap) -> tuple[list[tuple[str, list[Cell | None]]], str]:
    """The rows of a heat map, totals last, and what its numbers are in."""
    values = [x for _, numbers in chart.rows for x in numbers if x is not None]
    power = common_exponent(*values, *chart.totals) or 0
    body, total = _colouring(values, power), _colouring(chart.totals, power)
    rows = [(name, [None if x is None else body(x) for x in numbers]) for name, numbers in chart.rows]
    for (_, cells), x in zip(rows, chart.totals, strict=bool(chart.totals)):
        cells.append(total(x))
    return rows, f"{typeset(f'1e{power}')[1:]} {chart.unit}"


def _colouring(values: Sequence[float], power: int) -> Callable[[float], Cell]:
    strongest = max(map(abs, values), default=0.0)

    def cell(value: float) -> Cell:
        level = round(LEVELS * math.sqrt(abs(value) / strongest)) if strongest else 0
        text = f"{value / 10.0**power:.2f}" if value else "0"
        return Cell(typeset(text if float(text) else text.lstrip("-")), int(math.copysign(level, value)))

    return cell


def _percent(axis: Axis, value: float) -> str:
    return f"{100 * axis.at(value):.3f}%"


def _label(value: float, axis: Axis) -> str:
    if axis.names:
        return escape(axis.names[round(value)])
    if axis.logarithmic:
        return typeset(f"1e{round(math.log10(value))}")[2:]
    return _tick(value)


def _tick(value: float) -> str:
    return typeset(f"{value:.6g}") if abs(value) > 1e-12 else "0"


def _svg(content: str, height: int, look: str) -> Markup:
    """Only numbers, and labels made of numbers, ever get into ``content``."""
    return Markup(f'<svg class="{look}" width="100%" height="{height}" aria-hidden="true">{content}</svg>')
