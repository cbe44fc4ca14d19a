"""A result as a table for the terminal, readable at 80 columns and in plain pipes."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from entropy_probe.report.attribution_console import print_attribution
from entropy_probe.report.numbers import format_estimate, format_number, format_percent, signed
from entropy_probe.report.tables import Tables, read_tables
from entropy_probe.report.terminal import print_not_modelled, print_notes, print_titled
from entropy_probe.report.text import printable
from entropy_probe.report.verdict import VerdictKind, verdict
from entropy_probe.report.wording import ESTIMATORS, HARMLESS_ESS, REPORT_FILE, UNITS, column_exponent
from entropy_probe.results.probe import CrossPrompt, Diagnostics, Estimate, Predicted, ProbeResult, Realized

__all__ = ["print_files", "print_result"]

STYLES: dict[VerdictKind, str] = {
    "agrees within error": "bold green",
    "distinguishable from 0": "bold green",
    "indistinguishable from 0": "bold yellow",
    "beyond the linear range": "bold yellow",
    "below the noise floor": "bold yellow",
    "not measured": "bold red",
}
_FIT_STYLES = {"ok": "", "off_policy": "bold yellow", "selected": ""}


def print_result(
    result: ProbeResult, console: Console, directory: Path | None = None, *, tables: Tables | None = None
) -> None:
    """Print the table, the verdict, the diagnostics, what the change comes from and where the files are.

    Args:
        result: what to show.
        console: where to print.
        directory: the run directory, whose files are listed; None when nothing was saved.
        tables: the attribution's, in place of those in the directory.

    Raises:
        ValueError: if the result holds no change at all.
    """
    judged = verdict(result)
    print_titled(_title(result), _table(result), console)
    print_notes(result.diagnostics.notes, console)
    print_not_modelled(result.diagnostics.not_modelled, console)
    console.print(Padding(Text.assemble((_sentence_case(judged.kind), STYLES[judged.kind]), f". {judged.sentence}"), 1))
    if result.attribution is not None:
        tables = read_tables(directory) if tables is None and directory is not None else tables
        print_attribution(result.attribution, console, tables and tables.prompts)
    if directory is not None:
        print_files(directory, console)


def print_files(directory: Path, console: Console) -> None:
    """Print what a directory holds, and which of it to open in a browser. Not wrapped, so that paths can be copied."""
    names = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    console.print(Text(printable(f" Saved in {directory}: {', '.join(names)}")), soft_wrap=True)
    if REPORT_FILE in names:
        console.print(Text(printable(f" Open in a browser: {directory / REPORT_FILE}")), soft_wrap=True)


def _table(result: ProbeResult) -> Table:
    table = Table(box=None, padding=(0, 1))
    table.add_column("")
    table.add_column(f" {result.entropy.unit}", no_wrap=True)
    table.add_column("", style="dim")
    entropy = result.entropy
    units = f"{entropy.num_units} {UNITS[result.diagnostics.evaluation_unit]}"
    table.add_row("entropy H(θ)", _pair(entropy), f"{units} on the evaluation side")
    _add_policy_fit(table, result.diagnostics)
    exponent = column_exponent(result)
    if result.predicted is not None:
        _add_prediction(table, result, result.predicted, exponent)
    if result.cross_prompt is not None:
        _add_cross_prompt(table, result.cross_prompt, exponent)
    if result.realized is not None:
        _add_realized(table, result, result.realized, exponent)
    return table


def _add_policy_fit(table: Table, diagnostics: Diagnostics) -> None:
    """How the batches fit the policy, one row each; one where they are the same."""
    fit = diagnostics.policy_fit
    batches = [
        ("evaluation", fit.evaluation, diagnostics.mismatch),
        ("update", None if fit.update == fit.evaluation else fit.update, diagnostics.update_mismatch),
    ]
    for name, of_batch, mismatch in batches:
        if of_batch is not None:
            said = f"z of surprisal − entropy, {name}{', selected' if of_batch.status == 'selected' else ''}"
            table.add_row(
                "policy fit", Text(f" {of_batch.z:+.1f}".replace("-", "−"), _FIT_STYLES[of_batch.status]), said
            )
        if mismatch is not None and (name == "evaluation" or mismatch != diagnostics.mismatch):
            sizes = f"|Δ log π|, at most {format_number(mismatch.max, 2)}; ESS {format_percent(mismatch.ess_fraction)}"
            table.add_row("sampler", signed(format_number(mismatch.mean, 2)), sizes)


def _title(result: ProbeResult) -> str:
    rates = ", ".join(f"{rate:g}" for rate in sorted(set(result.optimizer_state.learning_rates)))
    return f" Entropy change of the next step at learning rate {rates}"


def _add_prediction(table: Table, result: ProbeResult, predicted: Predicted, exponent: int | None) -> None:
    parts = (format_number(predicted.se_evaluation, 2), format_number(predicted.se_update, 2))
    how = " (jackknife)" if predicted.se_update_method == "jackknife" else ""
    table.add_row(
        "predicted δH₁", Text(_pair(predicted, exponent), "bold"), f"SE: evaluation {parts[0]}, update {parts[1]}{how}"
    )
    for name, component in result.components.items():
        table.add_row(f"  {name.replace('_', ' ')}", _pair(component, exponent), "")


def _add_cross_prompt(table: Table, cross: CrossPrompt, exponent: int | None) -> None:
    errors = f"SE: jackknife {format_number(cross.se_jackknife, 2)}, plug-in {format_number(cross.se_plugin, 2)}"
    value = signed(format_estimate(cross.delta_h1, cross.se_jackknife, exponent))
    table.add_row("one batch δH₁", Text(value, "bold"), errors)
    units = (
        f"{cross.num_units} prompts"
        if cross.mode == "exact"
        else f"{cross.num_units} blocks of {cross.block_size} prompts"
    )
    table.add_row("", "", f"{units}, frozen geometry")


def _add_realized(table: Table, result: ProbeResult, realized: Realized, exponent: int | None) -> None:
    estimate = realized.estimate
    how = ESTIMATORS[realized.estimator]
    if realized.batch == "update":
        how = "on the update batch: biased"
    table.add_row("realized ΔH", Text(_pair(estimate, exponent) if estimate else " refused", "bold"), how)
    if result.predicted is not None and result.difference is not None and estimate is not None:
        value = result.predicted.value
        ratio = signed(format_number(estimate.value / value)) if value else " undefined"
        table.add_row("ΔH / δH₁", ratio, "ratio")
        table.add_row("ΔH − δH₁", _pair(result.difference, exponent), "paired difference")
    weight = f"{realized.ess:.1f} sequences; largest weight {format_number(realized.max_weight)}"
    table.add_row("ESS", f" {format_percent(realized.ess_fraction)}", weight)
    if realized.pareto_k is not None:
        allowed = f"at most {format_number(realized.pareto_k_threshold, 2)}"
        if realized.pareto_k > realized.pareto_k_threshold and realized.ess_fraction >= HARMLESS_ESS:
            allowed = f"judged below {HARMLESS_ESS:.0%} ESS"
        table.add_row("Pareto k", signed(format_number(realized.pareto_k, 2)), f"tail of the weights; {allowed}")
    if realized.noise_floor is not None:
        table.add_row("noise floor", signed(format_number(realized.noise_floor, 2)), "of ΔH, by rounding")


def _pair(estimate: Estimate, exponent: int | None = None) -> str:
    return signed(format_estimate(estimate.value, estimate.standard_error, exponent))


def _sentence_case(text: str) -> str:
    return text[0].upper() + text[1:]
