"""Progress of long work: bars on a terminal, lines elsewhere; both on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from entropy_probe.analyses.provenance import Phase

__all__ = ["show_progress"]


@contextmanager
def show_progress(*, visible: bool = True) -> Iterator[Phase]:
    """Show what the yielded function is told, until the block ends; unless it is another rank's business."""
    if not visible:
        yield lambda phase, done, total: None
    elif sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Phase]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase)
            bars.update(tasks[phase], completed=done, total=total)

        yield progress


def _lines() -> Phase:
    reported: dict[str, int] = {}

    def progress(phase: str, done: int, total: int) -> None:
        quarters = 4 * done // total if total else 4
        if quarters > reported.get(phase, 0):
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {phase}: {done} of {total}\n")
        reported[phase] = quarters

    return progress
