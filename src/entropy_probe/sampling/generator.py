"""What an engine that samples responses has to offer, and the one way in which the package calls it.

An engine sees token ids, never text, prompts' ids or rewards. Whatever it computes with, the probe scores its
responses again with the policy itself, and compares with the log-probabilities that the engine reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.results.note import Note
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.sampling.prompts import Prompt
from entropy_probe.sampling.stopping import cut_at_stop
from entropy_probe.sampling.templates import encode_prompts

__all__ = [
    "Completion",
    "Progress",
    "SamplingParameters",
    "SequenceGenerator",
    "completed_rollouts",
    "generate_responses",
    "respond",
    "sequence_seeds",
]

Progress = Callable[[int, int], None]
"""Called with the sequences done and the sequences in all."""


@dataclass(frozen=True)
class SamplingParameters:
    """The distribution to sample: ``softmax(logits / temperature)`` over the full vocabulary, cut off at a length.

    Attributes:
        temperature: the sampling temperature, above 0.
        max_completion_length: the longest response, in tokens.
        stop: texts that end a response; see :mod:`entropy_probe.sampling.stopping`. Engines leave them alone.

    Raises:
        ValueError: if temperature or length is not positive, or a stop text is empty.
    """

    temperature: float
    max_completion_length: int
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("temperature", "max_completion_length"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not all(self.stop):
            raise ValueError(f"stop: expected texts of at least one character, got {list(self.stop)}; leave '' out")


@dataclass(frozen=True)
class Completion:
    """A prompt and a response sampled to it.

    Attributes:
        prompt_token_ids: the tokens of the prompt.
        token_ids: the response tokens, the first end-of-sequence token included and nothing after it.
        truncated: whether the response was cut off before an end-of-sequence token.
        logprobs: the engine's own log-probability of each response token in nats; ``None`` if it reports none.
        stopped: whether the response ends with the token that completed a stop text.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    truncated: bool
    logprobs: tuple[float, ...] | None = None
    stopped: bool = False


@runtime_checkable
class SequenceGenerator(Protocol):
    """An engine that samples responses."""

    @property
    def context_length(self) -> int | None:
        """The most tokens that a prompt and its response may have together; ``None`` where nothing bounds them."""
        ...

    @property
    def notes(self) -> tuple[Note, ...]:
        """Everything so far that a careful reader should know, such as a smaller batch size."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: SamplingParameters,
        seeds: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Sample one response to each prompt.

        Args:
            prompts: the token ids of each prompt, without padding; repeated for several responses.
            parameters: the distribution to sample from. Nothing else may shape it: no top-k, no top-p, no penalty.
            seeds: a seed for each sequence, between 0 and 2^63 - 1. A response must depend on nothing but its
                prompt, its seed, the parameters and the policy, up to rounding: not on how the engine batches.
            progress: called with sequences done and in all.

        Returns:
            One completion per prompt, in their order.
        """
        ...


def generate_responses(
    engine: SequenceGenerator,
    token_ids: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    parameters: SamplingParameters,
    seeds: Sequence[int],
    progress: Progress | None = None,
    tokenizer: Any = None,
) -> list[Completion]:
    """Sample one response to each prompt with any engine, check what it gives back, and end it at a stop text.

    Args:
        engine: samples.
        token_ids: the tokens of each prompt, without padding.
        prompt_ids: the id of each prompt, for messages.
        parameters: the distribution to sample from.
        seeds: a seed for each sequence.
        progress: called with sequences done and in all.
        tokenizer: the policy's; needed for stop texts.

    Returns:
        One completion per prompt, in their order.

    Raises:
        ValueError: if a prompt and the longest response do not fit the engine's context, or the engine returns
            something other than a response to each prompt.
    """
    if parameters.stop and tokenizer is None:
        raise ValueError(f"stop: expected the tokenizer beside stop texts {list(parameters.stop)}, got none; pass it")
    limit, longest = engine.context_length, parameters.max_completion_length
    for prompt, tokens in zip(prompt_ids, token_ids, strict=True):
        if limit is not None and len(tokens) + longest > limit:
            raise ValueError(
                f"prompt {prompt}: expected prompt and response within the model's context of {limit} tokens, got "
                f"{len(tokens)} + {longest}; drop the prompt or lower max_completion_length"
            )
    completions = engine.generate(token_ids, parameters, seeds, progress)
    if len(completions) != len(token_ids):
        raise ValueError(f"{_name(engine)}: expected {len(token_ids)} completions, got {len(completions)}")
    for prompt, tokens, completion in zip(prompt_ids, token_ids, completions, strict=True):
        problem = _problem(completion, tuple(tokens), longest)
        if problem is not None:
            raise ValueError(f"{_name(engine)}: prompt {prompt}: {problem}")
    return [_until_stop(completion, parameters.stop, tokenizer) for completion in completions]


def _until_stop(completion: Completion, stop: tuple[str, ...], tokenizer: Any) -> Completion:
    length = cut_at_stop(completion.token_ids, stop, tokenizer) if stop else None
    if length is None:
        return completion
    logprobs = completion.logprobs and completion.logprobs[:length]
    return replace(
        completion, token_ids=completion.token_ids[:length], truncated=False, logprobs=logprobs, stopped=True
    )


def _name(engine: SequenceGenerator) -> str:
    return type(engine).__name__


def _problem(completion: Completion, prompt: tuple[int, ...], longest: int) -> str | None:
    """What is wrong with a completion, if anything."""
    found, logprobs = len(completion.token_ids), completion.logprobs
    if tuple(completion.prompt_token_ids) != prompt:
        return "expected the completion to repeat its prompt's tokens, got others; completions must keep their order"
    if not 1 <= found <= longest:
        return f"expected a response of 1 to {longest} tokens, got {found}"
    if logprobs is not None and len(logprobs) != found:
        return f"expected a log-probability for each of {found} response tokens, got {len(logprobs)}"
    if logprobs is not None and not all(math.isfinite(x) for x in logprobs):
        return "expected finite log-probabilities, got others"
    return None


def respond(
    engine: SequenceGenerator,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    parameters: SamplingParameters,
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> list[Completion]:
    """One response to each prompt."""
    token_ids, prompt_ids = encode_prompts(tokenizer, prompts), [prompt.id for prompt in prompts]
    return generate_responses(engine, token_ids, prompt_ids, parameters, seeds, progress, tokenizer)


def completed_rollouts(
    prompt_ids: list[int],
    completions: Sequence[Completion],
    *,
    rewards: Float[Tensor, " N"] | None = None,
    advantages: Float[Tensor, " N"] | None = None,
) -> Rollouts:
    """Prompts and responses side by side, right-padded with token id 0."""
    starts = torch.tensor([len(c.prompt_token_ids) for c in completions])
    ends = starts + torch.tensor([len(c.token_ids) for c in completions])
    position = torch.arange(int(ends.max()))
    attention_mask = position < ends[:, None]
    tokens = torch.tensor([token for c in completions for token in (*c.prompt_token_ids, *c.token_ids)])
    response_mask = attention_mask & (position >= starts[:, None])
    sampled_logprobs = None
    if all(c.logprobs is not None for c in completions):
        flat = torch.tensor([s for c in completions for s in c.logprobs or ()])
        sampled_logprobs = torch.zeros(response_mask.shape).masked_scatter_(response_mask, flat)
    return Rollouts(
        input_ids=torch.zeros(attention_mask.shape, dtype=torch.long).masked_scatter_(attention_mask, tokens),
        attention_mask=attention_mask,
        response_mask=response_mask,
        prompt_ids=torch.tensor(prompt_ids),
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
