"""``entropy-probe report``: a saved result, shown again, as tables, a page and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from entropy_probe.report import Section
    from entropy_probe.results.probe import ProbeResult
    from entropy_probe.results.sweep import Sweep

__all__ = ["print_run", "report", "write_run_report", "write_sweep_report"]


def report(
    directory: Annotated[Path, typer.Argument(metavar="RESULT_DIR", help="A run's or a sweep's output directory.")],
) -> None:
    """Show a saved result or sweep; write its report.html and its figures again. Needs no model."""
    from rich.console import Console

    from entropy_probe.cli.output import unfinished
    from entropy_probe.cli.sweep import load_sweeps
    from entropy_probe.report import print_files, print_sections
    from entropy_probe.results.probe import ProbeResult

    where, console = directory if directory.is_dir() else directory.parent, Console()
    sweeps = load_sweeps(directory)
    if not sweeps and (reason := unfinished(directory)):
        raise ValueError(reason)
    shown = _of_sweeps(where, sweeps) if sweeps else _of_run(where, ProbeResult.load(directory))
    # The tables first: they are shown also where nothing can be written.
    print_sections(shown.sections, console)
    try:
        shown.write()
    except OSError as error:
        raise ValueError(f"{where}: cannot write the report: {error.strerror}; copy the directory elsewhere") from error
    print_files(where, console)


def print_run(directory: Path, result: ProbeResult, console: Console) -> None:
    """Show a run, with all that its directory has of it."""
    from entropy_probe.report import print_files, print_sections

    print_sections(_of_run(directory, result).sections, console)
    print_files(directory, console)


def write_run_report(directory: Path, result: ProbeResult) -> None:
    """Write ``report.html`` and the figures of a run into its directory, with the attribution and settings found there.

    Raises:
        ValueError: if the tables of the attribution cannot be used.
    """
    _of_run(directory, result).write()


def write_sweep_report(directory: Path, sweeps: Mapping[str, Sweep]) -> None:
    """Write ``report.html`` and the figures of a sweep, or of several, into its directory."""
    _of_sweeps(directory, sweeps).write()


@dataclass(frozen=True)
class _Report:
    """What is shown of a directory, the checkpoint's name in it, and where its page and its figures go."""

    sections: tuple[Section, ...]
    name: str
    directory: Path
    figures: Path

    def write(self) -> None:
        from entropy_probe.report import REPORT_FILE, figure_files, page
        from entropy_probe.results.record import write_atomically

        self.figures.mkdir(exist_ok=True)
        for name, content in figure_files(self.sections).items():
            write_atomically(self.figures / name, content)
        write_atomically(self.directory / REPORT_FILE, page(self.sections, name=self.name).encode())


def _of_run(directory: Path, result: ProbeResult) -> _Report:
    from entropy_probe.cli.output import FIGURES
    from entropy_probe.report import read_tables, run_sections
    from entropy_probe.results.validation import VALIDATION_FILE, Validation

    validation = Validation.load(directory) if (directory / VALIDATION_FILE).is_file() else None
    config, name = _settings(directory)
    sections = run_sections(result, read_tables(directory), validation, config, _answers(directory))
    return _Report(sections, name, directory, directory / FIGURES)


def _answers(directory: Path) -> tuple[Section, ...]:
    """What a directory has of answers to further questions."""
    from entropy_probe.cli.output import ANSWERS

    if not (directory / ANSWERS).is_dir():
        return ()
    from entropy_probe.questions.base import questions

    there = (asked for asked in questions().values() if (directory / asked.Answer.kept.file).is_file())
    return tuple(asked.section(asked.Answer.load(directory)) for asked in there)


def _of_sweeps(directory: Path, sweeps: Mapping[str, Sweep]) -> _Report:
    from entropy_probe.report import sweep_sections

    config, name = _settings(directory)
    name = name if "" in sweeps else directory.absolute().name
    return _Report(sweep_sections(sweeps, config), name, directory, directory)


def _settings(directory: Path) -> tuple[str | None, str]:
    """The resolved settings as text, and the checkpoint's name in them."""
    import yaml

    from entropy_probe.cli.output import CONFIG_FILE

    if not (directory / CONFIG_FILE).is_file():
        return None, ""
    try:
        config = (directory / CONFIG_FILE).read_text(encoding="utf-8")
        checkpoint = Path(yaml.safe_load(config)["checkpoint"])
    except (UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ValueError(
            f"{directory / CONFIG_FILE}: expected the settings of a run with a checkpoint, got something else; it is "
            "not a run's, so move it away"
        ) from error
    return config, f"{checkpoint.parent.name}/{checkpoint.name}"
