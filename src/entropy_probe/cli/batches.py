"""The batches of a run: read from files, or sampled from the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from entropy_probe.cli.dumps import given_batch
from entropy_probe.cli.output import say
from entropy_probe.report.numbers import format_percent
from entropy_probe.results.note import NOTHING_TO_DO, Note, NoteKind
from entropy_probe.results.size import SAMPLING

if TYPE_CHECKING:
    from entropy_probe.analyses.policy import Resample
    from entropy_probe.analyses.provenance import Phase
    from entropy_probe.checkpoints import CheckpointState
    from entropy_probe.cli.config import RunConfig
    from entropy_probe.cli.output import Batch, Output
    from entropy_probe.parallel.ranks import Ranks
    from entropy_probe.probe import EntropyProbe
    from entropy_probe.rollouts.batch import Rollouts
    from entropy_probe.sampling import Engine, Prompt, Rewards, SamplingParameters, SamplingReport

__all__ = ["Collected", "Sources", "collect_batches", "end_ids", "read_sources", "required", "resampler"]

T = TypeVar("T")

DROPPED = NoteKind(
    "prompts_dropped",
    "{batch}: {dropped} of {tried} prompts had equal rewards and were dropped in {rounds} rounds",
    f"{NOTHING_TO_DO} If the trainer keeps such prompts, keep them here too.",
)
TRUNCATED = NoteKind(
    "truncated",
    "{batch}: {percent} of the responses hit the largest length",
    "Make sure that probe.max_completion_length is the one of training.",
)
MANY_TRUNCATED = 0.1
"""A share of responses that any policy has which does not always come to an end is not worth a note."""
STOP_TEXTS = NoteKind(
    "stop_texts",
    "{batch}: {percent} of the responses end at a stop text ({texts}) instead of an end token",
    "Right only if the trainer samples with the same stop texts; else leave generation.stop out.",
)


@dataclass(frozen=True)
class Sources:
    """What is read before the checkpoint, so that a wrong path does not cost the loading of a model."""

    update: Rollouts | None
    evaluation: Rollouts | None
    prompts: list[Prompt]
    reward: Rewards | None
    notes: tuple[Note, ...] = ()
    files: Mapping[Literal["update", "evaluation"], tuple[Path, ...]] = field(default_factory=dict)


def read_sources(config: RunConfig) -> Sources:
    """The saved rollouts, and what sampling the others takes.

    Raises:
        ValueError: if a file, the prompts or the reward cannot be used.
    """
    from entropy_probe.sampling import load_prompts, load_rewards

    batches = {"update": given_batch(config, "update"), "evaluation": given_batch(config, "evaluation")}
    given = {batch: there for batch, there in batches.items() if there is not None}
    update, evaluation = (there and there.rollouts for there in batches.values())
    complete = update is not None and (evaluation is not None or config.needs_no_evaluation)
    prompts = [] if complete else load_prompts(required(config.prompts))
    reward = None
    if update is None:
        progress = _trainer_state(config.checkpoint)
        reward = load_rewards(
            required(config.reward), config.reward_weights, progress, time_limit=config.reward_time_limit
        )
        reward.check(prompts)
    notes = tuple(note for there in given.values() for note in there.notes)
    files: dict[Any, tuple[Path, ...]] = {batch: there.files for batch, there in given.items()}
    return Sources(update, evaluation, prompts, reward, notes, files)


def _trainer_state(checkpoint: Path) -> SimpleNamespace | None:
    """The Trainer's own record, for reward functions that depend on the progress of training; None without one."""
    from entropy_probe.checkpoints.directory import read_json

    file = checkpoint / "trainer_state.json"
    return SimpleNamespace(**read_json(file)) if file.is_file() else None


def _parameters(config: RunConfig) -> SamplingParameters:
    from entropy_probe.sampling import SamplingParameters

    longest = required(config.probe.max_completion_length)
    return SamplingParameters(config.probe.temperature, longest, config.generation.stop)


def end_ids(state: CheckpointState) -> list[int]:
    """What the checkpoint's tokenizer ends a text with, if it has one."""
    eos = getattr(state.tokenizer, "eos_token_id", None)
    return [] if eos is None else [eos]


