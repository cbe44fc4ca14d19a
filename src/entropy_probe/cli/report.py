"""``entropy-probe report``: a saved result, shown again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    directory: Annotated[Path, typer.Argument(metavar="RESULT_DIR", help="A run's or a sweep's output directory.")],
) -> None:
    """Show a saved result or sweep. Needs no model."""
    from rich.console import Console

    from entropy_probe.cli.sweep_directory import load_sweeps, unfinished
    from entropy_probe.report import print_result, print_sweeps
    from entropy_probe.results import ProbeResult

    where = directory if directory.is_dir() else directory.parent
    sweeps = load_sweeps(directory)
    if sweeps:
        print_sweeps(sweeps, Console(), where)
        return
    if reason := unfinished(directory):
        raise ValueError(reason)
    print_result(ProbeResult.load(directory), Console(), where)
