"""The one way in which the package calls an engine: what it gives back is checked, and ended at a stop text."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.sampling.engine import Completion, Engine, Progress, SamplingParameters
from entropy_probe.sampling.prompts import Prompt
from entropy_probe.sampling.templates import encode_prompts


def generate_responses(
    engine: Engine,
    token_ids: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    parameters: SamplingParameters,
    seeds: Sequence[int],
    progress: Progress | None = None,
    tokenizer: Any = None,
) -> list[Completion]:
    """Sample one response to each prompt with any engine, check what it gives back, and end it at a stop text.

    ``prompt_ids`` are for messages; stop texts need the tokenizer.

    Raises:
        ValueError: if a prompt and the longest response do not fit the engine's context, or the engine returns
            something other than a response to each prompt.
    """
    if parameters.stop and tokenizer is None:
        raise ValueError(f"stop: expected the tokenizer beside stop texts {list(parameters.stop)}, got none; pass it")
    limit, longest, name = engine.context_length, parameters.max_completion_length, type(engine).__name__
    for prompt, tokens in zip(prompt_ids, token_ids, strict=True):
        if limit is not None and len(tokens) + longest > limit:
            raise ValueError(
                f"prompt {prompt}: expected prompt and response within the model's context of {limit} tokens, got "
                f"{len(tokens)} + {longest}; drop the prompt or lower max_completion_length"
            )
    completions = engine.generate(token_ids, parameters, seeds, progress)
    if len(completions) != len(token_ids):
        raise ValueError(f"{name}: expected {len(token_ids)} completions, got {len(completions)}")
    for prompt, tokens, completion in zip(prompt_ids, token_ids, completions, strict=True):
        problem = _problem(completion, tuple(tokens), longest)
        if problem is not None:
            raise ValueError(f"{name}: prompt {prompt}: {problem}")
    return [_until_stop(completion, parameters.stop, tokenizer) for completion in completions]


def cut_at_stop(token_ids: Sequence[int], stop: Sequence[str], tokenizer: Any) -> int | None:
    """Tokens up to the one that completes a stop text, that one included; None if none is completed.

    Whether a response ends after its ``k``-th token depends on these ``k`` tokens alone, so it is part of what a
    complete response is, as the end-of-sequence token is, and not of the policy: the tokens up to there have the full
    softmax as their distribution, with which entropies and log-probabilities are taken, and nothing is left out or
    reweighted. Sampling on and cutting gives the same distribution as stopping would, with any engine, for the cost of
    the tokens that are cut. Special tokens count with their text, so that a stop text may be one of them.
    """

    def is_complete(length: int) -> bool:
        text = tokenizer.decode(list(token_ids[:length]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(s in text for s in stop)

    if not is_complete(len(token_ids)):
        return None
    # more tokens never take a stop text away, so the first length with one is found by bisection
    return bisect_left(range(len(token_ids)), True, key=is_complete)


def _until_stop(completion: Completion, stop: tuple[str, ...], tokenizer: Any) -> Completion:
    length = cut_at_stop(completion.token_ids, stop, tokenizer) if stop else None
    if length is None:
        return completion
    logprobs = completion.logprobs and completion.logprobs[:length]
    return replace(
        completion, token_ids=completion.token_ids[:length], truncated=False, logprobs=logprobs, stopped=True
    )


def _problem(completion: Completion, prompt: tuple[int, ...], longest: int) -> str | None:
    """What is wrong with a completion, if anything."""
    length, logprobs = len(completion.token_ids), completion.logprobs
    if tuple(completion.prompt_token_ids) != prompt:
        return "expected the completion to repeat its prompt's tokens, got others; completions must keep their order"
    if not 1 <= length <= longest:
        return f"expected a response of 1 to {longest} tokens, got {length}"
    if logprobs is not None and len(logprobs) != length:
        return f"expected a log-probability for each of {length} response tokens, got {len(logprobs)}"
    if logprobs is not None and not all(math.isfinite(x) for x in logprobs):
        return "expected finite log-probabilities, got others"
    return None


def respond(
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    parameters: SamplingParameters,
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> list[Completion]:
    """One response to each prompt."""
    token_ids, prompt_ids = encode_prompts(tokenizer, prompts), [prompt.id for prompt in prompts]
    return generate_responses(engine, token_ids, prompt_ids, parameters, seeds, progress, tokenizer)


def side_by_side(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> tuple[Int[Tensor, "N L"], Bool[Tensor, "N L"], Bool[Tensor, "N L"]]:
    """Token ids of prompts and responses, right-padded with 0; where they are, and where the responses are."""
    starts = torch.tensor([len(prompt) for prompt in prompts])
    ends = starts + torch.tensor([len(response) for response in responses])
    position = torch.arange(int(ends.max()))
    there = position < ends[:, None]
    tokens = [token for pair in zip(prompts, responses, strict=True) for part in pair for token in part]
    input_ids = torch.zeros(there.shape, dtype=torch.long).masked_scatter(there, torch.tensor(tokens))
    return input_ids, there, there & (position >= starts[:, None])


def completed_rollouts(
    prompt_ids: list[int],
    completions: Sequence[Completion],
    *,
    rewards: Float[Tensor, " N"] | None = None,
    advantages: Float[Tensor, " N"] | None = None,
) -> Rollouts:
    """Prompts and responses as a batch."""
    input_ids, attention_mask, response_mask = side_by_side(
        [c.prompt_token_ids for c in completions], [c.token_ids for c in completions]
    )
    sampled_logprobs = None
    if all(c.logprobs is not None for c in completions):
        flat = torch.tensor([s for c in completions for s in c.logprobs or ()])
        sampled_logprobs = torch.zeros(response_mask.shape).masked_scatter_(response_mask, flat)
    return Rollouts(
        input_ids,
        attention_mask,
        response_mask,
        torch.tensor(prompt_ids),
        advantages=advantages,
        rewards=rewards,
        sampled_logprobs=sampled_logprobs,
    )


def sequence_seeds(seed: int, stream: int, number: int, indices: Iterable[int]) -> list[int]:
    """A seed of its own for each sequence of each batch and round, so that no two share random numbers.

    It depends on the sequence's index alone, so batches and shards may be cut anywhere and sampled by any process.
    """
    states = (np.random.SeedSequence([seed, stream, 1 + number, i]).generate_state(1, np.uint64)[0] for i in indices)
    return [int(state >> np.uint64(1)) for state in states]
