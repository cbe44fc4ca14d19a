"""Sections for the terminal, readable at 80 columns and in plain pipes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from entropy_probe.report.numbers import signed
from entropy_probe.report.sections.base import Row, Rows, Section, State, Table, sentence_case
from entropy_probe.report.text import printable
from entropy_probe.report.wording import REPORT_FILE

STYLES: dict[State, str] = {"ok": "bold green", "look": "bold yellow", "bad": "bold red", "plain": "bold"}
WIDEST_QUOTE = 24


def print_sections(sections: Iterable[Section], console: Console) -> None:
    """Print what a terminal has room for: rows and tables, the verdict, notes, and what is not modelled."""
    for section in sections:
        if not section.page_only:
            _print_section(section, console)


def print_files(directory: Path, console: Console) -> None:
    """Print what a directory holds, and which of it to open in a browser. Not wrapped, so that paths can be copied."""
    names = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    console.print(Text(printable(f" Saved in {directory}: {', '.join(names)}")), soft_wrap=True)
    if REPORT_FILE in names:
        console.print(Text(printable(f" Open in a browser: {directory / REPORT_FILE}")), soft_wrap=True)


def _print_section(section: Section, console: Console) -> None:
    # On one line, whatever its length: as the table's own title it would wrap at the table's width.
    title = ", ".join(filter(None, (section.title, section.subtitle)))
    console.print(Text(printable(f" {title}"), "bold"), soft_wrap=True)
    for block in section.blocks:
        if isinstance(block, Rows) and not block.page_only:
            console.print(_rows(block))
        elif isinstance(block, Table) and not block.folded:
            console.print(_table(block))
    if (verdict := section.verdict) is not None:
        kind, rest = sentence_case(verdict.kind), f". {printable(verdict.sentence)}" if verdict.sentence else ""
        console.print(Padding(Text.assemble((kind, STYLES[verdict.state]), rest), (1, 1, 0, 1)))
    _print_lines(section.sentences, console)
    _print_lines(section.cautions, console, "yellow")
    for note in section.notes:
        _print_lines([f"note: {note.text}"], console, "yellow")
        if note.remedy:
            console.print(Padding(Text(printable(note.remedy), style="dim"), (0, 1, 0, 3)))
    _print_lines((f"not modelled: {part}" for part in section.not_modelled), console, "yellow")
    console.print()


def _print_lines(lines: Iterable[str], console: Console, style: str = "") -> None:
    for line in lines:
        console.print(Padding(Text(printable(line), style=style), (0, 1)))


def _rows(block: Rows) -> Grid:
    grid = Grid(box=None, padding=(0, 1), show_header=bool(block.unit))
    grid.add_column("")
    grid.add_column(f" {block.unit}", no_wrap=any(row.note for row in block.rows))
    grid.add_column("", style="dim")
    for row in block.rows:
        value = Text(printable(signed(row.value)), _style(row)) if row.value else ""
        grid.add_row(_label(row), value, Text(printable(row.note)))
    return grid


def _label(row: Row) -> Text:
    quote = printable(row.quote)
    if len(quote) > WIDEST_QUOTE:
        cut = WIDEST_QUOTE - 1
        quote = f"{quote[:cut].rstrip('…')}…" if row.quote_begins else f"…{quote[-cut:]}"
    return Text(f"{'  ' * row.indent}{quote or printable(row.label)}", "italic" if not row.value else "")


def _style(row: Row) -> str:
    if row.state in ("look", "bad"):
        return STYLES[row.state]
    return "bold" if row.headline else ""


def _table(block: Table) -> Grid:
    grid = Grid(box=None, padding=(0, 0, 0, 1))
    columns = [_column(heading, [row[k] for row in block.rows]) for k, heading in enumerate(block.columns)]
    for heading, _ in columns:
        grid.add_column(Text(heading), no_wrap=True)
    for k in range(len(block.rows)):
        faint = bool(block.mark) and not block.marked[k]
        grid.add_row(*(Text(cells[k]) for _, cells in columns), style="dim" if faint else "")
    return grid


def _column(heading: str, cells: Sequence[str]) -> tuple[str, list[str]]:
    """With room for a minus sign where one of the cells has it, so that digits line up."""
    heading, texts = printable(heading), [printable(cell) for cell in cells]
    if not any(text.startswith("-") for text in texts):
        return heading, texts
    return f" {heading}", [signed(text) if text else text for text in texts]
