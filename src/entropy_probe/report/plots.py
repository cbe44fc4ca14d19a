"""Figures for papers, as the bytes of PNG and SVG files; the same result gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from entropy_probe.report.attribution import prompt_chart
from entropy_probe.report.charts import BarChart
from entropy_probe.report.tables import Columns, Tables
from entropy_probe.report.text import printable
from entropy_probe.report.views import changes, waterfall
from entropy_probe.results.probe import ProbeResult
from entropy_probe.results.sweep import Sweep, SweepPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure_files", "result_figures"]

# Okabe and Ito's palette, told apart with every kind of colour vision; line styles and markers differ as well.
BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
SEVERAL = (BLUE, VERMILLION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
SETTINGS: Any = {
    "svg.hashsalt": "entropy-probe",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def figure_files(sweeps: Mapping[str, Sweep]) -> dict[str, bytes]:
    """``sweep.png`` and ``sweep.svg`` of one sweep, or ``sweeps.*`` of several, by file name.

    Args:
        sweeps: by the checkpoint's name; a single one has the name "".
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(SETTINGS):
        figure = Figure(figsize=(9.5, 3.8), dpi=150, layout="constrained")
        if len(sweeps) == 1 and "" in sweeps:
            name = "sweep"
            _draw_sweep(figure, sweeps[""])
        else:
            name = "sweeps"
            _draw_several(figure, sweeps)
        return _files(name, figure)


def result_figures(result: ProbeResult, tables: Tables | None) -> dict[str, bytes]:
    """The figures of a run by file name, as far as there is something to draw: see ``wording.RESULT_FIGURES``.

    Args:
        result: of the run.
        tables: its attribution, if it has one.
    """
    from matplotlib import rc_context

    unit = result.entropy.unit
    charts = {"change": changes(result), "parts": waterfall(result)}
    if tables is not None:
        charts["prompts"] = prompt_chart(tables.prompts, unit, result.attribution and result.attribution.folds)
    found: dict[str, bytes] = {}
    with rc_context(SETTINGS):
        for name, chart in charts.items():
            if chart is not None:
                found |= _files(name, _bars(chart, unit))
        if tables is not None:
            found |= _files("layers", _layers(tables.layers, unit))
    return found


def _bars(chart: BarChart, unit: str) -> Figure:
    from matplotlib.figure import Figure

    bars = [bar for bar, _ in chart.rows]
    figure = Figure(figsize=(6.2, 0.9 + 0.3 * len(bars)), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=GREY, linewidth=0.8)
    for row, bar in enumerate(bars):
        color = BLUE if bar.value > 0 else VERMILLION
        if bar.look == "dot":
            axes.plot(bar.end, row, "o", color=color, markersize=5)
        else:
            axes.barh(row, bar.value, 0.55, left=bar.start, color=color, alpha=0.5 if bar.look == "total" else 1)
        if bar.margin:
            axes.errorbar(bar.end, row, xerr=bar.margin, color="black", linewidth=1, capsize=2)
        if bar.linked:
            axes.plot([bar.start] * 2, [row - 1, row], ":", color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(bars)), [_plain(bar.label) for bar in bars])
    axes.invert_yaxis()
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
    axes.set_xlabel(f"entropy change ({unit})")
    if any(bar.margin for bar in bars):
        axes.set_title("bars: 95% intervals", fontsize=8, loc="left")
    return figure


def _layers(layers: Columns, unit: str) -> Figure:
    from matplotlib.figure import Figure

    names, modules = (list(dict.fromkeys(layers[column])) for column in ("layer", "module"))
    grid = np.full((len(names), len(modules)), np.nan)
    for name, module, total in zip(layers["layer"], layers["module"], layers["total"], strict=True):
        grid[names.index(name), modules.index(module)] = total
    size = (1.9 + 0.5 * len(modules), 1.3 + 0.22 * len(names))
    figure = Figure(figsize=(max(4.5, size[0]), size[1]), dpi=150, layout="constrained")
    axes, largest = figure.subplots(), float(np.nanmax(np.abs(grid))) or 1.0
    drawn = axes.imshow(grid, cmap=_diverging(), vmin=-largest, vmax=largest, aspect="auto")
    axes.set_xticks(range(len(modules)), [_plain(name) for name in modules], rotation=45, ha="right")
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(drawn, label=f"part of δH₁ ({unit})", format="%.1e")
    return figure


def _diverging() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("sign", [VERMILLION, "#F7F7F7", BLUE])


def _files(name: str, figure: Figure) -> dict[str, bytes]:
    return {
        f"{name}.png": _rendered(figure, "png", {"Software": None}),
        f"{name}.svg": _rendered(figure, "svg", {"Date": None, "Creator": None}),
    }