def engine_for(config: RunConfig, state: CheckpointState, ranks: Ranks) -> Engine | None:
    """What samples responses of the checkpoint on this rank; ``None`` without a tokenizer."""
    from entropy_probe.sampling import ENGINES

    if state.tokenizer is None:
        return None
    agreed = ranks.of_first if config.shard else None
    return ENGINES[config.generation.engine](state.model, state.tokenizer, config.generation, agreed)


def resampler(config: RunConfig, state: CheckpointState, ranks: Ranks) -> Resample | None:
    """How to sample the evaluation prompts anew after the step, if that is what low ESS asks for."""
    from entropy_probe.sampling import EvaluationSettings, resample_responses, share_engine

    if config.probe.on_low_ess != "resample":
        return None
    engine = engine_for(config, state, ranks)
    if engine is None:
        raise ValueError(
            f"{config.checkpoint}: expected a tokenizer for on_low_ess 'resample', found none there or with the base "
            "model; copy its files into the checkpoint, or set on_low_ess to psis or refuse"
        )
    settings = config.evaluation or EvaluationSettings(total_sequences=2)
    parameters = _parameters(config)

    def resample(rollouts: Rollouts) -> Rollouts:
        def sample(shared: Engine | None) -> Rollouts:
            return resample_responses(
                required(shared), rollouts, parameters, seed=settings.seed, tokenizer=state.tokenizer
            )

        return share_engine(ranks, engine, sample, together=config.shard)

    return resample


@dataclass(frozen=True)
class Collected:
    """The batches of a run.

    Attributes:
        update: the update batch.
        evaluation: the evaluation batch, if there is one.
        notes: on how they were sampled, where they were.
        seconds: that sampling the evaluation batch took, by phase; empty where it was not sampled here and now.
    """

    update: Rollouts
    evaluation: Rollouts | None
    notes: tuple[Note, ...]
    seconds: dict[str, float]


def collect_batches(
    config: RunConfig,
    output: Output,
    sources: Sources,
    state: CheckpointState,
    probe: EntropyProbe,
    ranks: Ranks,
    progress: Phase,
) -> Collected:
    """The update batch and the evaluation batch if there is one; how much to draw of that a pilot may say first.

    What is sampled goes into the output directory, is recorded there, and is read back, so that a command that resumes
    sees the same; what is recorded already is not sampled again.
    """
    from entropy_probe.rollouts.batch import Rollouts
    from entropy_probe.sampling import share_engine

    engine, seconds, writes = engine_for(config, state, ranks), {}, output.writes

    def collected(batch: Batch, config: RunConfig, output: Output) -> tuple[Rollouts, Output]:
        given = getattr(sources, batch)
        if given is not None:
            return given, output

        def collect(engine: Engine | None) -> tuple[Rollouts, Output, dict[str, float]]:
            there, took = output, {}
            if batch not in there.inputs.rollouts:
                notes, took = _sample_batch(batch, config, state, sources, there, engine, progress)
                there = there.record(batch, notes)
            return Rollouts.from_parquet(there.batch_file(batch)), there, took

        rollouts, there, took = share_engine(ranks, engine, collect, together=config.shard)
        seconds.update(took)
        return rollouts, replace(there, writes=writes)

    update, output = collected("update", config, output)
    evaluation = None
    if not config.needs_no_evaluation:
        if sources.evaluation is None and required(config.evaluation).needs_pilot:
            if output.inputs.pilot is None and "evaluation" not in output.inputs.rollouts:
                output = _pilot(config, output, sources, state, engine, probe, update, ranks, progress)
            pilot = required(output.inputs.pilot)
            sized = required(config.evaluation).sized(pilot.sequences, pilot.draws)
            config = config.model_copy(update={"evaluation": sized})
        evaluation, output = collected("evaluation", config, output)
    said = () if output.inputs.pilot is None else output.inputs.pilot.notes
    notes = [note for recorded in output.inputs.rollouts.values() for note in recorded.notes]
    return Collected(update, evaluation, (*said, *notes), seconds)


