"""``entropy-probe sweep``: one step at many learning rates, resumed where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from entropy_probe.analyses.provenance import Phase
    from entropy_probe.checkpoints import CheckpointState
    from entropy_probe.cli.batches import Inputs as Sources
    from entropy_probe.cli.sweep_config import SweepConfig
    from entropy_probe.cli.sweep_directory import Inputs, SweepDirectory
    from entropy_probe.parallel.ranks import Ranks
    from entropy_probe.results.sweep import Sweep
    from entropy_probe.sampling import SequenceGenerator

__all__ = ["sweep"]


def sweep(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG.yaml", help="A run's settings with a section sweep; relative paths as for run."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Replace single settings, such as sweep.num=12."),
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an earlier sweep in the output directory and start afresh.")
    ] = False,
) -> None:
    """Measure the step's entropy change at many learning rates.

    A sweep that was interrupted resumes where it stopped when the same command is given again.
    """
    from rich.console import Console

    from entropy_probe.cli.config import load_config
    from entropy_probe.cli.ranks import launched_ranks
    from entropy_probe.cli.sweep_config import SweepConfig
    from entropy_probe.report import print_files, print_sections, sweep_sections

    options = {"output_dir": None if output_dir is None else str(output_dir), "overwrite": overwrite or None}
    with launched_ranks() as ranks:
        settings = load_config(config, overrides or (), options, SweepConfig)
        assert isinstance(settings, SweepConfig)
        sweeps = sweep_checkpoints(settings, ranks)
        if ranks.rank == 0:
            console = Console()
            print_sections(sweep_sections(sweeps), console)
            print_files(settings.output_dir, console)


def sweep_checkpoints(config: SweepConfig, ranks: Ranks) -> dict[str, Sweep]:
    """Sweep the checkpoint, or each of several, as configured; by the checkpoint's name, or "" for a single one.

    Raises:
        ValueError: if the output directory, a checkpoint, the prompts or the rollouts cannot be used.
    """
    from entropy_probe.cli.lock import locked

    config = config.resolved()
    each = list(config.each())
    with locked(config.output_dir) if ranks.rank == 0 else nullcontext():
        return _sweep_each(config, each, ranks) if each else {"": sweep_checkpoint(config, ranks)}


def _sweep_each(config: SweepConfig, each: Sequence[SweepConfig], ranks: Ranks) -> dict[str, Sweep]:
    """A sweep for each of several checkpoints, and what compares them."""
    from entropy_probe.cli.lock import locked
    from entropy_probe.cli.report import write_sweep_report
    from entropy_probe.cli.run_directory import CONFIG_FILE
    from entropy_probe.cli.sweep_directory import open_index
    from entropy_probe.results.record import write_atomically

    writing = ranks.rank == 0
    if writing:
        open_index(config.output_dir, [one.output_dir.name for one in each], config.overwrite)
        write_atomically(config.output_dir / CONFIG_FILE, config.to_yaml().encode())
    sweeps = {}
    for one in each:
        with locked(one.output_dir) if writing else nullcontext():
            sweeps[one.output_dir.name] = sweep_checkpoint(one, ranks)
    if not writing:
        return sweeps
    write_sweep_report(config.output_dir, sweeps)
    return sweeps


def sweep_checkpoint(config: SweepConfig, ranks: Ranks) -> Sweep:
    """One sweep, in a locked directory: resume what is there, or start.

    See :mod:`entropy_probe.cli.sweep_directory` for the protocol.
    """
    from entropy_probe.cli.batches import end_ids, engine_for, read_inputs, resampler
    from entropy_probe.cli.progress import show_progress
    from entropy_probe.cli.report import write_sweep_report
    from entropy_probe.cli.run import beyond_loss, open_checkpoint
    from entropy_probe.cli.sweep_directory import ROLLOUT_FILES, SweepDirectory
    from entropy_probe.probe import EntropyProbe
    from entropy_probe.results.sweep import SWEEP_FILE, Sweep
    from entropy_probe.rollouts.batch import Rollouts
    from entropy_probe.sampling import share_engine

    rates = config.sweep.rates()
    directory = SweepDirectory(config.output_dir, rates)
    writing = ranks.rank == 0
    inputs = ranks.broadcast(directory.resume(_inputs_of(config), config.overwrite) if writing else None)
    assert inputs is not None
    if ranks.broadcast((config.output_dir / SWEEP_FILE).is_file()):
        return Sweep.load(config.output_dir)
    there = {batch: config.output_dir / ROLLOUT_FILES[batch] for batch in inputs.rollouts}
    sources = read_inputs(config.model_copy(update={"rollouts": config.rollouts.model_copy(update=there)}))
    with show_progress(visible=writing) as progress:
        state = open_checkpoint(config)
        assert state.report.optimizer_state is not None
        mapping = state.report.optimizer_state.mapping
        settings = config.probe.model_copy(update={"learning_rate": rates[-1]})
        probe = EntropyProbe(
            state.model,
            state.optimizer,
            settings,
            mapping=mapping,
            progress=progress,
            resample=resampler(config, state, ranks),
            distributed=ranks.size > 1 and not config.shard,
            end_token_ids=end_ids(state),
            stop_texts=bool(config.generation.stop),
        )

        def collect(engine: SequenceGenerator | None) -> Inputs:
            directory.start(inputs, config.to_yaml())
            return _collect_rollouts(config, directory, inputs, sources, state, engine, progress)

        collected = share_engine(ranks, engine_for(config, state, ranks), collect, together=config.shard)
        # Read back also where they were just sampled, so that a resumed sweep sees the same layout.
        found = probe.sweep(
            update=Rollouts.from_parquet(config.output_dir / ROLLOUT_FILES["update"]),
            evaluation=Rollouts.from_parquet(config.output_dir / ROLLOUT_FILES["evaluation"]),
            learning_rates=rates,
            direct_curvature=config.sweep.direct_curvature,
            finished=ranks.broadcast(directory.finished()),
            on_point=directory.save_point if writing else None,
        )
    records = [collected.rollouts[batch] for batch in ("update", "evaluation")]
    notes = [note for record in records for note in record.notes]
    left_out = (*found.prediction.diagnostics.not_modelled, *beyond_loss(config, state.report.not_modelled))
    diagnostics = found.prediction.diagnostics.model_copy(update={"not_modelled": left_out})
    found = found.model_copy(
        update={
            "prediction": found.prediction.model_copy(update={"diagnostics": diagnostics}),
            "notes": (*state.report.notes, *notes, *found.notes),
        }
    )
    if not writing:
        return found
    write_sweep_report(config.output_dir, {"": found})
    found.save(config.output_dir)
    return found


def _inputs_of(config: SweepConfig) -> Inputs:
    """What the sweep would be computed from, by content."""
    from entropy_probe.analyses.provenance import library_versions
    from entropy_probe.checkpoints import inspect_checkpoint
    from entropy_probe.cli.sweep_directory import Inputs, hash_directory, hash_file

    report = inspect_checkpoint(
        config.checkpoint, config.base_model, adapter=config.adapter, quantization=config.quantization
    )
    base = report.base_model or config.base_model
    given = {}
    for batch, path in config.rollouts:
        if path is not None:
            if not path.is_file():
                raise ValueError(f"{path}: expected a Parquet file of rollouts, found no such file")
            given[batch] = hash_file(path)
    versions = library_versions()
    return Inputs(
        config=config.model_dump(
            mode="json", exclude={"overwrite", "output_dir", "checkpoint", "base_model", "rollouts"}
        ),
        checkpoint=hash_directory(config.checkpoint),
        base_model=hash_directory(Path(base)) if base is not None and Path(base).is_dir() else base,
        given=given,
        versions={name: versions[name] for name in ("entropy-probe", "torch", "transformers")},
    )


def _collect_rollouts(
    config: SweepConfig,
    directory: SweepDirectory,
    inputs: Inputs,
    sources: Sources,
    state: CheckpointState,
    engine: SequenceGenerator | None,
    progress: Phase,
) -> Inputs:
    """Both batches in the directory, given or sampled, each recorded as soon as it is there."""
    from entropy_probe.cli.batches import sample_batch
    from entropy_probe.cli.run_directory import SHARDS
    from entropy_probe.cli.sweep_directory import ROLLOUT_FILES

    shards = directory.path / SHARDS
    for batch, file in ROLLOUT_FILES.items():
        if batch in inputs.rollouts:
            continue
        path, rollouts, notes = directory.path / file, getattr(sources, batch), []
        path.unlink(missing_ok=True)
        if rollouts is None:
            rollouts, notes = sample_batch(batch, config, state, sources, (path, shards), engine, progress)
        if not path.exists():  # a sampled evaluation batch is there already, collected from its shards
            rollouts.to_parquet(path)
        inputs = directory.record(inputs, batch, notes)
        shutil.rmtree(shards, ignore_errors=True)
    return inputs
