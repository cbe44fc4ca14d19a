"""The batches of a run: read from files, or sampled from the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal, TypeVar

from entropy_probe.cli.output import say
from entropy_probe.report.numbers import format_percent
from entropy_probe.results.note import NOTHING_TO_DO, Note, NoteKind

if TYPE_CHECKING:
    from entropy_probe.analyses.policy import Resample
    from entropy_probe.analyses.provenance import Phase
    from entropy_probe.checkpoints import CheckpointState
    from entropy_probe.cli.config import RunConfig
    from entropy_probe.cli.output import Output
    from entropy_probe.parallel.ranks import Ranks
    from entropy_probe.rollouts.batch import Rollouts
    from entropy_probe.sampling import Engine, Prompt, Rewards, SamplingParameters, SamplingReport

__all__ = ["Sources", "collect_batches", "end_ids", "read_sources", "required", "resampler"]

T = TypeVar("T")

UNUSED_COLUMNS = NoteKind(
    "unused_columns",
    "{batch}: of the file's columns, {columns} are not used",
    f"{NOTHING_TO_DO} The columns that are read are in docs/rollouts.md.",
)
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


def read_sources(config: RunConfig) -> Sources:
    """The saved rollouts, and what sampling the others takes.

    Raises:
        ValueError: if a file, the prompts or the reward cannot be used.
    """
    from entropy_probe.rollouts.batch import Rollouts
    from entropy_probe.sampling import load_prompts, load_rewards, unused_columns

    update, evaluation = (path and Rollouts.from_parquet(path) for _, path in config.rollouts)
    if update is not None and update.advantages is None:
        raise ValueError(
            f"{config.rollouts.update}: expected advantages in an update batch, got no column advantage; add it"
        )
    unused = {batch: unused_columns(path) for batch, path in config.rollouts if path}
    complete = update is not None and (evaluation is not None or config.needs_no_evaluation)
    prompts = [] if complete else load_prompts(required(config.prompts))
    reward = None
    if update is None:
        reward = load_rewards(required(config.reward), config.reward_weights, _trainer_state(config.checkpoint))
        reward.check(prompts)
    notes = (UNUSED_COLUMNS(batch=batch, columns=", ".join(names)) for batch, names in unused.items() if names)
    return Sources(update, evaluation, prompts, reward, tuple(notes))


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


def collect_batches(
    config: RunConfig, output: Output, sources: Sources, state: CheckpointState, ranks: Ranks, progress: Phase
) -> tuple[Rollouts, Rollouts | None, tuple[Note, ...]]:
    """The update batch, the evaluation batch if there is one, and notes on how they were sampled where they were.

    What is sampled goes into the output directory, is recorded there, and is read back, so that a command that resumes
    sees the same; what is recorded already is not sampled again.
    """
    from entropy_probe.rollouts.batch import Rollouts
    from entropy_probe.sampling import share_engine

    def collect(engine: Engine | None) -> tuple[Rollouts, Rollouts | None, tuple[Note, ...]]:
        batches = {"update": sources.update, "evaluation": sources.evaluation}
        there, notes = output, []
        for batch in ("update",) if config.needs_no_evaluation else ("update", "evaluation"):
            if batches[batch] is not None:
                continue
            if batch not in there.inputs.rollouts:
                there = there.record(batch, _sample_batch(batch, config, state, sources, there, engine, progress))
            batches[batch] = Rollouts.from_parquet(there.batch_file(batch))
            notes += there.inputs.rollouts[batch].notes
        return required(batches["update"]), batches["evaluation"], tuple(notes)

    return share_engine(ranks, engine_for(config, state, ranks), collect, together=config.shard)


def _sample_batch(
    batch: Literal["update", "evaluation"],
    config: RunConfig,
    state: CheckpointState,
    sources: Sources,
    output: Output,
    engine: Engine | None,
    progress: Phase,
) -> list[Note]:
    """Sample one of the two batches as configured into its file; notes on how that went.

    Raises:
        ValueError: if there is no tokenizer to sample with.
    """
    from entropy_probe.sampling import prompt_notes, sample_evaluation_file, sample_update
    from entropy_probe.scoring.cache import fingerprint

    if engine is None:
        raise ValueError(
            f"{config.checkpoint}: expected a tokenizer to sample with, found none there or with the base model; copy "
            "its files into the checkpoint, or set rollouts.update and rollouts.evaluation to saved batches"
        )
    parameters = _parameters(config)
    subject, report_progress = (engine, state.tokenizer, sources.prompts), partial(progress, f"sample {batch}")
    notes = [note.about(batch) for note in prompt_notes(state.tokenizer, sources.prompts)]
    if batch == "update":
        reward, settings = required(sources.reward), required(config.update)
        rollouts, report = sample_update(*subject, reward, settings, parameters, report_progress)
        if config.probe.loss.needs_old:  # fresh rollouts are the policy's own
            rollouts = replace(rollouts, old_logprobs=rollouts.sampled_logprobs)
        rollouts.to_parquet(output.batch_file(batch))
        return _describe(batch, report, config) + notes
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
    return _describe(batch, report, config) + notes


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
    if share := report.truncated_fraction:
        notes.append(TRUNCATED(batch=batch, percent=format_percent(share), share=share))
    if config.generation.stop:
        texts, share = ", ".join(map(repr, config.generation.stop)), report.stopped_fraction
        notes.append(STOP_TEXTS(batch=batch, percent=format_percent(share), texts=texts, share=share))
    return notes
