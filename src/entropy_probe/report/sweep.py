"""A sweep over learning rates as a table for the terminal, and what it says in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from entropy_probe.report.console import print_files
from entropy_probe.report.numbers import format_estimate, format_number, format_percent, signed
from entropy_probe.report.terminal import print_not_modelled, print_notes, print_titled
from entropy_probe.report.text import printable
from entropy_probe.results.student import critical_value
from entropy_probe.results.sweep import Fitted, Sweep, SweepPoint

__all__ = ["fit_rows", "point_row", "print_sweeps", "sweep_sentence"]


def print_sweeps(sweeps: Mapping[str, Sweep], console: Console, directory: Path | None = None) -> None:
    """Print one sweep in full, or a summary of several.

    Args:
        sweeps: by the checkpoint's name; the name of a single one is not shown.
        console: where to print.
        directory: whose files are listed; None when nothing was saved.
    """
    if len(sweeps) == 1 and "" in sweeps:
        _print_sweep(sweeps[""], console)
    else:
        unit = next(iter(sweeps.values())).unit
        print_titled(f" Learning-rate sweeps of {len(sweeps)} checkpoints, {unit}", _summary(sweeps), console)
        for name, sweep in sweeps.items():
            print_notes((note.about(name) for note in sweep.notes), console)
    if directory is not None:
        print_files(directory, console)


def _print_sweep(sweep: Sweep, console: Console) -> None:
    table = _table(header=True)
    for name in ("rate η", " realized ΔH", " predicted δH₁", " ΔH/δH₁", "ESS"):
        table.add_column(name, no_wrap=True)
    end = sweep.linear_range.learning_rate
    for point in sweep.points:
        linear = end is not None and point.learning_rate <= end
        table.add_row(f"{point.learning_rate:.3g}", *point_row(point), style="" if linear else "dim")
    print_titled(f" Entropy change in {sweep.unit}, step at different learning rates", table, console)
    console.print(_fits(sweep))
    print_notes((*sweep.prediction.diagnostics.notes, *sweep.notes), console)
    print_not_modelled(sweep.prediction.diagnostics.not_modelled, console)
    console.print(Padding(Text(sweep_sentence(sweep)), 1))


def point_row(point: SweepPoint) -> tuple[str, str, str, str]:
    """A point's measured change, prediction, ratio and effective sample size, as written."""
    predicted = _pair(point.predicted.value, point.predicted.standard_error)
    if point.realized is None:
        return " failed", predicted, "", ""
    marks = "" if point.status == "ok" else f" {point.status.replace('_', ' ')}"
    if point.estimate is None:
        return " refused", predicted, "", f"{format_percent(point.realized.ess_fraction)}{marks}"
    ratio = point.estimate.value / point.predicted.value if point.predicted.value else None
    return (
        _pair(point.estimate.value, point.estimate.standard_error),
        predicted,
        " undefined" if ratio is None else signed(format_number(ratio, 4)),
        f"{format_percent(point.realized.ess_fraction)}{marks}",
    )


def _fits(sweep: Sweep) -> Table:
    table = _table(header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", style="dim")
    for label, fitted, note in fit_rows(sweep):
        table.add_row(label, _fitted(fitted), note)
    return table


def fit_rows(sweep: Sweep) -> list[tuple[str, Fitted, str]]:
    """What was fitted to the points: name, number, and what it is."""
    rows = []
    if sweep.power_law is not None:
        rows.append(("log-log slope", sweep.power_law.slope, f"R² {sweep.power_law.r_squared:.5f}; 1 is linear"))
    if sweep.fit is not None:
        reach = f"{len(sweep.fit.learning_rates)} rates up to {sweep.fit.learning_rates[-1]:.3g}"
        rows.append(("slope at 0", sweep.fit.linear, f"per unit of η; fit of {reach}"))
        assert sweep.curvature.from_fit is not None
        rows.append(("curvature, fit", sweep.curvature.from_fit, "per squared unit of η"))
    if sweep.curvature.direct is not None:
        rows.append(("curvature, direct", sweep.curvature.direct, "by forward-mode differentiation"))
    if sweep.learning_rate_star is not None:
        rows.append(("star rate", sweep.learning_rate_star, "where both parts of the fit cancel"))
    return rows


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
    degrees = sweep.prediction.entropy.num_units - 1
    if abs(quadratic.value) <= critical_value(degrees) * quadratic.standard_error:
        return "The curvature does not exceed its 95% margin of error."
    if star is None:
        return "The curvature has the same sign: larger steps change it more than in proportion."
    beyond = ", beyond the linear range and so an extrapolation" if end is None or star.value > end else ""
    return f"The curvature works against it and would cancel it at {star.value:.3g}{beyond}."


def _summary(sweeps: Mapping[str, Sweep]) -> Table:
    table = _table(header=True)
    for name in ("checkpoint", "entropy", " slope at 0", "linear up to", " star rate"):
        table.add_column(name, no_wrap=True)
    for name, sweep in sweeps.items():
        end, star = sweep.linear_range, sweep.learning_rate_star
        bound = "none" if end.learning_rate is None else f"{'≥ ' if end.at_least else ''}{end.learning_rate:.3g}"
        table.add_row(
            Text(printable(name)),
            f"{format_estimate(sweep.prediction.entropy.value, sweep.prediction.entropy.standard_error)}",
            " no fit" if sweep.fit is None else _fitted(sweep.fit.linear),
            bound,
            " none" if star is None else _fitted(star),
        )
    return table


def _table(*, header: bool) -> Table:
    return Table(box=None, padding=(0, 0, 0, 1), show_header=header)


def _fitted(fitted: Fitted) -> str:
    return _pair(fitted.value, fitted.standard_error)


def _pair(value: float, standard_error: float) -> str:
    return signed(format_estimate(value, standard_error))
