"""``entropy-probe run``: checkpoint and config in, a run directory out."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entropy_probe.cli.batches import end_ids, engine_for, read_inputs, required, resampler, sample_missing

if TYPE_CHECKING:
    from entropy_probe.analyses.attribution import Attribution
    from entropy_probe.analyses.provenance import Phase
    from entropy_probe.checkpoints import CheckpointState
    from entropy_probe.cli.batches import Inputs
    from entropy_probe.cli.config import RunConfig
    from entropy_probe.parallel.ranks import Ranks
    from entropy_probe.probe import EntropyProbe
    from entropy_probe.results.note import Note
    from entropy_probe.results.probe import ProbeResult
    from entropy_probe.rollouts.batch import Rollouts
    from entropy_probe.sampling import SequenceGenerator

__all__ = ["open_checkpoint", "probe_checkpoint", "run"]


def run(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.yaml", help="Settings; relative paths in it are relative to the current directory."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Replace single settings, such as update.group_size=4."),
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Instead of the checkpoint's learning rate.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the output directory.")
    ] = False,
) -> None:
    """Probe a checkpoint: predict the next step's entropy change, and measure it."""
    from rich.console import Console

    from entropy_probe.cli.config import load_config
    from entropy_probe.cli.ranks import launched_ranks
    from entropy_probe.report import print_files, print_sections, read_tables, run_sections

    options = {
        "output_dir": None if output_dir is None else str(output_dir),
        "probe.learning_rate": learning_rate,
        "overwrite": overwrite or None,
    }
    with launched_ranks() as ranks:
        settings = load_config(config, overrides or (), options)
        result = probe_checkpoint(settings, ranks)
        if ranks.rank == 0:
            console = Console()
            print_sections(run_sections(result, read_tables(settings.output_dir)), console)
            print_files(settings.output_dir, console)


def open_checkpoint(config: RunConfig) -> CheckpointState:
    """The checkpoint of a configuration, loaded as it says.

    Raises:
        ValueError: if it cannot be used.
    """
    from entropy_probe.checkpoints import load_checkpoint

    return load_checkpoint(
        config.checkpoint,
        config.base_model,
        dtype=config.probe.dtype,
        device=config.device,
        adapter=config.adapter,
        quantization=config.quantization,
        shard=config.shard,
    )


def probe_checkpoint(config: RunConfig, ranks: Ranks, halves: tuple[int, int] | None = None) -> ProbeResult:
    """Probe as configured and, on rank 0, write the run directory, which no other process may write meanwhile.

    The directory gets the resolved ``config.yaml``, ``results.json``, with ``save_rollouts`` both batches, and with
    ``attribution`` its tables; all of them or, after an error, none; then ``report.html`` and ``figures``. Rollouts
    sampled before an error are kept beside the directory.

    Args:
        config: the settings.
        ranks: the processes that share the work.
        halves: validate the attribution on this many random halves, drawn with this seed, into ``validation.json``.
            That comes after the run is written, which an error in it leaves as it is.

    Raises:
        ValueError: if the output directory, the checkpoint, the prompts or the rollouts cannot be used.
    """
    from entropy_probe.analyses.validate import check_halves
    from entropy_probe.cli.lock import locked
    from entropy_probe.cli.progress import show_progress
    from entropy_probe.cli.report import write_run_report
    from entropy_probe.cli.run_directory import check_output_dir, stage

    config = config.resolved()
    writing = ranks.rank == 0
    with locked(config.output_dir) if writing else nullcontext(), show_progress(visible=writing) as progress:
        if writing:
            check_output_dir(config.output_dir, config.overwrite)
        inputs = read_inputs(config)
        if halves is not None:
            given = inputs.update
            check_halves(required(config.update).num_prompts if given is None else given.num_prompts, halves[0])
        files = frozenset(path.resolve() for _, path in config.rollouts if path is not None)
        with stage(config.output_dir, keep=files) if writing else nullcontext(config.output_dir) as staging:
            run = _probe_into(staging, config, inputs, ranks, progress)
        try:
            if halves is not None:
                _validate(run, config, halves, writing)
        finally:
            if writing:
                write_run_report(config.output_dir, run.result)
    return run.result


@dataclass(frozen=True, eq=False)
class _Run:
    """A finished run, and what it takes to validate its attribution."""

    probe: EntropyProbe
    result: ProbeResult
    attribution: Attribution | None
    evaluation: Rollouts | None


