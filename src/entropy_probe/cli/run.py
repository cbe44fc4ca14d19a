"""``entropy-probe run``: checkpoint and config in, a run directory out."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from entropy_probe.report.numbers import format_percent

if TYPE_CHECKING:
    from entropy_probe.attribution import Attribution
    from entropy_probe.checkpoints import CheckpointState
    from entropy_probe.cli.config import RunConfig
    from entropy_probe.distributed import Ranks
    from entropy_probe.probe import EntropyProbe
    from entropy_probe.provenance import Phase
    from entropy_probe.results import ProbeResult
    from entropy_probe.sampling import Prompt, Reward, SamplingReport, SequenceGenerator
    from entropy_probe.session import Resample
    from entropy_probe.types import Rollouts

__all__ = [
    "Inputs",
    "engine_for",
    "open_checkpoint",
    "probe_checkpoint",
    "quiet_transformers",
    "read_inputs",
    "resampler",
    "run",
    "sample_batch",
]

T = TypeVar("T")


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
    from entropy_probe.report import print_result

    options = {
        "output_dir": None if output_dir is None else str(output_dir),
        "probe.learning_rate": learning_rate,
        "overwrite": overwrite or None,
    }
    with launched_ranks() as ranks:
        settings = load_config(config, overrides or (), options)
        result = probe_checkpoint(settings, ranks)
        if ranks.rank == 0:
            print_result(result, Console(), settings.output_dir)


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
    from entropy_probe.cli.lock import locked
    from entropy_probe.cli.progress import show_progress
    from entropy_probe.cli.report import write_run_report
    from entropy_probe.cli.run_directory import check_output_dir, stage
    from entropy_probe.validation import check_halves

    config = config.resolved()
    writing = ranks.rank == 0
    with locked(config.output_dir) if writing else nullcontext(), show_progress(visible=writing) as progress:
        if writing:
            check_output_dir(config.output_dir, config.overwrite)
        quiet_transformers()
        inputs = read_inputs(config)
        if halves is not None:
            given = inputs.update
            check_halves(_required(config.update).num_prompts if given is None else given.num_prompts, halves[0])
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
    from entropy_probe.attributed_batch import check_divides
    from entropy_probe.cli.run_directory import CONFIG_FILE, EVALUATION_FILE, SHARDS, UPDATE_FILE
    from entropy_probe.probe import EntropyProbe
    from entropy_probe.provenance import Clock
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
        distributed=ranks.size > 1,
    )

    def sample(engine: SequenceGenerator | None) -> tuple[Rollouts, Rollouts | None, tuple[str, ...]]:
        found = _sample_missing(config, state, inputs, sampled, engine, progress)
        update, evaluation, _ = found
        if config.save_rollouts:
            update.to_parquet(staging / UPDATE_FILE)
            if evaluation is not None and not sampled[0].exists():
                evaluation.to_parquet(sampled[0])
        return found

    sampled = (staging / EVALUATION_FILE, config.output_dir / SHARDS)
    with clock.phase("sample"):
        update, evaluation, notes = share_engine(ranks, engine_for(config, state), sample)
    result, attribution = _run_mode(probe, config, update, evaluation)
    result = _annotate(result, (*state.report.reasons, *notes), clock.seconds)
    if ranks.rank == 0:
        if attribution is not None:
            attribution.save_tables(staging, state.tokenizer)
        if not config.save_rollouts:
            sampled[0].unlink(missing_ok=True)
        (staging / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
        result.save(staging)
    return _Run(probe, result, attribution, evaluation)


def _validate(run: _Run, config: RunConfig, halves: tuple[int, int], writing: bool) -> None:
    """Validate the attribution of a run that is written, and write that beside it."""
    subsets, seed = halves
    try:
        found = run.probe.validate(
            _required(run.attribution), evaluation=_required(run.evaluation), subsets=subsets, seed=seed
        )
    except BaseException as error:
        error.add_note(f"the run itself is complete in {config.output_dir}, only its validation is missing")
        raise
    if writing:
        found.save(config.output_dir)


def engine_for(config: RunConfig, state: CheckpointState) -> SequenceGenerator | None:
    """What samples responses of the checkpoint; ``None`` without a tokenizer."""
    from entropy_probe.sampling import HFGenerator

    if state.tokenizer is None:
        return None
    return HFGenerator(state.model, state.tokenizer, config.generation.batch_size)


def resampler(config: RunConfig, state: CheckpointState, ranks: Ranks) -> Resample | None:
    """How to sample the evaluation prompts anew after the step, if that is what low ESS asks for."""
    from entropy_probe.sampling import EvaluationSettings, SamplingParameters, resample_responses, share_engine

    if config.probe.on_low_ess != "resample":
        return None
    engine = engine_for(config, state)
    if engine is None:
        raise ValueError(
            f"{config.checkpoint}: expected a tokenizer for on_low_ess 'resample', found none there or with the base "
            "model; copy its files into the checkpoint, or set on_low_ess to psis or refuse"
        )
    settings = config.evaluation or EvaluationSettings(total_sequences=2)
    parameters = SamplingParameters(config.probe.temperature, _required(config.probe.max_completion_length))

    def resample(rollouts: Rollouts) -> Rollouts:
        def sample(shared: SequenceGenerator | None) -> Rollouts:
            return resample_responses(_required(shared), rollouts, parameters, seed=settings.seed)

        return share_engine(ranks, engine, sample)

    return resample


def _run_mode(
    probe: EntropyProbe, config: RunConfig, update: Rollouts, evaluation: Rollouts | None
) -> tuple[ProbeResult, Attribution | None]:
    """The probe's result in the configured mode, and its attribution if there is one.

    The one-batch prediction joins a two-batch result or measurement.
    """
    attribution = None
    if config.mode == "one_batch":
        return probe.one_batch(update), None
    if config.mode == "same_batch":
        result = probe.measure(update=update)
    elif config.attribution:
        attribution = probe.attribute(
            update=update, evaluation=_required(evaluation), folds=config.attribution_folds, measure=True
        )
        result = attribution.result
    else:
        result = probe.run(update=update, evaluation=_required(evaluation))
    if config.mode == "two_batch":
        return result, attribution
    one = probe.one_batch(update)
    result = result.model_copy(update={"cross_prompt": one.cross_prompt})
    new = [message for message in one.diagnostics.messages if message not in result.diagnostics.messages]
    return _annotate(result, tuple(f"one batch: {message}" for message in new), one.timing), attribution


@dataclass(frozen=True)
class Inputs:
    """What is read before the checkpoint, so that a wrong path does not cost the loading of a model."""

    update: Rollouts | None
    evaluation: Rollouts | None
    prompts: list[Prompt]
    reward: Reward | None


def read_inputs(config: RunConfig) -> Inputs:
    """The saved rollouts, and what sampling the others takes.

    Raises:
        ValueError: if a file, the prompts or the reward cannot be used.
    """
    from entropy_probe.sampling import load_prompts, load_reward
    from entropy_probe.types import Rollouts

    update, evaluation = (path and Rollouts.from_parquet(path) for _, path in config.rollouts)
    complete = update is not None and (evaluation is not None or config.needs_no_evaluation)
    return Inputs(
        update=update,
        evaluation=evaluation,
        prompts=[] if complete else load_prompts(_required(config.prompts)),
        reward=load_reward(_required(config.reward)) if update is None else None,
    )


def _sample_missing(
    config: RunConfig,
    state: CheckpointState,
    inputs: Inputs,
    files: tuple[Path, Path],
    engine: SequenceGenerator | None,
    progress: Phase,
) -> tuple[Rollouts, Rollouts | None, tuple[str, ...]]:
    """The update batch, the evaluation batch if one is needed, and notes on how they were sampled where they were."""
    update, evaluation = inputs.update, inputs.evaluation
    notes: list[str] = []
    if update is None:
        update, about = sample_batch("update", config, state, inputs, files, engine, progress)
        notes += about
    if evaluation is None and not config.needs_no_evaluation:
        evaluation, about = sample_batch("evaluation", config, state, inputs, files, engine, progress)
        notes += about
    return update, evaluation, tuple(notes)


def sample_batch(
    batch: Literal["update", "evaluation"],
    config: RunConfig,
    state: CheckpointState,
    inputs: Inputs,
    files: tuple[Path, Path],
    engine: SequenceGenerator | None,
    progress: Phase,
) -> tuple[Rollouts, list[str]]:
    """Sample one of the two batches as configured, with notes on how that went.

    A sampled evaluation batch goes into ``files``: shard by shard into the second, a directory, then into the first.

    Raises:
        ValueError: if there is no tokenizer to sample with.
    """
    from entropy_probe.fingerprint import fingerprint
    from entropy_probe.sampling import SamplingParameters, sample_evaluation_file, sample_update
    from entropy_probe.types import Rollouts

    if engine is None:
        raise ValueError(
            f"{config.checkpoint}: expected a tokenizer to sample with, found none there or with the base model; copy "
            "its files into the checkpoint, or set rollouts.update and rollouts.evaluation to saved batches"
        )
    parameters = SamplingParameters(config.probe.temperature, _required(config.probe.max_completion_length))
    subject, report_progress = (engine, state.tokenizer, inputs.prompts), partial(progress, f"sample {batch}")
    if batch == "update":
        reward, settings = _required(inputs.reward), _required(config.update)
        rollouts, report = sample_update(*subject, reward, settings, parameters, report_progress)
        return rollouts, _describe(batch, report)
    path, shards = files
    report = sample_evaluation_file(
        *subject,
        _required(config.evaluation),
        parameters,
        path,
        shards=shards,
        policy=fingerprint([*state.model.named_parameters(), *state.model.named_buffers()]),
        progress=report_progress,
    )
    return Rollouts.from_parquet(path), _describe(batch, report)


def _required(value: T | None) -> T:
    """A setting that the config's validation has made sure of."""
    assert value is not None
    return value


def _describe(batch: str, report: SamplingReport) -> list[str]:
    """What a reader should know about a sampled batch, one line each."""
    notes = [f"{batch}: {message}" for message in report.messages]
    if report.prompts_dropped:
        notes.append(
            f"{batch}: {report.prompts_dropped} of {report.prompts_tried} prompts had equal rewards and were dropped "
            f"in {report.rounds} rounds"
        )
    if report.truncated_fraction:
        notes.append(f"{batch}: {format_percent(report.truncated_fraction)} of the responses hit the largest length")
    return notes


def _annotate(result: ProbeResult, notes: tuple[str, ...], seconds: dict[str, float]) -> ProbeResult:
    """The result with what happened before the probe."""
    messages = (*result.diagnostics.messages, *notes)
    diagnostics = result.diagnostics.model_copy(update={"messages": messages})
    return result.model_copy(update={"diagnostics": diagnostics, "timing": seconds | result.timing})


def quiet_transformers() -> None:
    """No bars and notices from transformers: progress is shown here, and errors are errors."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
