"""What an engine that samples responses has to offer, and the one way in which the package calls it.

An engine sees token ids, never text, prompts' ids or rewards. Whatever it computes with, the probe scores its
responses again with the policy itself, and compares with the log-probabilities that the engine reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.sampling.prompts import Prompt
from entropy_probe.types import Rollouts

__all__ = [
    "Completion",
    "Progress",
    "SamplingParameters",
    "SequenceGenerator",
    "completed_rollouts",
    "encode_prompts",
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

    Raises:
        ValueError: if either is not positive.
    """

    temperature: float
    max_completion_length: int

    def __post_init__(self) -> None:
        for name in ("temperature", "max_completion_length"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a positive number, got {value}")


@dataclass(frozen=True)
class Completion:
    """A prompt and a response sampled to it.

    Attributes:
        prompt_token_ids: the tokens of the prompt.
        token_ids: the response tokens, the first end-of-sequence token included and nothing after it.
        truncated: whether the response was cut off before an end-of-sequence token.
        logprobs: the engine's own log-probability of each response token in nats; ``None`` if it reports none.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    truncated: bool
    logprobs: tuple[float, ...] | None = None


@runtime_checkable
class SequenceGenerator(Protocol):
    """An engine that samples responses."""

    @property
    def context_length(self) -> int | None:
        """The most tokens that a prompt and its response may have together; ``None`` where nothing bounds them."""
        ...

    @property
    def messages(self) -> tuple[str, ...]:
        """One line for everything so far that a careful reader should know, such as a smaller batch size."""
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


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, without padding.

    Text is tokenized with the tokenizer's default special tokens. Messages go through its chat template, with
    the generation prompt added.

    Raises:
        ValueError: if a prompt has messages and the tokenizer no chat template, or a prompt has no tokens.
    """
    return [_encode(tokenizer, prompt) for prompt in prompts]


def _encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    if isinstance(prompt.prompt, str):
        token_ids = tokenizer(prompt.prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise ValueError(
            f"prompt {prompt.id}: expected a tokenizer with a chat template for a prompt of messages, got "
            "none; set tokenizer.chat_template or give the prompt as text"
        )
    else:
        token_ids = tokenizer.apply_chat_template(
            [dict(message) for message in prompt.prompt],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"]
    if not token_ids:
        raise ValueError(f"prompt {prompt.id}: expected at least one token, got none from {prompt.prompt!r}")
    return list(token_ids)


def generate_responses(
    engine: SequenceGenerator,
    token_ids: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    parameters: SamplingParameters,
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> list[Completion]:
    """Sample one response to each prompt with any engine, and check what it gives back.

    Args:
        engine: samples.
        token_ids: the tokens of each prompt, without padding.
        prompt_ids: the id of each prompt, for messages.
        parameters: the distribution to sample from.
        seeds: a seed for each sequence.
        progress: called with sequences done and in all.

    Returns:
        One completion per prompt, in their order.

    Raises:
        ValueError: if a prompt and the longest response do not fit the engine's context, or the engine returns
            something other than a response to each prompt.
    """
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
    return completions


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
    return generate_responses(engine, token_ids, prompt_ids, parameters, seeds, progress)


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
