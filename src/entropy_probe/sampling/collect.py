"""The two batches of a probe: update rollouts in groups, evaluation rollouts one response per draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from entropy_probe.sampling.advantages import ScaleRewards, group_advantages
from entropy_probe.sampling.hf import Completion, Progress, generate_completions, generate_from_tokens
from entropy_probe.sampling.prompts import Prompt
from entropy_probe.sampling.rewards import Reward, score_responses
from entropy_probe.types import Rollouts

__all__ = [
    "EvaluationSettings",
    "GenerationSettings",
    "SamplingReport",
    "UpdateSettings",
    "resample_responses",
    "sample_evaluation",
    "sample_update",
]

_UPDATE_STREAM, _EVALUATION_STREAM = 0, 1


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GenerationSettings(_Settings):
    """How responses are generated.

    Attributes:
        top_p: must be 1: the full softmax is the policy.
        top_k: must be 0 (off), for the same reason.
        batch_size: sequences generated at a time. Changing it changes which responses a seed gives.
    """

    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = Field(default=64, gt=0)

    @field_validator("top_p", "top_k")
    @classmethod
    def _full_softmax(cls, value: float | int, info: Any) -> float | int:
        off = cls.model_fields[info.field_name].default
        if value != off:
            raise ValueError(
                f"expected {off}, got {value}; the full softmax is the policy, leave {info.field_name} out"
            )
        return value


class UpdateSettings(_Settings):
    """The update batch: ``num_prompts`` distinct prompts with ``group_size`` responses each.

    Attributes:
        num_prompts: prompts of the batch (B), drawn without replacement.
        group_size: responses per prompt (G). A single one has no group to be compared with.
        seed: of the draw and of the responses.
        scale_rewards: what the centred rewards are divided by; see :func:`group_advantages`.
        filter_zero_advantage: drop prompts whose rewards are all equal and try other prompts instead.
        max_resampling_rounds: how many times to try other prompts at most.
    """

    num_prompts: int = Field(gt=0)
    group_size: int = Field(ge=2)
    seed: int = Field(default=0, ge=0)
    scale_rewards: ScaleRewards = "group"
    filter_zero_advantage: bool = False
    max_resampling_rounds: int = Field(default=4, ge=0)


class EvaluationSettings(_Settings):
    """The evaluation batch: prompts drawn with replacement, one response per draw.

    Attributes:
        total_sequences: draws.
        seed: of the draws and of the responses. An update batch with the same seed is independent all the
            same.
    """

    total_sequences: int = Field(ge=2)
    seed: int = Field(default=1, ge=0)


@dataclass(frozen=True)
class SamplingReport:
    """How a batch came about.

    Attributes:
        num_sequences: sequences in the batch.
        num_prompts: distinct prompts in the batch.
        prompts_tried: distinct prompts that responses were sampled for.
        prompts_dropped: of those, the ones dropped because their rewards were all equal.
        rounds: rounds of sampling, 1 without resampling.
        reward_mean: over all responses sampled, dropped ones included; None without rewards.
        truncated_fraction: share of all responses sampled that hit the maximum length, dropped ones included.
        mean_response_length: tokens per response of the batch.
        messages: one line for each thing that is not as asked for.
    """

    num_sequences: int
    num_prompts: int
    prompts_tried: int
    prompts_dropped: int
    rounds: int
    reward_mean: float | None
    truncated_fraction: float
    mean_response_length: float
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Group:
    """A prompt, its ``G`` responses and their rewards."""

    prompt: Prompt
    completions: Sequence[Completion]
    rewards: Float[Tensor, " G"]

    @property
    def has_equal_rewards(self) -> bool:
        return bool(self.rewards.min() == self.rewards.max())


def sample_update(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    settings: UpdateSettings,
    generation: GenerationSettings,
    *,
    temperature: float,
    max_completion_length: int,
    progress: Progress | None = None,
) -> tuple[Rollouts, SamplingReport]:
    """Sample an update batch: distinct prompts, a group of responses each, with rewards and advantages.

    Args:
        model: a Hugging Face causal language model; left as found.
        tokenizer: its tokenizer.
        prompts: to draw from, with distinct ids.
        reward: scores the responses' texts (special tokens left out).
        settings: size, seed and advantages.
        generation: how to generate.
        temperature: of the policy.
        max_completion_length: the longest response, in tokens.
        progress: called with sequences done and in all, anew in each round.

    Returns:
        The batch on the CPU, right-padded, the responses of a prompt contiguous and prompts in draw order;
        and how it came about. With ``filter_zero_advantage`` it may hold fewer prompts than asked, which the
        report says.

    Raises:
        ValueError: if there are too few prompts, a reward is not finite, every prompt was dropped, or
            generation is not possible; see :func:`generate_completions`.
    """
    _check_prompts(prompts)
    wanted, size = settings.num_prompts, settings.group_size
    if wanted > len(prompts):
        raise ValueError(f"num_prompts: expected at most the {len(prompts)} prompts of the source, got {wanted}")
    order = _numpy_generator(settings.seed, _UPDATE_STREAM).permutation(len(prompts))
    generate = _generator(model, tokenizer, generation, temperature, max_completion_length, progress)
    tried: list[_Group] = []
    kept: list[_Group] = []
    rounds = 0
    while len(kept) < wanted and len(tried) < len(order) and rounds <= settings.max_resampling_rounds:
        drawn = [prompts[i] for i in order[len(tried) : len(tried) + wanted - len(kept)]]
        repeated = [prompt for prompt in drawn for _ in range(size)]
        completions = generate(repeated, seed=_torch_seed(settings.seed, _UPDATE_STREAM, rounds))
        groups = _score(tokenizer, reward, drawn, completions)
        tried += groups
        kept += [g for g in groups if not (settings.filter_zero_advantage and g.has_equal_rewards)]
        rounds += 1
    if not kept:
        raise ValueError(
            f"filter_zero_advantage: all {len(tried)} prompts tried in {rounds} rounds have equal rewards "
            f"over their {size} responses; use other prompts, more rounds or a larger group_size"
        )
    return _update_rollouts(tokenizer.pad_token_id, kept, settings), _update_report(kept, tried, rounds, settings)


def sample_evaluation(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: EvaluationSettings,
    generation: GenerationSettings,
    *,
    temperature: float,
    max_completion_length: int,
    progress: Progress | None = None,
) -> tuple[Rollouts, SamplingReport]:
    """Sample an evaluation batch: prompts drawn uniformly with replacement, one response per draw.

    Every sequence is then an independent sampling unit. A prompt drawn again keeps its id in ``prompt_ids``.

    Args:
        model: a Hugging Face causal language model; left as found.
        tokenizer: its tokenizer.
        prompts: to draw from, with distinct ids.
        settings: size and seed.
        generation: how to generate.
        temperature: of the policy.
        max_completion_length: the longest response, in tokens.
        progress: called with sequences done and in all.

    Returns:
        The batch on the CPU, right-padded, in draw order; and how it came about.

    Raises:
        ValueError: if there is no prompt or generation is not possible; see :func:`generate_completions`.
    """
    _check_prompts(prompts)
    generator = _numpy_generator(settings.seed, _EVALUATION_STREAM)
    drawn = [prompts[i] for i in generator.integers(len(prompts), size=settings.total_sequences)]
    generate = _generator(model, tokenizer, generation, temperature, max_completion_length, progress)
    completions = generate(drawn, seed=_torch_seed(settings.seed, _EVALUATION_STREAM, 0))
    distinct = len({prompt.id for prompt in drawn})
    report = SamplingReport(
        num_sequences=len(drawn),
        num_prompts=distinct,
        prompts_tried=distinct,
        prompts_dropped=0,
        rounds=1,
        reward_mean=None,
        truncated_fraction=fmean(c.truncated for c in completions),
        mean_response_length=fmean(len(c.token_ids) for c in completions),
    )
    return _rollouts(tokenizer.pad_token_id, [prompt.id for prompt in drawn], completions), report


def resample_responses(
    model: Any,
    tokenizer: Any,
    rollouts: Rollouts,
    generation: GenerationSettings,
    *,
    temperature: float,
    max_completion_length: int,
    seed: int,
) -> Rollouts:
    """Fresh responses of the model as it is now, to the prompts of an evaluation batch.

    With the settings and the seed of :func:`sample_evaluation` an unchanged model gives the same batch again.

    Args:
        model: a Hugging Face causal language model; left as found.
        tokenizer: its tokenizer.
        rollouts: the batch; the prompt of a sequence is everything before its first response token.
        generation: how to generate.
        temperature: of the policy.
        max_completion_length: the longest response, in tokens.
        seed: of the responses.

    Returns:
        One sequence per prompt, in the same order.

    Raises:
        ValueError: if generation is not possible; see :func:`generate_from_tokens`.
    """
    before_response = rollouts.attention_mask & (rollouts.response_mask.cumsum(1) == 0)
    prompts = [ids[real].tolist() for ids, real in zip(rollouts.input_ids, before_response, strict=True)]
    completions = generate_from_tokens(
        model,
        tokenizer,
        prompts,
        rollouts.prompt_ids.tolist(),
        temperature=temperature,
        max_completion_length=max_completion_length,
        batch_size=generation.batch_size,
        seed=_torch_seed(seed, _EVALUATION_STREAM, 0),
    )
    return _rollouts(tokenizer.pad_token_id, rollouts.prompt_ids.tolist(), completions)


def _generator(
    model: Any,
    tokenizer: Any,
    generation: GenerationSettings,
    temperature: float,
    max_completion_length: int,
    progress: Progress | None,
) -> Callable[..., list[Completion]]:
    """:func:`generate_completions` with everything given but the prompts and the seed."""
    return partial(
        generate_completions,
        model,
        tokenizer,
        temperature=temperature,
        max_completion_length=max_completion_length,
        batch_size=generation.batch_size,
        progress=progress,
    )


def _score(tokenizer: Any, reward: Reward, drawn: Sequence[Prompt], completions: Sequence[Completion]) -> list[_Group]:
    """Groups of consecutive completions, one group per drawn prompt, with their rewards."""
    size = len(completions) // len(drawn)
    repeated = [prompt for prompt in drawn for _ in range(size)]
    texts = tokenizer.batch_decode([list(c.token_ids) for c in completions], skip_special_tokens=True)
    rewards = score_responses(reward, repeated, texts).split(size)
    return [_Group(p, completions[k * size : (k + 1) * size], rewards[k]) for k, p in enumerate(drawn)]


def _update_rollouts(pad_token_id: int, groups: list[_Group], settings: UpdateSettings) -> Rollouts:
    prompt_ids = [group.prompt.id for group in groups for _ in group.completions]
    rewards = torch.cat([group.rewards for group in groups])
    return _rollouts(
        pad_token_id,
        prompt_ids,
        [completion for group in groups for completion in group.completions],
        rewards=rewards,
        advantages=group_advantages(rewards, torch.tensor(prompt_ids), settings.scale_rewards),
    )


def _update_report(kept: list[_Group], tried: list[_Group], rounds: int, settings: UpdateSettings) -> SamplingReport:
    messages = []
    if len(kept) < settings.num_prompts:
        messages.append(
            f"filter_zero_advantage: asked for {settings.num_prompts} prompts, got {len(kept)} after trying "
            f"{len(tried)} in {rounds} rounds"
        )
    flat = sum(group.has_equal_rewards for group in kept)
    if flat:
        messages.append(f"{flat} of {len(kept)} prompts have equal rewards, so their advantages are 0")
    return SamplingReport(
        num_sequences=len(kept) * settings.group_size,
        num_prompts=len(kept),
        prompts_tried=len(tried),
        prompts_dropped=len(tried) - len(kept),
        rounds=rounds,
        reward_mean=float(torch.cat([group.rewards for group in tried]).double().mean()),
        truncated_fraction=fmean(c.truncated for group in tried for c in group.completions),
        mean_response_length=fmean(len(c.token_ids) for group in kept for c in group.completions),
        messages=tuple(messages),
    )


def _rollouts(
    pad_token_id: int,
    prompt_ids: list[int],
    completions: Sequence[Completion],
    *,
    rewards: Float[Tensor, " N"] | None = None,
    advantages: Float[Tensor, " N"] | None = None,
) -> Rollouts:
    """Prompts and responses side by side, right-padded."""
    starts = torch.tensor([len(c.prompt_token_ids) for c in completions])
    ends = starts + torch.tensor([len(c.token_ids) for c in completions])
    position = torch.arange(int(ends.max()))
    attention_mask = position < ends[:, None]
    tokens = torch.tensor([token for c in completions for token in (*c.prompt_token_ids, *c.token_ids)])
    return Rollouts(
        input_ids=torch.full(attention_mask.shape, pad_token_id).masked_scatter_(attention_mask, tokens),
        attention_mask=attention_mask,
        response_mask=attention_mask & (position >= starts[:, None]),
        prompt_ids=torch.tensor(prompt_ids),
        advantages=advantages,
        rewards=rewards,
    )


def _check_prompts(prompts: Sequence[Prompt]) -> None:
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        raise ValueError(f"prompts: expected distinct ids, got {len(set(ids))} for {len(ids)} prompts")


def _numpy_generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, stream]))


def _torch_seed(seed: int, stream: int, number: int) -> int:
    """A seed of its own for each batch and round, so that no two share random numbers."""
    return int(np.random.SeedSequence([seed, stream, 1 + number]).generate_state(1, np.uint64)[0])
