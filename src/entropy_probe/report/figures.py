"""Charts as figures for papers, as the bytes of PNG and SVG files; the same sections give the same bytes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from entropy_probe.report.sections.base import BarChart, Curve, HeatMap, LineChart, Section, sentence_case
from entropy_probe.report.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every kind of colour vision; line styles and markers differ as well.
BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
SEVERAL = (BLUE, VERMILLION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LOOKS = {"predicted": (VERMILLION, "--", "o"), "realized": (BLUE, "-", "o"), "fit": (GREEN, ":", "o")}
SETTINGS: Any = {
    "svg.hashsalt": "entropy-probe",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def figure_files(sections: Iterable[Section]) -> dict[str, bytes]:
    """The charts that are figures, each as PNG and SVG, by file name; line charts of one name lie side by side."""
    from matplotlib import rc_context

    panels: dict[str, list[Any]] = {}
    for section in sections:
        for block in section.blocks:
            if isinstance(block, BarChart | LineChart | HeatMap) and block.figure:
                panels.setdefault(block.figure, []).append(block)
    files: dict[str, bytes] = {}
    with rc_context(SETTINGS):
        for name, charts in panels.items():
            figure = _drawn(charts)
            files[f"{name}.png"] = _rendered(figure, "png", {"Software": None})
            figure.set_layout_engine("none")  # what it has found holds for both
            files[f"{name}.svg"] = _rendered(figure, "svg", {"Date": None, "Creator": None})
    return files


def _drawn(charts: Sequence[Any]) -> Figure:
    if isinstance(charts[0], BarChart):
        return _bars(charts[0])
    return _heat_map(charts[0]) if isinstance(charts[0], HeatMap) else _lines(charts)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _rendered(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def _bars(chart: BarChart) -> Figure:
    figure = _figure(6.2, 0.9 + 0.3 * len(chart.bars))
    axes = figure.subplots()
    axes.axvline(0, color=GREY, linewidth=0.8)
    for row, bar in enumerate(chart.bars):
        color = BLUE if bar.value > 0 else VERMILLION
        if bar.look == "dot":
            axes.plot(bar.end, row, "o", color=color, markersize=5)
        else:
            axes.barh(row, bar.value, 0.55, left=bar.start, color=color, alpha=0.5 if bar.look == "total" else 1)
        if bar.margin:
            axes.errorbar(bar.end, row, xerr=bar.margin, color="black", linewidth=1, capsize=2)
        if bar.linked:
            axes.plot([bar.start] * 2, [row - 1, row], ":", color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(chart.bars)), [_plain(sentence_case(bar.row.label)) for bar in chart.bars])
    axes.invert_yaxis()
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
    axes.set_xlabel(f"entropy change ({chart.unit})")
    if any(bar.margin for bar in chart.bars):
        axes.set_title("bars: 95% intervals", fontsize=8, loc="left")
    return figure


def _heat_map(chart: HeatMap) -> Figure:
    from matplotlib.colors import LinearSegmentedColormap

    modules, names = chart.columns[1:], [name for name, _ in chart.rows]
    width, height = 1.9 + 0.5 * len(modules), 1.3 + 0.22 * len(names)
    figure = _figure(max(4.5, width), height)
    grid = [[float("nan") if x is None else x for x in numbers] for _, numbers in chart.rows]
    largest = max((abs(x) for _, numbers in chart.rows for x in numbers if x is not None), default=0.0) or 1.0
    axes, colors = figure.subplots(), LinearSegmentedColormap.from_list("sign", [VERMILLION, "#F7F7F7", BLUE])
    drawn = axes.imshow(grid, cmap=colors, vmin=-largest, vmax=largest, aspect="auto")
    axes.set_xticks(range(len(modules)), [_plain(name) for name in modules], rotation=45, ha="right")
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(drawn, label=f"part of δH₁ ({chart.unit})", format="%.1e")
    return figure


def _lines(charts: Sequence[LineChart]) -> Figure:
    figure = _figure(4.75 * len(charts), 3.8)
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        _draw_lines(axes, chart)
    return figure


def _draw_lines(axes: Axes, chart: LineChart) -> None:
    if chart.y.low < 0 < chart.y.high and not chart.y.logarithmic:
        axes.axhline(0, color=GREY, linewidth=0.8)
    if chart.shaded is not None:
        start, end, label = chart.shaded
        axes.axvspan(start, end, color=GREY, alpha=0.18, linewidth=0, label=label)
    for k, curve in enumerate(chart.curves):
        color, line, marker = LOOKS.get(curve.look, (SEVERAL[k % len(SEVERAL)], "-", MARKERS[k % len(MARKERS)]))
        _draw_curve(axes, curve, color, line, marker)
    x, y = chart.x, chart.y
    axes.set(xscale="log" if x.logarithmic else "linear", xlim=(x.low, x.high), xlabel=x.label)
    axes.set(yscale="log" if y.logarithmic else "linear", ylim=(y.low, y.high), ylabel=y.label)
    if not x.logarithmic and not x.names:
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
    if not y.logarithmic:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if x.names:
        axes.set_xticks(range(len(x.names)), [_plain(name) for name in x.names], rotation=30, ha="right")
    if any(curve.label for curve in chart.curves):
        axes.legend(frameon=False, fontsize=8)
    axes.set_title(textwrap.fill(chart.caption, 70), fontsize=8, loc="left")


def _draw_curve(axes: Axes, curve: Curve, color: str, line: str, marker: str) -> None:
    label = _plain(curve.label) if curve.label else None
    if curve.style == "points":
        for usable, name in ((True, label), (False, f"{label}, not to be used" if label else None)):
            if points := [point for point in curve.points if point.usable == usable]:
                # An error bar that reaches 0 goes off a logarithmic axis.
                below = [min(p.margin, abs(p.y) * (1 - 1e-9)) for p in points]
                axes.errorbar([p.x for p in points], [p.y for p in points], [below, [p.margin for p in points]],
                              color=color, linestyle="none", marker=marker, markersize=4, label=name,
                              markerfacecolor=color if usable else "none")  # fmt: skip
        return
    x, y = [point.x for point in curve.points], [point.y for point in curve.points]
    if curve.style == "band" and x:
        low, high = zip(*(p.ends for p in curve.points), strict=True)
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    dots = {} if curve.look in ("predicted", "fit") else {"marker": marker, "markersize": 3.5}
    axes.plot(x, y, color=color, linestyle=line, label=label, **dots)


def _plain(name: str) -> str:
    """A name to be drawn letter by letter.

    Matplotlib takes what is between dollar signs for a formula, and leaves labels with a leading underscore out of the
    legend; control characters it cannot draw.
    """
    name = printable(name).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name