def _pilot(
    config: RunConfig,
    output: Output,
    sources: Sources,
    state: CheckpointState,
    engine: Engine | None,
    probe: EntropyProbe,
    update: Rollouts,
    ranks: Ranks,
    progress: Phase,
) -> Output:
    """Sample a pilot, probe it, and record what to draw."""
    from entropy_probe.cli.pilot import decide
    from entropy_probe.sampling import sample_pilot, share_engine

    settings = required(config.evaluation)

    def sample(engine: Engine | None) -> tuple[Rollouts, float]:
        subject = (_checked(config, engine), state.tokenizer, sources.prompts)
        rollouts, report = sample_pilot(*subject, settings, _parameters(config), partial(progress, "sample pilot"))
        return rollouts, report.seconds

    pilot, seconds = share_engine(ranks, engine, sample, together=config.shard)
    result = probe.run(update=update, evaluation=pilot)
    with ranks.agreeing():
        decided = decide(settings, len(sources.prompts), result, pilot, seconds)
    (decided,) = ranks.broadcast([decided])  # other ranks have other clocks
    with ranks.agreeing():
        return output.record_pilot(decided)


def _checked(config: RunConfig, engine: Engine | None) -> Engine:
    """The engine.

    Raises:
        ValueError: if there is no tokenizer to sample with.
    """
    if engine is None:
        raise ValueError(
            f"{config.checkpoint}: expected a tokenizer to sample with, found none there or with the base model; copy "
            "its files into the checkpoint, or set rollouts.update and rollouts.evaluation to saved batches"
        )
    return engine


def _sample_batch(
    batch: Batch,
    config: RunConfig,
    state: CheckpointState,
    sources: Sources,
    output: Output,
    engine: Engine | None,
    progress: Phase,
) -> tuple[list[Note], dict[str, float]]:
    """Sample one of the two batches as configured into its file; notes on how that went, and seconds of evaluation."""
    from entropy_probe.sampling import prompt_notes, sample_evaluation_file, sample_update
    from entropy_probe.scoring.cache import fingerprint

    parameters = _parameters(config)
    subject = (_checked(config, engine), state.tokenizer, sources.prompts)
    report_progress = partial(progress, f"sample {batch}")
    notes = [note.about(batch) for note in prompt_notes(state.tokenizer, sources.prompts)]
    if batch == "update":
        reward, settings = required(sources.reward), required(config.update)
        rollouts, report = sample_update(*subject, reward, settings, parameters, report_progress)
        if config.probe.loss.needs_old:  # fresh rollouts are the policy's own
            rollouts = replace(rollouts, old_logprobs=rollouts.sampled_logprobs)
        rollouts.to_parquet(output.batch_file(batch))
        return _describe(batch, report, config) + notes, {}
    policy = fingerprint([*state.model.named_parameters(), *state.model.named_buffers()])
    report = sample_evaluation_file(
        *subject,
        required(config.evaluation),
        parameters,
        output.batch_file(batch),
        shards=output.shards,
        policy=f"{config.generation.engine} {policy}",
        progress=report_progress,
        on_damaged=say,
    )
    return _describe(batch, report, config) + notes, {SAMPLING: report.seconds}


def required(value: T | None) -> T:
    """A setting that the config's validation has made sure of."""
    assert value is not None
    return value


def _describe(batch: str, report: SamplingReport, config: RunConfig) -> list[Note]:
    """What a reader should know about a sampled batch."""
    notes = [note.about(batch) for note in report.notes]
    if report.prompts_dropped:
        tried, rounds = report.prompts_tried, report.rounds
        notes.append(DROPPED(batch=batch, dropped=report.prompts_dropped, tried=tried, rounds=rounds))
    if (share := report.truncated_fraction) >= MANY_TRUNCATED:
        notes.append(TRUNCATED(batch=batch, percent=format_percent(share), share=share))
    if config.generation.stop:
        texts, share = ", ".join(map(repr, config.generation.stop)), report.stopped_fraction
        notes.append(STOP_TEXTS(batch=batch, percent=format_percent(share), texts=texts, share=share))
    return notes
