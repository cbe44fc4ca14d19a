"""``entropy-probe timeline``: a training run over its steps, from what was recorded, logged and probed of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from entropy_probe.results.live import PromptShare, StepRecord, Timeline
    from entropy_probe.results.probe import ProbeResult

TIMELINE_FILE = "timeline.html"
_NUMBER = re.compile(r"(\d+)$")


def timeline(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR...",
            help="Output directories of training runs, or of entropy-probe run on several of their checkpoints.",
        ),
    ],
    output_dir: Annotated[
        Path | None, typer.Option(help="Where timeline.html goes; by default beside the first run's records.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Show entropy, its predicted and realized changes and alarms over the steps of training, also while it runs."""
    timelines = read_timelines(directories)
    if as_json:
        from pydantic import TypeAdapter

        from entropy_probe.results.live import Timeline

        typer.echo(TypeAdapter(list[Timeline]).dump_json(timelines, indent=2).decode())
        return
    show_timelines(timelines, output_dir or _beside_records(directories[0]))


def show_timelines(timelines: Sequence[Timeline], directory: Path) -> None:
    """Print timelines and write their page into a directory."""
    from rich.console import Console

    from entropy_probe.report import page, print_sections, timeline_sections
    from entropy_probe.results.record import write_atomically

    sections, console = timeline_sections(timelines), Console()
    print_sections(sections, console)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / TIMELINE_FILE, page(sections, name=timelines[0].name).encode())
    except OSError as error:
        raise ValueError(f"{directory}: cannot write the page: {error.strerror}; give another --output-dir") from error
    console.print(f" Open in a browser: {directory / TIMELINE_FILE}", soft_wrap=True, markup=False, highlight=False)


def _beside_records(directory: Path) -> Path:
    from entropy_probe.results.live import RECORDS

    return directory / RECORDS if (directory / RECORDS).is_dir() else directory


def read_timelines(directories: Iterable[Path]) -> list[Timeline]:
    """What is known of the runs that directories are of, one timeline for each, in order.

    Of a step that is known from several sources the trainer's own record comes first, then a probe of its checkpoint,
    then the trainer's log.

    Raises:
        ValueError: if there is nothing of a run in a directory, or what is there is damaged.
    """
    from entropy_probe.analyses.alarms import alarms
    from entropy_probe.results.live import Timeline
    from entropy_probe.results.record import check_utf8

    runs: dict[Path, dict[int, list[StepRecord]]] = {}
    for directory in directories:
        check_utf8(directory)
        for run, records in _sources(directory):
            steps = runs.setdefault(run.resolve(), {})
            for record in records:
                steps.setdefault(record.step, []).append(record)
    timelines = []
    for run, steps in runs.items():
        for record in _logged(run):
            steps.setdefault(record.step, []).append(record)
        merged = tuple(_merged(steps[step]) for step in sorted(steps))
        if not merged:
            raise ValueError(
                f"{run}: expected records of steps (entropy_probe/), checkpoints with a trainer_state.json, or results "
                "of entropy-probe run, got none; give the trainer's output directory"
            )
        timelines.append(Timeline(name=f"{run.parent.name}/{run.name}", steps=merged, alarms=alarms(merged)))
    return timelines


def _sources(directory: Path) -> Iterable[tuple[Path, Iterable[StepRecord]]]:
    """The runs that a directory is of, with the records in it besides the trainer's log."""
    from entropy_probe.results.live import read_records
    from entropy_probe.results.probe import RESULTS_FILE

    if not directory.is_dir():
        raise ValueError(f"{directory}: expected the directory of a run, found none; check the path")
    if (directory / RESULTS_FILE).is_file():
        return [_probed(directory)]
    probes = sorted(file.parent for file in directory.glob(f"*/{RESULTS_FILE}"))
    return [(directory, read_records(directory))] if not probes else map(_probed, probes)


def _probed(directory: Path) -> tuple[Path, Iterable[StepRecord]]:
    """The training run of a probed checkpoint, and the next step as it was probed."""
    import yaml

    from entropy_probe.cli.output import CONFIG_FILE
    from entropy_probe.results.live import StepRecord
    from entropy_probe.results.probe import ProbeResult

    result, file = ProbeResult.load(directory), directory / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{file}: expected the settings of the run, found no such file; give the run's own directory")
    checkpoint = Path(yaml.safe_load(file.read_text(encoding="utf-8"))["checkpoint"])
    record = StepRecord.of(result, _steps_taken(checkpoint, result) + 1, prompts=_prompts(directory, result))
    return checkpoint.parent, [record]


def _steps_taken(checkpoint: Path, result: ProbeResult) -> int:
    """Optimizer steps until a checkpoint: the number that its name ends with, else what its optimizer has counted."""
    named = _NUMBER.search(checkpoint.name)
    if named is None and not result.optimizer_state.steps[1]:
        raise ValueError(
            f"{checkpoint}: expected a name that ends with its step, such as checkpoint-40, since its optimizer counts "
            "none; rename it and probe it again"
        )
    return int(named[1]) if named else result.optimizer_state.steps[1]


def _prompts(directory: Path, result: ProbeResult) -> tuple[PromptShare, ...]:
    from entropy_probe.report import read_tables
    from entropy_probe.results.live import PromptShare

    tables = read_tables(directory) if result.attribution is not None else None
    if tables is None:
        return ()
    columns = tables.prompts
    rows = zip(columns["prompt_id"], columns["contribution"], columns["name"], columns["prompt"], strict=True)
    return tuple(
        PromptShare(id=int(number), value=float(value), text=name or prompt) for number, value, name, prompt in rows
    )


def _logged(run: Path) -> Iterable[StepRecord]:
    """The trainer's log: that of the run's last checkpoint, or of the run's own directory."""
    from entropy_probe.checkpoints.trainer_log import LOG_FILE, read_history
    from entropy_probe.results.live import StepRecord

    states = [run / LOG_FILE, *run.glob(f"checkpoint-*/{LOG_FILE}")]
    there = [state.parent for state in states if state.is_file() and state.stat().st_size]
    histories = [read_history(directory) for directory in there]
    longest = max(histories, key=lambda history: history[-1].get("step", 0) if history else 0, default=())
    steps: dict[int, dict[str, float]] = {}
    for entry in longest:
        if entry.get("step", 0) >= 1:
            steps.setdefault(int(entry["step"]), {}).update(entry)
    return [StepRecord(step=step, log=log) for step, log in steps.items()]


def _merged(records: Sequence[StepRecord]) -> StepRecord:
    """One record of a step, what an earlier one lacks from later ones; their logs are one."""
    first, *others = records
    for other in others:
        known = {name for name, value in first if value not in (None, (), {})}
        missing = {name: value for name, value in other if name not in known}
        first = first.model_copy(update={**missing, "log": {**other.log, **first.log}})
    return first
