"""The evaluation batch, in memory or shard by shard in files: single draws, or several responses to each prompt."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from entropy_probe.results.record import Settings
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.rollouts.parquet import merge_rollouts, read_note, read_rollouts, write_rollouts
from entropy_probe.sampling.collect import (
    EVALUATION_STREAM,
    PILOT_STREAM,
    SamplingReport,
    check_prompts,
    numpy_generator,
)
from entropy_probe.sampling.engine import MOST_SEQUENCES, Completion, Engine, Progress, SamplingParameters
from entropy_probe.sampling.prompts import Prompt
from entropy_probe.sampling.responses import completed_rollouts, generate_responses, respond, sequence_seeds
from entropy_probe.sampling.templates import encode_prompts

SHARD_SEQUENCES = 256
"""Draws per shard. What a draw gives does not depend on it."""
MIN_PROMPTS = 10
"""Fewer clusters have an error that is hardly known itself."""
PILOT_SEQUENCES, PILOT_PROMPTS = 64, 16
"""The second where responses to one prompt are to be compared: four of each."""


class EvaluationSettings(Settings):
    """The evaluation batch: single draws, or several responses to each of distinct prompts, as many as are asked for.

    Attributes:
        total_sequences: responses; without ``draws_per_prompt`` single draws of prompts with replacement.
        num_prompts: distinct prompts, drawn without replacement; each is a cluster.
        draws_per_prompt: responses to each; ``auto`` takes what a pilot says is cheapest for the error.
        relative_error: draw as much as makes the error from the evaluation rollouts this share of the predicted change,
            as a pilot of 64 sequences says. The pilot is no part of the batch, since the batch's size is from it.
        max_minutes: draw no more than can be sampled and probed in that time, as the pilot says; without
            ``relative_error`` as much as that.
        seed: of the draws and of the responses. An update batch with the same seed is independent all the
            same.
    """

    total_sequences: int | None = Field(default=None, ge=2, le=MOST_SEQUENCES)
    num_prompts: int | None = Field(default=None, ge=MIN_PROMPTS)
    draws_per_prompt: Annotated[int, Field(ge=1, le=MOST_SEQUENCES)] | Literal["auto"] | None = None
    relative_error: float | None = Field(default=None, gt=0, lt=1)
    max_minutes: float | None = Field(default=None, gt=0, le=1e6)
    seed: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _check_size(self) -> EvaluationSettings:
        sizes = [name for name in ("total_sequences", "num_prompts") if getattr(self, name) is not None]
        wishes = [name for name in ("relative_error", "max_minutes") if getattr(self, name) is not None]
        if len(sizes) + bool(wishes) != 1:
            got = " and ".join([*sizes, *wishes]) or "none"
            raise ValueError(
                f"evaluation: expected one size: total_sequences, num_prompts, or relative_error and max_minutes, got "
                f"{got}"
            )
        draws = self.draws_per_prompt
        if self.num_prompts is not None and isinstance(draws, int) and self.num_prompts * draws > MOST_SEQUENCES:
            raise ValueError(
                f"evaluation: expected at most {MOST_SEQUENCES} sequences, got {self.num_prompts} prompts with {draws} "
                "draws each; lower one of them"
            )
        if self.num_prompts is not None and draws is None:
            raise ValueError("evaluation: expected draws_per_prompt beside num_prompts, got none; set it, or auto")
        total = self.total_sequences
        if total is not None and isinstance(draws, int) and (total % draws or total < MIN_PROMPTS * draws):
            raise ValueError(
                f"evaluation: expected total_sequences of {MIN_PROMPTS} prompts or more with {draws} draws each, got "
                f"{total}; set num_prompts in its place"
            )
        return self

    @property
    def needs_pilot(self) -> bool:
        """Whether the size, or how to draw, is to be found out first."""
        return self.draws_per_prompt == "auto" or self.relative_error is not None or self.max_minutes is not None

    @property
    def num_clusters(self) -> int | None:
        """What is independent in the batch; ``None`` where a pilot says how much is drawn."""
        if isinstance(self.draws_per_prompt, int) and self.total_sequences is not None:
            return self.total_sequences // self.draws_per_prompt
        return self.num_prompts or (None if self.draws_per_prompt == "auto" else self.total_sequences)

    def sized(self, sequences: int, draws: int | None) -> EvaluationSettings:
        """About that many sequences, with that many draws per prompt, in place of what a pilot was to say."""
        size: dict[str, Any] = {"total_sequences": max(2, sequences)}
        if draws is not None:
            number = self.num_prompts or max(MIN_PROMPTS, round(sequences / draws))
            size = {"num_prompts": number, "draws_per_prompt": draws}
        return EvaluationSettings(seed=self.seed, **size)

    def pilot(self, prompts: int) -> EvaluationSettings:
        """What to draw first, of so many prompts."""
        draws = self.draws_per_prompt
        if draws is None:
            return self.sized(PILOT_SEQUENCES, None)
        number = max(MIN_PROMPTS, min(prompts, PILOT_PROMPTS) if draws == "auto" else PILOT_SEQUENCES // draws)
        each = PILOT_SEQUENCES // number if draws == "auto" else draws
        return EvaluationSettings(num_prompts=number, draws_per_prompt=each, seed=self.seed)


def sample_evaluation(
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: EvaluationSettings,
    parameters: SamplingParameters,
    progress: Progress | None = None,
    stream: int = EVALUATION_STREAM,
) -> tuple[Rollouts, SamplingReport]:
    """Sample an evaluation batch.

    Single draws of prompts are uniform and with replacement, so that every sequence is an independent cluster; a prompt
    drawn again keeps its id in ``prompt_ids``. With ``draws_per_prompt`` prompts are distinct and clusters.

    Args:
        engine: samples the responses.
        tokenizer: the policy's tokenizer.
        prompts: to draw from, with distinct ids.
        settings: size and seed, without a wish that a pilot has to answer first.
        parameters: the distribution to sample from.
        progress: called with sequences done and in all.
        stream: of the seed's random numbers; batches of other streams are independent of this one.

    Returns:
        The batch on the CPU, right-padded, in draw order; and how it came about.

    Raises:
        ValueError: if there are too few prompts or generation is not possible; see :func:`generate_responses`.
    """
    drawn = _draw(prompts, settings, stream)
    seeds = sequence_seeds(settings.seed, stream, 0, range(len(drawn)))
    began = time.perf_counter()
    completions = respond(engine, tokenizer, drawn, parameters, seeds, progress)
    seconds = time.perf_counter() - began
    rollouts = completed_rollouts([prompt.id for prompt in drawn], completions)
    return rollouts, _report(drawn, [_counts(completions)], engine, seconds)


def sample_pilot(
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: EvaluationSettings,
    parameters: SamplingParameters,
    progress: Progress | None = None,
) -> tuple[Rollouts, SamplingReport]:
    """A small batch, independent of the evaluation batch, to find out how much of that to draw, and how."""
    pilot = settings.pilot(len(prompts))
    return sample_evaluation(engine, tokenizer, prompts, pilot, parameters, progress, PILOT_STREAM)


def sample_evaluation_file(
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: EvaluationSettings,
    parameters: SamplingParameters,
    path: Path,
    *,
    shards: Path,
    policy: str,
    progress: Progress | None = None,
    on_damaged: Callable[[str], None] | None = None,
) -> SamplingReport:
    """:func:`sample_evaluation` into a Parquet file, with no more than a shard of it in memory.

    The draws are cut into shards of :data:`SHARD_SEQUENCES`, each written to ``shards/shard-00000.parquet`` and so on
    as soon as it is sampled, whole or not at all. Shards that are there already, of the same policy, prompts,
    settings and parameters, are kept: a sampling run that was killed goes on with the shard that it was killed in. At
    the end they are copied into one file, a row group each; they stay until the caller needs them no more.

    ``policy`` identifies the policy that the engine samples from, weights included; ``on_damaged`` is called with what
    is wrong with a shard that cannot be read, which is sampled again.
    """
    drawn = _draw(prompts, settings, EVALUATION_STREAM)
    what = json.dumps([policy, settings.model_dump(mode="json"), asdict(parameters), SHARD_SEQUENCES])
    digest = hashlib.blake2b(what.encode(), digest_size=16)
    for prompt, tokens in zip(prompts, encode_prompts(tokenizer, prompts), strict=True):
        digest.update(f"{prompt.id} {tokens} ".encode())
    key = digest.hexdigest()
    counts, files, seconds = [], [], 0.0
    for start in range(0, len(drawn), SHARD_SEQUENCES):
        of_shard = drawn[start : start + SHARD_SEQUENCES]
        file = shards / f"shard-{len(files):05d}.parquet"
        note = _note_of_whole(file, on_damaged)
        if note.get("key") != key:
            seeds = sequence_seeds(settings.seed, EVALUATION_STREAM, 0, range(start, start + len(of_shard)))
            began = time.perf_counter()
            completions = respond(engine, tokenizer, of_shard, parameters, seeds)
            note = {"key": key, "counts": _counts(completions), "seconds": time.perf_counter() - began}
            write_rollouts(completed_rollouts([prompt.id for prompt in of_shard], completions), file, note=note)
        counts.append(tuple(note["counts"]))
        seconds += note["seconds"]
        files.append(file)
        if progress is not None:
            progress(start + len(of_shard), len(drawn))
    merge_rollouts(files, path)
    return _report(drawn, counts, engine, seconds)


def _note_of_whole(file: Path, on_damaged: Callable[[str], None] | None) -> dict[str, Any]:
    """The note of a shard that can be read to its end; empty without one."""
    if not file.is_file():
        return {}
    try:
        note = read_note(file)
        read_rollouts(file)
    except (ValueError, OSError) as error:  # as pyarrow raises them
        if on_damaged is not None:
            on_damaged(f"{file} is damaged and is sampled again ({' '.join(str(error).split()):.100})")
        return {}
    return note


def resample_responses(
    engine: Engine, rollouts: Rollouts, parameters: SamplingParameters, *, seed: int, tokenizer: Any = None
) -> Rollouts:
    """Fresh responses of the policy as it is now, to the prompts of an evaluation batch, in the same order.

    With the parameters and the seed of :func:`sample_evaluation` an unchanged policy gives the same batch again. A
    changed one meets the same random numbers, so that responses that the change does not reach stay the same. The
    prompt of a sequence is everything before its first response token; stop texts need the tokenizer.

    Raises:
        ValueError: if generation is not possible; see :func:`generate_responses`.
    """
    before_response = rollouts.attention_mask & (rollouts.response_mask.cumsum(1) == 0)
    prompts = [ids[real].tolist() for ids, real in zip(rollouts.input_ids, before_response, strict=True)]
    prompt_ids = rollouts.prompt_ids.tolist()
    seeds = sequence_seeds(seed, EVALUATION_STREAM, 0, range(len(prompts)))
    completions = generate_responses(engine, prompts, prompt_ids, parameters, seeds, tokenizer=tokenizer)
    return completed_rollouts(prompt_ids, completions)


def _draw(prompts: Sequence[Prompt], settings: EvaluationSettings, stream: int) -> list[Prompt]:
    check_prompts(prompts)
    assert not settings.needs_pilot
    generator, number = numpy_generator(settings.seed, stream), settings.num_clusters
    draws = settings.draws_per_prompt
    if draws is None:
        return [prompts[i] for i in generator.integers(len(prompts), size=number)]
    assert isinstance(draws, int)
    assert number is not None
    if number > len(prompts):
        raise ValueError(
            f"evaluation: expected at most the {len(prompts)} prompts of the source, got {number} with {draws} draws "
            "each; lower num_prompts, or leave draws_per_prompt out"
        )
    return [prompts[i] for i in generator.permutation(len(prompts))[:number] for _ in range(draws)]


def _counts(completions: Sequence[Completion]) -> tuple[int, int, int]:
    """Truncated responses, response tokens, and responses that end with a stop text."""
    tokens = sum(len(c.token_ids) for c in completions)
    return sum(c.truncated for c in completions), tokens, sum(c.stopped for c in completions)


def _report(
    drawn: Sequence[Prompt], counts: Sequence[tuple[int, int, int]], engine: Engine, seconds: float
) -> SamplingReport:
    distinct = len({prompt.id for prompt in drawn})
    truncated, tokens, stopped = map(sum, zip(*counts, strict=True))
    return SamplingReport(
        num_sequences=len(drawn),
        num_prompts=distinct,
        prompts_tried=distinct,
        prompts_dropped=0,
        rounds=1,
        reward_mean=None,
        truncated_fraction=truncated / len(drawn),
        mean_response_length=tokens / len(drawn),
        stopped_fraction=stopped / len(drawn),
        seconds=seconds,
        notes=engine.notes,
    )