def _rendered(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def _draw_sweep(figure: Figure, sweep: Sweep) -> None:
    left, right = figure.subplots(1, 2)
    ok = [point for point in sweep.points if point.status == "ok"]
    shown = ok or list(sweep.points)
    rates = [point.learning_rate for point in shown]
    left.axhline(0, color=GREY, linewidth=0.8)
    _shade(left, sweep, start=0.0)
    predicted, errors = [0.0, *_predicted(shown)], [0.0, *(p.predicted.margin for p in shown)]
    _band(left, [0.0, *rates], predicted, errors, VERMILLION)
    left.plot([0.0, *rates], predicted, color=VERMILLION, linestyle="--", label="predicted δH₁")
    if ok:
        x, y, error = ([0.0, *column] for column in zip(*_measured(ok), strict=True))
        _band(left, x, y, error, BLUE)
        left.plot(x, y, color=BLUE, marker="o", markersize=3.5, label="realized ΔH")
    if sweep.fit is not None:
        a, b = sweep.fit.linear.value, sweep.fit.quadratic.value
        grid = [rates[-1] * k / 100 for k in range(101)]
        label = f"fit aη + bη² to η ≤ {sweep.fit.learning_rates[-1]:.3g}"
        left.plot(grid, [a * x + b * x * x for x in grid], color=GREEN, linestyle=":", linewidth=2, label=label)
    left.set_xlabel("learning rate η")
    left.set_ylabel(f"entropy change ({sweep.unit})")
    left.ticklabel_format(axis="both", style="sci", scilimits=(-2, 3))
    left.legend(frameon=False, fontsize=8)
    left.set_title("bands: 95% intervals", fontsize=8, loc="left")
    _draw_logarithmic(right, sweep)


def _draw_logarithmic(axes: Axes, sweep: Sweep) -> None:
    rates = [point.learning_rate for point in sweep.points]
    _shade(axes, sweep, start=rates[0])
    axes.plot(rates, [abs(y) for y in _predicted(sweep.points)], color=VERMILLION, linestyle="--", label="|δH₁|")
    for usable, label in ((True, "|ΔH|"), (False, "|ΔH|, not to be used")):
        found = _measured([point for point in sweep.points if (point.status == "ok") == usable])
        found = [(x, abs(y), error) for x, y, error in found if y]
        if not found:
            continue
        x, y, error = zip(*found, strict=True)
        # An error bar that reaches 0 goes off the logarithmic axis.
        below = [min(e, v * (1 - 1e-9)) for v, e in zip(y, error, strict=True)]
        bars = [below, list(error)]
        face = BLUE if usable else "none"
        axes.errorbar(
            x, y, bars, color=BLUE, linestyle="none", marker="o", markersize=4, markerfacecolor=face, label=label
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    smallest = min((abs(y) for y in _predicted(sweep.points) if y), default=None)
    if smallest is not None:
        axes.set_ylim(bottom=smallest / 3)
    axes.set_xlabel("learning rate η")
    axes.legend(frameon=False, fontsize=8)
    if sweep.power_law is not None:
        axes.set_title(f"slope {sweep.power_law.slope.value:.4f} over the shaded range", fontsize=8, loc="left")


def _draw_several(figure: Figure, sweeps: Mapping[str, Sweep]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.axhline(0, color=GREY, linewidth=0.8)
    for k, (name, sweep) in enumerate(sweeps.items()):
        color, marker = SEVERAL[k % len(SEVERAL)], MARKERS[k % len(MARKERS)]
        found = _measured([point for point in sweep.points if point.status == "ok"])
        if found:
            x, y, error = zip(*found, strict=True)
            scaled = [v / r for r, v in zip(x, y, strict=True)]
            _band(left, x, scaled, [e / r for r, e in zip(x, error, strict=True)], color)
            left.plot(x, scaled, color=color, marker=marker, markersize=3.5, label=_plain(name))
        end = sweep.linear_range
        if end.learning_rate is not None:
            face = "none" if end.at_least else color
            right.plot([k], [end.learning_rate], marker=marker, color=color, markerfacecolor=face, linestyle="none")
    unit = next(iter(sweeps.values())).unit
    left.set_xscale("log")
    left.set_xlabel("learning rate η")
    left.set_ylabel(f"ΔH / η ({unit} per unit of η)")
    left.legend(frameon=False, fontsize=8)
    left.set_title("bands: 95% intervals", fontsize=8, loc="left")
    right.set_yscale("log")
    right.set_xticks(range(len(sweeps)), [_plain(name) for name in sweeps], rotation=30, ha="right")
    right.set_xlim(-0.5, len(sweeps) - 0.5)
    right.set_ylabel("end of the linear range")
    right.set_title("hollow: at least", fontsize=8, loc="left")


def _plain(name: str) -> str:
    """A name to be drawn letter by letter.

    Matplotlib takes what is between dollar signs for a formula, and leaves labels with a leading underscore out of the
    legend; control characters it cannot draw.
    """
    name = printable(name).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _shade(axes: Axes, sweep: Sweep, start: float) -> None:
    end = sweep.linear_range.learning_rate
    if end is not None:
        axes.axvspan(start, end, color=GREY, alpha=0.18, linewidth=0, label="linear range")


def _band(axes: Axes, x: Sequence[float], y: Sequence[float], error: Sequence[float], color: str) -> None:
    low, high = ([v + sign * e for v, e in zip(y, error, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _measured(points: Sequence[SweepPoint]) -> list[tuple[float, float, float]]:
    """Rate, change and margin of the points that have a measurement."""
    return [(p.learning_rate, e.value, e.margin) for p in points if (e := p.estimate) is not None]


def _predicted(points: Sequence[SweepPoint]) -> list[float]:
    return [point.predicted.value for point in points]
