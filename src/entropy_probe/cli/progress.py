"""Progress of long work, with the time that is left: bars on a terminal, lines elsewhere; both on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from entropy_probe.analyses.provenance import Phase


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
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *left, console=Console(stderr=True), transient=True) as bars:
        tasks = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase)
            bars.update(tasks[phase], completed=done, total=total)

        yield progress


def _lines() -> Phase:
    reported: dict[str, int] = {}
    begun: dict[str, tuple[float, int]] = {}  # when a phase was first heard of, and what was done by then

    def progress(phase: str, done: int, total: int) -> None:
        begun.setdefault(phase, (time.monotonic(), done))
        quarters = 4 * done // total if total else 4
        if quarters > reported.get(phase, 0):
            since, before = begun[phase]
            seconds = round((time.monotonic() - since) / max(1, done - before) * (total - done))
            left = f", {timedelta(seconds=seconds)} left" if seconds else ""
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {phase}: {done} of {total}{left}\n")
        reported[phase] = quarters

    return progress
