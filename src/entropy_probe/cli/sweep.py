"""``entropy-probe sweep``: one step at many learning rates, resumed where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer
from pydantic import field_validator

from entropy_probe.cli.options import AllowCode, OutputDir, Overrides, TrustConfig
from entropy_probe.cli.output import CONFIG_FILE, POINTS, Output, check_new, clear, is_ours, locked, open_output
from entropy_probe.results.record import Kept, SavedRecord, write_atomically
from entropy_probe.results.sweep import SWEEP_FILE, Sweep, SweepPoint

if TYPE_CHECKING:
    from entropy_probe.analyses.provenance import Phase
    from entropy_probe.cli.batches import Sources
    from entropy_probe.cli.sweep_config import SweepConfig
    from entropy_probe.parallel.ranks import Ranks

INDEX_FILE = "sweeps.json"


def sweep(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG.yaml", help="A run's settings with a section sweep; relative paths as for run."),
    ],
    overrides: Overrides = None,
    output_dir: OutputDir = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an earlier sweep in the output directory and start afresh.")
    ] = False,
    trust_config: TrustConfig = False,
    allow_code: AllowCode = False,
) -> None:
    """Measure the step's entropy change at many learning rates.

    A sweep that was interrupted resumes where it stopped when the same command is given again.
    """
    from entropy_probe.cli.config import load_config
    from entropy_probe.cli.ranks import launched_ranks
    from entropy_probe.cli.report import sweep_report
    from entropy_probe.cli.sweep_config import SweepConfig

    options = {"output_dir": output_dir, "overwrite": overwrite, "trust_config": trust_config}
    with launched_ranks() as ranks:
        settings = load_config(config, overrides or (), options, SweepConfig, allow_code=allow_code)
        assert isinstance(settings, SweepConfig)
        sweeps = sweep_checkpoints(settings, ranks)
        if ranks.rank == 0:
            sweep_report(settings.output_dir, sweeps).show()


def sweep_checkpoints(config: SweepConfig, ranks: Ranks) -> dict[str, Sweep]:
    """Sweep the checkpoint, or each of several, as configured; by the checkpoint's name, or "" for a single one.

    Raises:
        ValueError: if the output directory, a checkpoint, the prompts or the rollouts cannot be used.
    """
    config = config.resolved()
    each = list(config.each())
    with locked(config.output_dir) if ranks.rank == 0 else nullcontext():
        return _sweep_each(config, each, ranks) if each else {"": sweep_checkpoint(config, ranks)}


def _sweep_each(config: SweepConfig, each: Sequence[SweepConfig], ranks: Ranks) -> dict[str, Sweep]:
    """A sweep for each of several checkpoints, and what compares them."""
    from entropy_probe.cli.report import sweep_report

    writing = ranks.rank == 0
    if writing:
        open_index(config.output_dir, [one.output_dir.name for one in each], config.overwrite)
    sweeps = {}
    for one in each:
        with locked(one.output_dir) if writing else nullcontext():
            sweeps[one.output_dir.name] = sweep_checkpoint(one, ranks)
    if writing:
        write_atomically(config.output_dir / CONFIG_FILE, config.to_yaml().encode())
        sweep_report(config.output_dir, sweeps).write()
    return sweeps


def sweep_checkpoint(config: SweepConfig, ranks: Ranks) -> Sweep:
    """One sweep, in a locked directory: resume what is there, or start; show what is finished.

    See :mod:`entropy_probe.cli.output` for what rank 0 writes.
    """
    from entropy_probe.cli.batches import read_sources
    from entropy_probe.cli.from_checkpoint import with_trainer_settings
    from entropy_probe.cli.progress import show_progress
    from entropy_probe.cli.report import sweep_report

    settings, of_config = with_trainer_settings(config)
    assert isinstance(settings, type(config))
    config = settings
    with show_progress(visible=ranks.rank == 0) as progress:
        sources = read_sources(config)
        output = open_output(config, "sweep", sources, ranks)
        if output.finished:
            (sweep,) = ranks.broadcast([Sweep.load(output.path)] if output.writes else [])
        else:
            sources = replace(sources, notes=(*of_config, *sources.notes))
            sweep = _sweep_into(output, config, sources, ranks, progress)
    output.finish(lambda: sweep_report(output.path, {"": sweep}).write())
    return sweep


def _sweep_into(output: Output, config: SweepConfig, sources: Sources, ranks: Ranks, progress: Phase) -> Sweep:
    """Load, sample and sweep; rank 0 writes what comes of it."""
    from entropy_probe.analyses.log_check import against_log
    from entropy_probe.analyses.provenance import Clock
    from entropy_probe.cli.batches import collect_batches
    from entropy_probe.cli.run import beyond_loss, open_probe

    rates = config.sweep.rates()
    settings = config.model_copy(update={"probe": config.probe.model_copy(update={"learning_rate": rates[-1]})})
    probe, state = open_probe(settings, sources, ranks, Clock(progress))
    with output.writing(ranks):
        batches = collect_batches(config, output, sources, state, probe, ranks, progress)
        update = batches.update
        points = output.path / POINTS

        def save(point: SweepPoint) -> None:
            points.mkdir(exist_ok=True)
            point.save(points / f"{rates.index(point.learning_rate) + 1:03d}-{point.learning_rate:.2e}.json")

        with ranks.agreeing():
            finished = [SweepPoint.load(file) for file in sorted(points.glob("[0-9]*.json"))] if output.writes else []
        sweep = probe.sweep(
            update=update,
            evaluation=batches.evaluation,
            learning_rates=rates,
            direct_curvature=config.sweep.direct_curvature,
            finished=ranks.broadcast(finished),
            on_point=save if output.writes else None,
        )
        left_out = (*sweep.prediction.diagnostics.not_modelled, *beyond_loss(config, update, state.report.not_modelled))
        diagnostics = sweep.prediction.diagnostics.model_copy(update={"not_modelled": left_out})
        of_log = against_log(state.report.logged, sweep.prediction, update, selected=config.probe.update_selected)
        sweep = sweep.model_copy(
            update={
                "prediction": sweep.prediction.model_copy(update={"diagnostics": diagnostics}),
                "notes": (*state.report.notes, *sources.notes, *batches.notes, *of_log, *sweep.notes),
            }
        )
        if output.writes:
            output.add_given(sources)
            sweep.save(output.path)
    return sweep


class SweepIndex(SavedRecord):
    """``sweeps.json``: the checkpoints of a run that were swept, each in the subdirectory of its name.

    They are sweeps of one config once that lies beside it.
    """

    kept: ClassVar = Kept(INDEX_FILE, "list of sweeps", "sweep", "choose another output_dir")
    schema_version: Literal[1] = 1
    checkpoints: tuple[str, ...]

    @field_validator("checkpoints")
    @classmethod
    def _inside(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if Path(name).name != name:
                raise ValueError("expected names of directories in this one")
        return names


def open_index(directory: Path, checkpoints: Sequence[str], overwrite: bool) -> None:
    """Write ``sweeps.json`` into a directory, which is locked, that is empty or holds the same.

    What it holds is not of one config from now on, until all are swept. Of sweeps that are replaced by those of other
    checkpoints nothing is left.
    """
    index = SweepIndex(checkpoints=tuple(checkpoints))
    if not (directory / INDEX_FILE).is_file():
        check_new(directory, overwrite, "no sweeps of several checkpoints")
    elif not overwrite and SweepIndex.load(directory) != index:
        raise ValueError(
            f"output_dir: {directory} holds sweeps of other checkpoints; choose another one, or pass --overwrite to "
            "sweep again"
        )
    else:
        (directory / CONFIG_FILE).unlink(missing_ok=True)
        for name in set(SweepIndex.load(directory).checkpoints) - {*checkpoints}:
            if is_ours(directory / name):
                with locked(directory / name):
                    clear(directory / name)
                with suppress(OSError):  # holds something of somebody's
                    (directory / name).rmdir()
    index.save(directory)


def load_sweeps(directory: Path) -> dict[str, Sweep]:
    """The sweep saved in a directory, or those of several checkpoints, by the checkpoint's name; empty if none.

    Raises:
        ValueError: if one of several is not finished, or a file is not what it should be.
    """
    if directory.name == SWEEP_FILE or (directory / SWEEP_FILE).is_file():
        return {"": Sweep.load(directory)}
    if not (directory / INDEX_FILE).is_file():
        return {}
    names = SweepIndex.load(directory).checkpoints
    if not (directory / CONFIG_FILE).is_file():
        raise ValueError(f"{directory}: the sweeps are not finished; give the same command again to resume them")
    for name in names:
        if not (directory / name / SWEEP_FILE).is_file():
            raise ValueError(f"{directory / name}: the sweep is not finished; give the same command again to resume it")
    return {name: Sweep.load(directory / name) for name in names}
