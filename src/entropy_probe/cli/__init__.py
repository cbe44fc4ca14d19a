"""The ``entropy-probe`` command. Commands import what they need when they run, so that ``--help`` is quick.

Exit codes: 0 on success, 2 on bad input (one line on stderr), 1 on any other failure.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
import typer.main

from entropy_probe import __version__
from entropy_probe.cli.demo import demo
from entropy_probe.cli.errors import ErrorsAsLines, one_line_excepthook
from entropy_probe.cli.init import init
from entropy_probe.cli.inspect import inspect
from entropy_probe.cli.manifest import manifest
from entropy_probe.cli.quiet import quiet_libraries
from entropy_probe.cli.report import report
from entropy_probe.cli.run import run
from entropy_probe.cli.sweep import sweep
from entropy_probe.cli.timeline import timeline
from entropy_probe.cli.validate import validate

__all__ = ["app", "main"]

app = typer.Typer(
    name="entropy-probe",
    help="Predict, measure and explain the entropy change of the next RL optimizer step of a language model.",
    cls=ErrorsAsLines,
    add_completion=False,
)
for command in (init, run, sweep, validate, timeline, inspect, manifest, report, demo):
    app.command()(command)


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"entropy-probe {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def main() -> None:
    """Run the command line; the console script."""
    sys.excepthook = one_line_excepthook
    quiet_libraries()
    typer.main.get_command(app)()
