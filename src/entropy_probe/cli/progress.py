"""Progress of long work: bars on a terminal, log lines elsewhere; both on stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from entropy_probe.provenance import Phase

__all__ = ["show_progress"]

logger = logging.getLogger("entropy_probe")


@contextmanager
def show_progress(*, visible: bool = True) -> Iterator[Phase]:
    """Show what the yielded function is told, until the block ends; unless it is another rank's business."""
    if not visible:
        yield lambda phase, done, total: None
    elif sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        with _log_lines() as progress:
            yield progress


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


@contextmanager
def _log_lines() -> Iterator[Phase]:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    reported: dict[str, int] = {}

    def progress(phase: str, done: int, total: int) -> None:
        quarters = 4 * done // total if total else 4
        if quarters > reported.get(phase, 0):
            logger.info("%s: %d of %d", phase, done, total)
        reported[phase] = quarters

    try:
        yield progress
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
