"""``entropy-probe report``: a saved result, shown again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    directory: Annotated[Path, typer.Argument(metavar="RESULT_DIR", help="A run's output directory.")],
) -> None:
    """Show a saved result. Needs no model."""
    from rich.console import Console

    from entropy_probe.report import print_result
    from entropy_probe.results import ProbeResult

    print_result(ProbeResult.load(directory), Console(), directory if directory.is_dir() else directory.parent)
