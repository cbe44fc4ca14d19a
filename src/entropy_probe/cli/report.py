"""``entropy-probe report``: a saved result, shown again, as tables, a page and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from entropy_probe.report import Section
    from entropy_probe.results.probe import ProbeResult
    from entropy_probe.results.sweep import Sweep


def report(
    directory: Annotated[Path, typer.Argument(metavar="RESULT_DIR", help="A run's or a sweep's output directory.")],
) -> None:
    """Show a saved result or sweep; write its report.html and its figures again. Needs no model."""
    from entropy_probe.cli.output import unfinished
    from entropy_probe.cli.sweep import load_sweeps
    from entropy_probe.results.probe import ProbeResult

    where = directory if directory.is_dir() else directory.parent
    sweeps = load_sweeps(directory)
    if not sweeps and (reason := unfinished(directory)):
        raise ValueError(reason)
    shown = sweep_report(where, sweeps) if sweeps else run_report(where, ProbeResult.load(directory))
    shown.show(write=True)


@dataclass(frozen=True)
class Report:
    """What is shown of a directory, the checkpoint's name in it, and where its page and its figures go."""

    sections: tuple[Section, ...]
    name: str
    directory: Path
    figures: Path

    def show(self, *, write: bool = False) -> None:
        """Print it, with what the directory holds; the page and the figures are written in between if asked for.

        Raises:
            ValueError: if they cannot be written, once all but the files is printed.
        """
        from rich.console import Console

        from entropy_probe.report import print_files, print_sections

        console = Console()
        print_sections(self.sections, console)
        try:
            if write:
                self.write()
        except OSError as error:
            raise ValueError(
                f"{self.directory}: cannot write the report: {error.strerror}; copy the directory elsewhere"
            ) from error
        print_files(self.directory, console)

    def write(self) -> None:
        """Write ``report.html`` and the figures."""
        from entropy_probe.report import REPORT_FILE, figure_files, page
        from entropy_probe.results.record import write_atomically

        self.figures.mkdir(exist_ok=True)
        for name, content in figure_files(self.sections).items():
            write_atomically(self.figures / name, content)
        write_atomically(self.directory / REPORT_FILE, page(self.sections, name=self.name).encode())


def run_report(directory: Path, result: ProbeResult) -> Report:
    """A run, with the attribution, the validation, the answers and the settings that its directory has."""
    from entropy_probe.cli.output import FIGURES
    from entropy_probe.report import read_tables, run_sections
    from entropy_probe.results.validation import VALIDATION_FILE, Validation

    validation = Validation.load(directory) if (directory / VALIDATION_FILE).is_file() else None
    config, name = _settings(directory)
    sections = run_sections(result, read_tables(directory), validation, config, _answers(directory))
    return Report(sections, name, directory, directory / FIGURES)


def _answers(directory: Path) -> tuple[Section, ...]:
    """What a directory has of answers to further questions."""
    from entropy_probe.cli.output import ANSWERS

    if not (directory / ANSWERS).is_dir():
        return ()
    from entropy_probe.questions.base import questions

    there = (asked for asked in questions().values() if (directory / asked.Answer.kept.file).is_file())
    return tuple(asked.section(asked.Answer.load(directory)) for asked in there)


def sweep_report(directory: Path, sweeps: Mapping[str, Sweep]) -> Report:
    """A sweep, or several by the checkpoint's name, in their directory."""
    from entropy_probe.report import sweep_sections

    config, name = _settings(directory)
    name = name if "" in sweeps else directory.absolute().name
    return Report(sweep_sections(sweeps, config), name, directory, directory)


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
