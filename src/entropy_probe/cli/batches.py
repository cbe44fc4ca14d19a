"""The batches of a run: read from files, or sampled from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    sampling = _Sampling(config, sources, state, engine_for(config, state, ranks), ranks, progress)
    update, output, _ = sampling.collect("update", output)
    evaluation, seconds = None, {}
    if not config.needs_no_evaluation:
        if sources.evaluation is None and required(config.evaluation).needs_pilot:
            if output.inputs.pilot is None and "evaluation" not in output.inputs.rollouts:
                output = sampling.take_pilot(output, probe, update)
            pilot = required(output.inputs.pilot)
            sized = required(config.evaluation).sized(pilot.sequences, pilot.draws)
            sampling = replace(sampling, config=config.model_copy(update={"evaluation": sized}))
        evaluation, output, seconds = sampling.collect("evaluation", output)
    said = () if output.inputs.pilot is None else output.inputs.pilot.notes
    notes = [note for recorded in output.inputs.rollouts.values() for note in recorded.notes]
    return Collected(update, evaluation, (*said, *notes), seconds)


@dataclass(frozen=True, eq=False)
class _Sampling:
    """What the batches of a run are sampled with on this rank."""

    config: RunConfig
    sources: Sources
    state: CheckpointState
    engine: Engine | None
    ranks: Ranks
    progress: Phase

    def _share(self, sample: Callable[[Engine | None], T]) -> T:
        from entropy_probe.sampling import share_engine

        return share_engine(self.ranks, self.engine, sample, together=self.config.shard)

    def _subject(self, engine: Engine | None) -> tuple[Engine, Any, list[Prompt]]:
        """Engine, tokenizer and prompts; a ``ValueError`` where there is no tokenizer."""
        if engine is None:
            raise ValueError(
                f"{self.config.checkpoint}: expected a tokenizer to sample with, found none there or with the base "
                "model; copy its files into the checkpoint, or set rollouts.update and rollouts.evaluation to saved "
                "batches"
            )
        return engine, self.state.tokenizer, self.sources.prompts

    def collect(self, batch: Batch, output: Output) -> tuple[Rollouts, Output, dict[str, float]]:
        """A batch as given or sampled, the output that has it, and the seconds that sampling evaluation took."""
        from entropy_probe.rollouts.batch import Rollouts

        given = getattr(self.sources, batch)
        if given is not None:
            return given, output, {}

        def sample(engine: Engine | None) -> tuple[Rollouts, Output, dict[str, float]]:
            there, seconds = output, {}
            if batch not in there.inputs.rollouts:
                notes, seconds = self._sample(batch, there, engine)
                there = there.record(batch, notes)
            return Rollouts.from_parquet(there.batch_file(batch)), there, seconds

        rollouts, there, seconds = self._share(sample)
        return rollouts, replace(there, writes=output.writes), seconds

    def take_pilot(self, output: Output, probe: EntropyProbe, update: Rollouts) -> Output:
        """Sample a pilot, probe it, and record what to draw."""
        from entropy_probe.cli.pilot import decide
        from entropy_probe.sampling import sample_pilot

        settings, ranks = required(self.config.evaluation), self.ranks

        def sample(engine: Engine | None) -> tuple[Rollouts, float]:
            how = (settings, _parameters(self.config), partial(self.progress, "sample pilot"))
            rollouts, report = sample_pilot(*self._subject(engine), *how)
            return rollouts, report.seconds

        pilot, seconds = self._share(sample)
        result = probe.run(update=update, evaluation=pilot)
        with ranks.agreeing():
            decided = decide(settings, len(self.sources.prompts), result, pilot, seconds)
        (decided,) = ranks.broadcast([decided])  # other ranks have other clocks
        with ranks.agreeing():
            return output.record_pilot(decided)

    def _sample(self, batch: Batch, output: Output, engine: Engine | None) -> tuple[list[Note], dict[str, float]]:
        """Sample a batch into its file; notes on how that went, and seconds of evaluation."""
        from entropy_probe.sampling import prompt_notes, sample_evaluation_file, sample_update
        from entropy_probe.scoring.cache import fingerprint

        config, model = self.config, self.state.model
        subject, how = self._subject(engine), (_parameters(config), partial(self.progress, f"sample {batch}"))
        notes = [note.about(batch) for note in prompt_notes(self.state.tokenizer, self.sources.prompts)]
        file, seconds = output.batch_file(batch), {}
        if batch == "update":
            rollouts, report = sample_update(*subject, required(self.sources.reward), required(config.update), *how)
            if config.probe.loss.needs_old:  # fresh rollouts are the policy's own
                rollouts = replace(rollouts, old_logprobs=rollouts.sampled_logprobs)
            rollouts.to_parquet(file)
        else:
            policy = f"{config.generation.engine} {fingerprint([*model.named_parameters(), *model.named_buffers()])}"
            parameters, progress = how
            where = {"shards": output.shards, "policy": policy, "progress": progress, "on_damaged": say}
            report = sample_evaluation_file(*subject, required(config.evaluation), parameters, file, **where)
            seconds = {SAMPLING: report.seconds}
        return _describe(batch, report, config) + notes, seconds


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
