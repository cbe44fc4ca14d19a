"""The page's charts as inline SVG: positions in percent, so that they fit any width while text keeps its size.

Colours come from the page's style sheet by class, so one drawing serves light and dark. Every number drawn is also
written beside the drawing, which is hidden from screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from entropy_probe.report.numbers import common_exponent, typeset

__all__ = ["Axis", "Bar", "BarChart", "Curve", "Marker", "bar_chart", "line_chart"]

ROW, BAR = 30, 12
PLOT_HEIGHT = 240
_TOP, _BOTTOM = (ROW - BAR) / 2, (ROW + BAR) / 2


@dataclass(frozen=True)
class Axis:
    """A linear axis over ``[low, high]``, or a logarithmic one over powers of ten."""

    low: float
    high: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, 0 to 1; what is beyond either end, at that end."""
        low, high = self._scale(self.low), self._scale(self.high)
        share = (self._scale(value) - low) / (high - low) if value > 0 or not self.logarithmic else 0.0
        return min(1.0, max(0.0, share))

    def percent(self, value: float) -> str:
        """``at`` as an SVG length."""
        return f"{100 * self.at(value):.3f}%"

    def ticks(self, about: int = 4) -> list[float]:
        """Round values within the axis, about so many."""
        if self.logarithmic:
            powers = range(math.ceil(self._scale(self.low) - 1e-9), math.floor(self._scale(self.high) + 1e-9) + 1)
            return [10.0**power for power in list(powers)[:: max(1, len(powers) // about)]]
        raw = (self.high - self.low) / about
        power = 10 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
        return [float(step * k) for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart.

    Attributes:
        label: what it is.
        value: the length of the bar, signed.
        text: the value as written beside it.
        margin: how far its 95% interval reaches to either side; None draws none.
        start: where the bar begins; in a waterfall, where the one before ended.
        look: ``bar``, ``total`` (a sum), or ``dot`` (a point on the line).
        linked: whether the bar before ends where this one begins.
        key: of what the row shows, for buttons.
        note: further text.
    """

    label: str
    value: float
    text: str
    margin: float | None = None
    start: float = 0.0
    look: str = "bar"
    linked: bool = False
    key: int | None = None
    note: str = ""

    @property
    def end(self) -> float:
        """Where the bar ends."""
        return self.start + self.value

    @property
    def reach(self) -> tuple[float, float, float]:
        """The values that must be on the axis."""
        margin = self.margin or 0.0
        return self.start, self.end - margin, self.end + margin


@dataclass(frozen=True)
class BarChart:
    """Rows with their drawings, and the axis under them with its scale in words."""

    rows: tuple[tuple[Bar, Markup], ...]
    axis: Markup
    scale: str


def bar_chart(bars: Sequence[Bar], unit: str) -> BarChart | None:
    """Horizontal bars about a common zero line; None where there is nothing but zeros."""
    low, high = (pick(x for bar in bars for x in (0.0, *bar.reach)) for pick in (min, max))
    exponent = common_exponent(low, high)
    if exponent is None:
        return None
    margin = 0.04 * (high - low)
    axis = Axis(low - margin, high + margin)
    power = 0 if -3 < exponent < 4 else exponent
    ticks = [(axis.percent(x), _tick(x / 10.0**power)) for x in axis.ticks()]
    lines = "".join(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{ROW}"/>' for x, _ in ticks)
    followed = [later.linked for later in bars[1:]] + [False]
    rows = tuple((bar, _bar(bar, axis, lines, link)) for bar, link in zip(bars, followed, strict=True))
    labels = "".join(f'<text x="{x}" y="14">{label}</text>' for x, label in ticks)
    scale = unit if power == 0 else f"{typeset(f'1e{power}')[1:]} {unit}"
    return BarChart(rows, _svg(labels, 18, "axis"), scale)


def _bar(bar: Bar, axis: Axis, grid: str, followed: bool) -> Markup:
    start, end, zero = axis.percent(bar.start), axis.percent(bar.end), axis.percent(0.0)
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
        low, high = (axis.percent(bar.end + k * bar.margin) for k in (-1, 1))
        middle = ROW / 2
        parts.append(f'<line class="whisker" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>')
        for x in (low, high):
            parts.append(f'<line class="whisker" x1="{x}" x2="{x}" y1="{middle - 4}" y2="{middle + 4}"/>')
    if bar.look == "dot":
        parts.append(f'<circle class="{sign}" cx="{end}" cy="{ROW / 2}" r="5"/>')
    return _svg("".join(parts), ROW, "bars")


@dataclass(frozen=True)
class Marker:
    """A point with what its 95% interval reaches to either side; hollow where it should not be used."""

    x: float
    y: float
    margin: float = 0.0
    usable: bool = True


@dataclass(frozen=True)
class Curve:
    """A line through points, or the points themselves.

    Attributes:
        look: its class in the style sheet, also in the legend.
        label: its name in the legend.
        points: of a line.
        markers: with 95% intervals.
    """

    look: str
    label: str
    points: Sequence[tuple[float, float]] = ()
    markers: Sequence[Marker] = ()


def line_chart(
    curves: Sequence[Curve], x: Axis, y: Axis, shaded: tuple[float, float] | None = None
) -> dict[str, Markup]:
    """The parts of a line chart: ``plot``, and the labels along its ``left`` and ``bottom``."""

    def height(value: float) -> float:
        return PLOT_HEIGHT * (1 - y.at(value))

    parts = []
    if shaded is not None:
        left, right = x.at(shaded[0]), x.at(shaded[1])
        parts.append(
            f'<rect class="shade" x="{100 * left:.3f}%" width="{100 * (right - left):.3f}%" y="0" '
            f'height="{PLOT_HEIGHT}"/>'
        )
    rows, columns = [(height(v), v) for v in y.ticks(5)], [(x.percent(v), v) for v in x.ticks(5)]
    parts += [f'<line class="grid" x1="0" x2="100%" y1="{h:.1f}" y2="{h:.1f}"/>' for h, _ in rows]
    parts += [f'<line class="grid" x1="{at}" x2="{at}" y1="0" y2="{PLOT_HEIGHT}"/>' for at, _ in columns]
    lines = [
        f'<polyline class="{curve.look}" points="'
        + " ".join(f"{1000 * x.at(a):.1f},{height(b):.1f}" for a, b in curve.points)
        + '"/>'
        for curve in curves
        if curve.points
    ]
    parts.append(
        f'<svg viewBox="0 0 1000 {PLOT_HEIGHT}" width="100%" height="{PLOT_HEIGHT}" preserveAspectRatio="none">'
        f"{''.join(lines)}</svg>"
    )
    for curve in curves:
        for marker in curve.markers:
            at = x.percent(marker.x)
            low, high = height(marker.y - marker.margin), height(marker.y + marker.margin)
            look = curve.look if marker.usable else f"{curve.look} hollow"
            parts.append(f'<line class="{curve.look}" x1="{at}" x2="{at}" y1="{low:.1f}" y2="{high:.1f}"/>')
            parts.append(f'<circle class="{look}" cx="{at}" cy="{height(marker.y):.1f}" r="4"/>')
    left = "".join(f'<text x="100%" dx="-6" y="{h + 4:.1f}">{_label(v, y)}</text>' for h, v in rows)
    bottom = "".join(f'<text x="{at}" y="16">{_label(v, x)}</text>' for at, v in columns)
    return {
        "plot": _svg("".join(parts), PLOT_HEIGHT, "lines"),
        "left": _svg(left, PLOT_HEIGHT, "axis left"),
        "bottom": _svg(bottom, 20, "axis"),
    }


def _label(value: float, axis: Axis) -> str:
    if axis.logarithmic:
        return typeset(f"1e{round(math.log10(value))}")[2:]
    return _tick(value)


def _tick(value: float) -> str:
    return typeset(f"{value:.6g}") if abs(value) > 1e-12 else "0"


def _svg(content: str, height: int, look: str) -> Markup:
    """Only numbers, and labels made of numbers, ever get into ``content``."""
    return Markup(f'<svg class="{look}" width="100%" height="{height}" aria-hidden="true">{content}</svg>')
