"""What the tables of every result look like on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from entropy_probe.report.text import printable
from entropy_probe.results.note import Note

__all__ = ["print_not_modelled", "print_notes", "print_titled"]


def print_titled(title: str, table: Table, console: Console) -> None:
    """Print a table below its title, which stays on one line: as the table's own it would wrap at the table's width."""
    console.print(Text(printable(title), "bold"), soft_wrap=True)
    console.print(table)


def print_not_modelled(parts: Sequence[str], console: Console) -> None:
    """Print what of the trainer's step is not in the numbers, a line each."""
    for part in parts:
        console.print(Padding(Text(printable(f"not modelled: {part}"), style="yellow"), (0, 1)))


def print_notes(notes: Iterable[Note], console: Console) -> None:
    """Print what a careful reader should know, each note with what to do."""
    for note in notes:
        console.print(Padding(Text(printable(f"note: {note.text}"), style="yellow"), (0, 1)))
        console.print(Padding(Text(printable(note.remedy), style="dim"), (0, 1, 0, 3)))
