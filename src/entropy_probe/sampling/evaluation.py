"""The evaluation batch: prompts drawn with replacement, one response per draw, in memory or shard by shard in files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.rollouts.parquet import merge_rollouts, read_note, read_rollouts, write_rollouts
from entropy_probe.sampling.collect import (
    EVALUATION_STREAM,
    EvaluationSettings,
    SamplingReport,
    check_prompts,
    numpy_generator,
)
from entropy_probe.sampling.engine import Completion, Engine, Progress, SamplingParameters
from entropy_probe.sampling.prompts import Prompt
from entropy_probe.sampling.responses import completed_rollouts, generate_responses, respond, sequence_seeds
from entropy_probe.sampling.templates import encode_prompts

__all__ = ["SHARD_SEQUENCES", "resample_responses", "sample_evaluation", "sample_evaluation_file"]

SHARD_SEQUENCES = 256
"""Draws per shard. What a draw gives does not depend on it."""


def sample_evaluation(
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: EvaluationSettings,
    parameters: SamplingParameters,
    progress: Progress | None = None,
) -> tuple[Rollouts, SamplingReport]:
    """Sample an evaluation batch: prompts drawn uniformly with replacement, one response per draw.

    Every sequence is then an independent cluster. A prompt drawn again keeps its id in ``prompt_ids``.

    Args:
        engine: samples the responses.
        tokenizer: the policy's tokenizer.
        prompts: to draw from, with distinct ids.
        settings: size and seed.
        parameters: the distribution to sample from.
        progress: called with sequences done and in all.

    Returns:
        The batch on the CPU, right-padded, in draw order; and how it came about.

    Raises:
        ValueError: if there is no prompt or generation is not possible; see :func:`generate_responses`.
    """
    drawn = _draw(prompts, settings)
    seeds = sequence_seeds(settings.seed, EVALUATION_STREAM, 0, range(len(drawn)))
    completions = respond(engine, tokenizer, drawn, parameters, seeds, progress)
    rollouts = completed_rollouts([prompt.id for prompt in drawn], completions)
    return rollouts, _report(drawn, [_counts(completions)], engine)


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

    Args:
        engine: samples the responses.
        tokenizer: the policy's tokenizer.
        prompts: to draw from, with distinct ids.
        settings: size and seed.
        parameters: the distribution to sample from.
        path: the file to write.
        shards: the directory for shards.
        policy: identifies the policy that the engine samples from, weights included.
        progress: called with sequences done and in all.
        on_damaged: called with what is wrong with a shard that cannot be read, which is sampled again.

    Returns:
        How the batch came about.

    Raises:
        ValueError: as of :func:`sample_evaluation`.
    """
    drawn = _draw(prompts, settings)
    what = json.dumps([policy, settings.model_dump(mode="json"), asdict(parameters), SHARD_SEQUENCES])
    digest = hashlib.blake2b(what.encode(), digest_size=16)
    for prompt, tokens in zip(prompts, encode_prompts(tokenizer, prompts), strict=True):
        digest.update(f"{prompt.id} {tokens} ".encode())
    key = digest.hexdigest()
    counts, files = [], []
    for start in range(0, len(drawn), SHARD_SEQUENCES):
        of_shard = drawn[start : start + SHARD_SEQUENCES]
        file = shards / f"shard-{len(files):05d}.parquet"
        note = _note_of_whole(file, on_damaged)
        if note.get("key") != key:
            seeds = sequence_seeds(settings.seed, EVALUATION_STREAM, 0, range(start, start + len(of_shard)))
            completions = respond(engine, tokenizer, of_shard, parameters, seeds)
            note = {"key": key, "counts": _counts(completions)}
            write_rollouts(completed_rollouts([prompt.id for prompt in of_shard], completions), file, note=note)
        counts.append(tuple(note["counts"]))
        files.append(file)
        if progress is not None:
            progress(start + len(of_shard), len(drawn))
    merge_rollouts(files, path)
    return _report(drawn, counts, engine)


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
    engine: Engine,
    rollouts: Rollouts,
    parameters: SamplingParameters,
    *,
    seed: int,
    tokenizer: Any = None,
) -> Rollouts:
    """Fresh responses of the policy as it is now, to the prompts of an evaluation batch.

    With the parameters and the seed of :func:`sample_evaluation` an unchanged policy gives the same batch again. A
    changed one meets the same random numbers, so that responses that the change does not reach stay the same.

    Args:
        engine: samples the responses.
        rollouts: the batch; the prompt of a sequence is everything before its first response token.
        parameters: the distribution to sample from.
        seed: of the responses.
        tokenizer: the policy's; needed for stop texts.

    Returns:
        One sequence per prompt, in the same order.

    Raises:
        ValueError: if generation is not possible; see :func:`generate_responses`.
    """
    before_response = rollouts.attention_mask & (rollouts.response_mask.cumsum(1) == 0)
    prompts = [ids[real].tolist() for ids, real in zip(rollouts.input_ids, before_response, strict=True)]
    prompt_ids = rollouts.prompt_ids.tolist()
    seeds = sequence_seeds(seed, EVALUATION_STREAM, 0, range(len(prompts)))
    completions = generate_responses(engine, prompts, prompt_ids, parameters, seeds, tokenizer=tokenizer)
    return completed_rollouts(prompt_ids, completions)


def _draw(prompts: Sequence[Prompt], settings: EvaluationSettings) -> list[Prompt]:
    check_prompts(prompts)
    generator = numpy_generator(settings.seed, EVALUATION_STREAM)
    return [prompts[i] for i in generator.integers(len(prompts), size=settings.total_sequences)]


def _counts(completions: Sequence[Completion]) -> tuple[int, int, int]:
    """Truncated responses, response tokens, and responses that end with a stop text."""
    tokens = sum(len(c.token_ids) for c in completions)
    return sum(c.truncated for c in completions), tokens, sum(c.stopped for c in completions)


def _report(drawn: Sequence[Prompt], counts: Sequence[tuple[int, int, int]], engine: Engine) -> SamplingReport:
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
        notes=engine.notes,
    )
