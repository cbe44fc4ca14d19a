"""``entropy-probe report``: a saved result, shown again, as tables, a page and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from entropy_probe.results.probe import ProbeResult
    from entropy_probe.results.sweep import Sweep

__all__ = ["report", "write_run_report", "write_sweep_report"]


def report(
    directory: Annotated[Path, typer.Argument(metavar="RESULT_DIR", help="A run's or a sweep's output directory.")],
) -> None:
    """Show a saved result or sweep; write its report.html and figures again. Needs no model."""
    from rich.console import Console

    from entropy_probe.cli.output import unfinished
    from entropy_probe.cli.sweep import load_sweeps
    from entropy_probe.report import print_files, print_result, print_sweeps, print_validation, read_tables
    from entropy_probe.results.probe import ProbeResult
    from entropy_probe.results.validation import VALIDATION_FILE, Validation

    where, console = directory if directory.is_dir() else directory.parent, Console()
    sweeps = load_sweeps(directory)
    if not sweeps and (reason := unfinished(directory)):
        raise ValueError(reason)
    # The tables first: they are shown also where nothing can be written.
    if sweeps:
        print_sweeps(sweeps, console)
    else:
        result = ProbeResult.load(directory)
        print_result(result, console, tables=read_tables(where))
        if (where / VALIDATION_FILE).is_file():
            print_validation(Validation.load(where), console, result.diagnostics.notes)
    try:
        if sweeps:
            write_sweep_report(where, sweeps)
        else:
            write_run_report(where, result)
    except OSError as error:
        raise ValueError(f"{where}: cannot write the report: {error.strerror}; copy the directory elsewhere") from error
    print_files(where, console)


def write_run_report(directory: Path, result: ProbeResult) -> None:
    """Write ``report.html`` and the figures of a run into its directory, with the attribution and settings found there.

    Raises:
        ValueError: if the tables of the attribution cannot be used.
    """
    from entropy_probe.cli.output import FIGURES
    from entropy_probe.report import REPORT_FILE, read_tables, result_figures, run_page
    from entropy_probe.results.record import write_atomically
    from entropy_probe.results.validation import VALIDATION_FILE, Validation

    tables = read_tables(directory)
    (directory / FIGURES).mkdir(exist_ok=True)
    for name, content in result_figures(result, tables).items():
        write_atomically(directory / FIGURES / name, content)
    checked = (directory / VALIDATION_FILE).is_file()
    validation = Validation.load(directory) if checked else None
    page = run_page(result, tables=tables, validation=validation, **_settings(directory))
    write_atomically(directory / REPORT_FILE, page.encode())


def write_sweep_report(directory: Path, sweeps: Mapping[str, Sweep]) -> None:
    """Write the figures and ``report.html`` of a sweep, or of several, into its directory."""
    from entropy_probe.report import REPORT_FILE, figure_files, sweep_page
    from entropy_probe.results.record import write_atomically

    for name, content in figure_files(sweeps).items():
        write_atomically(directory / name, content)
    settings = _settings(directory)
    if "" not in sweeps:
        settings["name"] = directory.absolute().name
    write_atomically(directory / REPORT_FILE, sweep_page(sweeps, **settings).encode())


def _settings(directory: Path) -> dict[str, Any]:
    """The resolved settings as text, and the checkpoint's name in them."""
    import yaml

    from entropy_probe.cli.output import CONFIG_FILE

    if not (directory / CONFIG_FILE).is_file():
        return {"config": None, "name": ""}
    try:
        config = (directory / CONFIG_FILE).read_text(encoding="utf-8")
        checkpoint = Path(yaml.safe_load(config)["checkpoint"])
    except (UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ValueError(
            f"{directory / CONFIG_FILE}: expected the settings of a run with a checkpoint, got something else; it is "
            "not a run's, so move it away"
        ) from error
    return {"config": config, "name": f"{checkpoint.parent.name}/{checkpoint.name}"}
