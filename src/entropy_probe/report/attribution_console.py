"""An attribution and its validation in a few lines for the terminal."""

from __future__ import annotations

import math
from collections.abc import Collection

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from entropy_probe.report.attribution import forecast_name, measured_on
from entropy_probe.report.numbers import common_exponent, format_estimate, format_number, signed
from entropy_probe.report.tables import Columns
from entropy_probe.report.terminal import print_notes, print_titled
from entropy_probe.report.text import printable
from entropy_probe.results.attribution import AttributionSummary
from entropy_probe.results.note import Note, distinct
from entropy_probe.results.validation import RankCorrelation, Validation

__all__ = ["print_attribution", "print_validation"]

MOST_PROMPTS = 3
WIDEST_PROMPT = 24


def print_attribution(summary: AttributionSummary, console: Console, prompts: Columns | None = None) -> None:
    """Print what the gradient part of the prediction comes from.

    Args:
        summary: the attribution.
        console: where to print.
        prompts: the table of prompts; None when it was not saved.
    """
    table = Table(box=None, padding=(0, 1))
    table.add_column("")
    table.add_column(f" {summary.unit}", no_wrap=True)
    table.add_column("", style="dim")
    exponent = common_exponent(summary.gradient, summary.positive_advantages, summary.negative_advantages)
    for name, value in (
        ("advantages > 0", summary.positive_advantages),
        ("advantages < 0", summary.negative_advantages),
    ):
        table.add_row(name, _number(value, exponent), "")
    if prompts is not None:
        _add_prompts(table, prompts, exponent)
    print_titled(f" Where the gradient part comes from ({summary.num_tokens} tokens)", table, console)
    correlation = summary.rank_correlation_with_covariance
    said = "undefined" if correlation is None else format_number(correlation, 2)
    lines = [f"rank correlation of tokens with the covariance term of Cui et al. (2025): {said} (-1 as theory has it)"]
    if summary.method != "forward-mode":
        lines.append(f"tokens by {summary.method}")
    for line in lines:
        console.print(Padding(Text(printable(line), style="dim"), (0, 1)))
    console.print()


def print_validation(validation: Validation, console: Console, said: Collection[Note] = ()) -> None:
    """Print how well contributions and other forecasts rank real steps on halves of the update prompts.

    Args:
        validation: what to show.
        console: where to print.
        said: notes that need not be repeated, such as those of the result.
    """
    kept, count = len(validation.steps[0].kept), validation.num_measured
    title = f" {count} real steps on {kept} of {validation.num_prompts} prompts: are they ranked as forecast?"
    table = Table(box=None, padding=(0, 1))
    for heading in ("forecast", " rank correlation", "95% interval", "without noise"):
        table.add_column(heading, no_wrap=True)
    for name, found in validation.correlations.items():
        table.add_row(forecast_name(name), *_correlation(found))
    print_titled(title, table, console)
    lines = [measured_on(validation)]
    if None in validation.correlations.values():
        lines.append(f"undefined where {validation.undefined}")
    for line in lines:
        console.print(Padding(Text(line, style="dim"), (0, 1)))
    print_notes(distinct(validation.notes, said), console)
    console.print()


def _correlation(found: RankCorrelation | None) -> tuple[str, str, str]:
    if found is None:
        return " undefined", "", ""
    corrected = "unknown" if found.corrected is None else f"{found.corrected:.2f}"
    return signed(f"{found.value:.3f}"), f"{found.low:.3f} to {found.high:.3f}", corrected


def _add_prompts(table: Table, prompts: Columns, exponent: int | None) -> None:
    """The prompts with the largest contributions of either sign."""
    contributions = prompts["contribution"].tolist()
    order = sorted(range(len(contributions)), key=lambda k: contributions[k])
    down = [k for k in order[:MOST_PROMPTS] if contributions[k] < 0]
    up = [k for k in order[::-1][:MOST_PROMPTS] if contributions[k] > 0]
    for heading, chosen in (("lowering entropy most", down), ("raising entropy most", up)):
        if chosen:
            table.add_row(Text(heading, "italic"), "", "")
        for k in chosen:
            value, error, reward = contributions[k], float(prompts["standard_error"][k]), prompts["mean_reward"][k]
            number = _number(value, exponent)
            if not math.isnan(error):
                number = signed(format_estimate(value, error, exponent))
            about = f"{prompts['num_responses'][k]} responses"
            about += "" if math.isnan(reward) else f", reward {format_number(reward, 2)}"
            table.add_row(Text(f"  {_name(prompts, k)}"), number, about)


def _name(prompts: Columns, k: int) -> str:
    text = prompts["prompt"][k]
    name = f"prompt {prompts['prompt_id'][k]}" if text is None else printable(text)
    return name if len(name) <= WIDEST_PROMPT else f"…{name[1 - WIDEST_PROMPT :]}"


def _number(value: float, exponent: int | None) -> str:
    if exponent is None or exponent >= -2:
        return signed(format_number(value))
    return signed(f"{value / 10**exponent:.2f}e{exponent}")