def _probe_into(staging: Path, config: RunConfig, inputs: Inputs, ranks: Ranks, progress: Phase) -> _Run:
    """Load, sample and probe; rank 0 writes what comes of it into a directory."""
    from entropy_probe.analyses.attribute import check_divides
    from entropy_probe.analyses.provenance import Clock
    from entropy_probe.cli.run_directory import CONFIG_FILE, EVALUATION_FILE, SHARDS, UPDATE_FILE
    from entropy_probe.probe import EntropyProbe
    from entropy_probe.sampling import share_engine

    clock = Clock(progress)
    with clock.phase("load checkpoint") as step:
        state = open_checkpoint(config)
        step(1, 1)
    # Before sampling, since both check the optimizer.
    if config.attribution:
        check_divides(state.optimizer, config.probe)
    assert state.report.optimizer_state is not None
    mapping = state.report.optimizer_state.mapping
    probe = EntropyProbe(
        state.model,
        state.optimizer,
        config.probe,
        mapping=mapping,
        progress=progress,
        resample=resampler(config, state, ranks),
        distributed=ranks.size > 1 and not config.shard,
        end_token_ids=end_ids(state),
        stop_texts=bool(config.generation.stop),
    )

    def sample(engine: SequenceGenerator | None) -> tuple[Rollouts, Rollouts | None, tuple[Note, ...]]:
        found = sample_missing(config, state, inputs, sampled, engine, progress)
        update, _, _ = found
        if config.save_rollouts and inputs.update is None:  # sampling can take hours: kept from here on
            update.to_parquet(staging / UPDATE_FILE)
        return found

    sampled = (staging / EVALUATION_FILE, config.output_dir / SHARDS)
    with clock.phase("sample"):
        engine = engine_for(config, state, ranks)
        update, evaluation, notes = share_engine(ranks, engine, sample, together=config.shard)
    result, attribution = _run_mode(probe, config, update, evaluation)
    notes = (*state.report.notes, *inputs.notes, *notes)
    not_modelled = beyond_loss(config, state.report.not_modelled)
    result = _annotate(result, notes, not_modelled, clock.seconds)
    if ranks.rank == 0:
        if attribution is not None:
            attribution.save_tables(staging, state.tokenizer)
        if not config.save_rollouts:
            sampled[0].unlink(missing_ok=True)
        else:  # given batches join the run's files at its end: what fails before it leaves no copy of them
            for given, file in ((inputs.update, staging / UPDATE_FILE), (inputs.evaluation, sampled[0])):
                if given is not None:
                    given.to_parquet(file)
        (staging / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
        result.save(staging)
    return _Run(probe, result, attribution, evaluation)


def _validate(run: _Run, config: RunConfig, halves: tuple[int, int], writing: bool) -> None:
    """Validate the attribution of a run that is written, and write that beside it."""
    subsets, seed = halves
    try:
        found = run.probe.validate(
            required(run.attribution), evaluation=required(run.evaluation), subsets=subsets, seed=seed
        )
    except BaseException as error:
        error.add_note(f"the run itself is complete in {config.output_dir}, only its validation is missing")
        raise
    if writing:
        found.save(config.output_dir)


def _run_mode(
    probe: EntropyProbe, config: RunConfig, update: Rollouts, evaluation: Rollouts | None
) -> tuple[ProbeResult, Attribution | None]:
    """The probe's result in the configured mode, and its attribution if there is one.

    The one-batch prediction joins a two-batch result or measurement.
    """
    from entropy_probe.analyses.misfit import beside_two_batches
    from entropy_probe.results.note import distinct

    attribution = None
    if config.mode == "one_batch":
        return probe.one_batch(update), None
    if config.mode == "same_batch":
        result = probe.measure(update=update)
    elif config.attribution:
        attribution = probe.attribute(
            update=update, evaluation=required(evaluation), folds=config.attribution_folds, measure=True
        )
        result = attribution.result
    else:
        result = probe.run(update=update, evaluation=required(evaluation))
    if config.mode == "two_batch":
        return result, attribution
    one = probe.one_batch(update)
    result = result.model_copy(update={"cross_prompt": one.cross_prompt})

    said, known = one.diagnostics, result.diagnostics
    beside = (beside_two_batches(note, said.policy_fit.update) for note in said.notes)
    notes = (note.about("one batch") for note in distinct(filter(None, beside), known.notes))
    left_out = (f"one batch: {line}" for line in said.not_modelled if line not in known.not_modelled)
    return _annotate(result, tuple(notes), tuple(left_out), one.timing), attribution


def beyond_loss(config: RunConfig, not_modelled: tuple[str, ...]) -> tuple[str, ...]:
    """What a trainer's log shows of its loss, without what the configured loss models."""
    models = config.probe.loss.models
    return tuple(line for line in not_modelled if not line.startswith(models))


def _annotate(
    result: ProbeResult, notes: tuple[Note, ...], not_modelled: tuple[str, ...], seconds: dict[str, float]
) -> ProbeResult:
    """The result with what is known from elsewhere."""
    said = result.diagnostics
    more = {"notes": (*said.notes, *notes), "not_modelled": (*said.not_modelled, *not_modelled)}
    diagnostics = said.model_copy(update=more)
    return result.model_copy(update={"diagnostics": diagnostics, "timing": seconds | result.timing})
