"""The update batch: prompts with a group of responses each, rewards and advantages. And how a batch came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from entropy_probe.results.note import Note, NoteKind
from entropy_probe.results.record import Settings
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.sampling.advantages import ScaleRewards, group_advantages
from entropy_probe.sampling.engine import MOST_SEQUENCES, Completion, Engine, Progress, SamplingParameters
from entropy_probe.sampling.prompts import Prompt
from entropy_probe.sampling.responses import completed_rollouts, respond, sequence_seeds
from entropy_probe.sampling.reward_calls import Sample
from entropy_probe.sampling.rewards import Reward, Rewards

UPDATE_STREAM, EVALUATION_STREAM, PILOT_STREAM = 0, 1, 2

_NOTHING_TO_LEARN = "Compare the rewards with the responses: a reward that finds nothing to tell apart teaches nothing."
TOO_FEW_PROMPTS = NoteKind(
    "too_few_prompts",
    "filter_zero_advantage: asked for {asked} prompts, got {prompts} after trying {tried} in {rounds} rounds",
    "Raise update.max_resampling_rounds, or give more prompts.",
)
ALL_EQUAL_REWARDS = NoteKind(
    "all_equal_rewards", "every prompt has equal rewards, so every advantage is 0", _NOTHING_TO_LEARN
)
EQUAL_REWARDS = NoteKind(
    "equal_rewards",
    "{flat} of {prompts} prompts have equal rewards, so their advantages are 0",
    "They cost memory and add nothing; set update.filter_zero_advantage to draw others in their place.",
)
COPIES = NoteKind(
    "copies_in_source",
    "the source holds {prompts} prompts, {distinct} of them distinct: copies are drawn as they are there",
    "Leave copies out of the source, unless training draws from it as it is.",
)


class UpdateSettings(Settings):
    """The update batch: ``num_prompts`` distinct prompts with ``group_size`` responses each.

    Attributes:
        num_prompts: prompts of the batch (B), drawn without replacement.
        group_size: responses per prompt (G). A single one has no group to be compared with.
        seed: of the draw and of the responses.
        scale_rewards: what the centred rewards are divided by; see :func:`group_advantages`.
        filter_zero_advantage: drop prompts whose rewards are all equal and try other prompts instead.
        max_resampling_rounds: how many times to try other prompts at most.
        mask_truncated_completions: leave responses that were cut off at the largest length out of the loss, where they
            still count in what it divides by, as TRL does when asked to.
        allow_zero_advantages: go on with a batch in which every prompt has equal rewards. Its gradient is exactly 0,
            and far more often a reward that fails than a policy that does, so it is an error by default.
    """

    num_prompts: int = Field(gt=0)
    group_size: int = Field(ge=2)
    seed: int = Field(default=0, ge=0)
    scale_rewards: ScaleRewards = "group"
    filter_zero_advantage: bool = False
    max_resampling_rounds: int = Field(default=4, ge=0)
    mask_truncated_completions: bool = False
    allow_zero_advantages: bool = False

    @model_validator(mode="after")
    def _check_size(self) -> UpdateSettings:
        if self.num_prompts * self.group_size > MOST_SEQUENCES:
            raise ValueError(
                f"update: expected at most {MOST_SEQUENCES} sequences, got {self.num_prompts} prompts with "
                f"{self.group_size} responses each; lower group_size or num_prompts"
            )
        return self

    @property
    def selects(self) -> bool:
        """Whether responses are kept or dropped by what they are."""
        return self.filter_zero_advantage or self.mask_truncated_completions


@dataclass(frozen=True)
class SamplingReport:
    """How a batch came about.

    Attributes:
        num_sequences: sequences in the batch.
        num_prompts: prompts in the batch, by their ids.
        prompts_tried: distinct prompts that responses were sampled for.
        prompts_dropped: of those, the ones dropped because their rewards were all equal.
        rounds: rounds of sampling, 1 without resampling.
        reward_mean: over all responses sampled, dropped ones included; None without rewards.
        truncated_fraction: share of all responses sampled that hit the maximum length, dropped ones included.
        mean_response_length: tokens per response of the batch.
        stopped_fraction: share of all responses sampled that end with a stop text, dropped ones included.
        seconds: that the responses took; 0 where that is of no use.
        notes: on what is not as asked for.
    """

    num_sequences: int
    num_prompts: int
    prompts_tried: int
    prompts_dropped: int
    rounds: int
    reward_mean: float | None
    truncated_fraction: float
    mean_response_length: float
    stopped_fraction: float = 0.0
    seconds: float = field(default=0.0, compare=False)
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class _Group:
    """A prompt, its ``G`` responses, their texts and their rewards."""

    prompt: Prompt
    completions: Sequence[Completion]
    texts: Sequence[str]
    rewards: Float[Tensor, " G"]

    @property
    def has_equal_rewards(self) -> bool:
        return bool(self.rewards.min() == self.rewards.max())


def sample_update(
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward | Rewards,
    settings: UpdateSettings,
    parameters: SamplingParameters,
    progress: Progress | None = None,
) -> tuple[Rollouts, SamplingReport]:
    """Sample an update batch: prompts with distinct ids, a group of responses each, with rewards and advantages.

    ``progress`` is called with sequences done and in all, anew in each round.

    Returns:
        The batch on the CPU, right-padded, the responses of a prompt contiguous and prompts in draw order;
        and how it came about. With ``filter_zero_advantage`` it may hold fewer prompts than asked, which the
        report says.

    Raises:
        ValueError: if there are too few prompts, a reward cannot be called or is not finite, every prompt was dropped
            or has equal rewards, or generation is not possible; see :func:`generate_responses`.
    """
    check_prompts(prompts)
    wanted, size = settings.num_prompts, settings.group_size
    if wanted > len(prompts):
        raise ValueError(f"num_prompts: expected at most the {len(prompts)} prompts of the source, got {wanted}")
    rewards = Rewards.of(reward)
    rewards.check(prompts)
    order = numpy_generator(settings.seed, UPDATE_STREAM).permutation(len(prompts))
    tried: list[_Group] = []
    kept: list[_Group] = []
    rounds = 0
    while len(kept) < wanted and len(tried) < len(order) and rounds <= settings.max_resampling_rounds:
        drawn = [prompts[i] for i in order[len(tried) : len(tried) + wanted - len(kept)]]
        repeated = [prompt for prompt in drawn for _ in range(size)]
        seeds = sequence_seeds(settings.seed, UPDATE_STREAM, rounds, range(len(repeated)))
        completions = respond(engine, tokenizer, repeated, parameters, seeds, progress)
        groups = _score(tokenizer, rewards, prompts, drawn, completions)
        tried += groups
        kept += [g for g in groups if not (settings.filter_zero_advantage and g.has_equal_rewards)]
        rounds += 1
    _check_differences(kept, tried, rounds, settings)
    notes = (*engine.notes, *repeated_prompts(prompts))
    return _update_rollouts(kept, settings), _update_report(kept, tried, rounds, settings, notes)


def _score(
    tokenizer: Any,
    reward: Rewards,
    prompts: Sequence[Prompt],
    drawn: Sequence[Prompt],
    completions: Sequence[Completion],
) -> list[_Group]:
    """Groups of consecutive completions, one group per drawn prompt, with their rewards."""
    size = len(completions) // len(drawn)
    repeated = [prompt for prompt in drawn for _ in range(size)]
    texts = tokenizer.batch_decode([list(c.token_ids) for c in completions], skip_special_tokens=True)
    samples = [Sample(p, text, c.token_ids) for p, text, c in zip(repeated, texts, completions, strict=True)]
    rewards = reward.score(samples, prompts).split(size)
    groups = [slice(k * size, (k + 1) * size) for k in range(len(drawn))]
    return [_Group(p, completions[g], texts[g], rewards[k]) for k, (p, g) in enumerate(zip(drawn, groups, strict=True))]


def _check_differences(kept: list[_Group], tried: list[_Group], rounds: int, settings: UpdateSettings) -> None:
    """Refuse a batch without a prompt that its rewards tell something about, unless it is asked for."""
    if not kept:
        raise ValueError(
            f"filter_zero_advantage: all {len(tried)} prompts tried in {rounds} rounds have equal rewards over their "
            f"{settings.group_size} responses, such as {_examples(tried)}; use other prompts, more rounds or a larger "
            "group_size"
        )
    if all(group.has_equal_rewards for group in kept) and not settings.allow_zero_advantages:
        raise ValueError(
            f"reward: expected different rewards within a prompt, got equal ones for each of {len(kept)} prompts, such "
            f"as {_examples(kept)}, so every advantage and the update gradient are 0; compare what the reward looks "
            "for with the responses and the answers, raise num_prompts or group_size, or set "
            "update.allow_zero_advantages"
        )


def _examples(groups: Sequence[_Group]) -> str:
    """Two responses with their answers and rewards."""
    return " and ".join(
        f"{group.texts[0]!r:.60} to prompt {group.prompt.id} (answer {group.prompt.answer!r:.60}) with reward "
        f"{float(group.rewards[0]):g}"
        for group in (groups[k] for k in dict.fromkeys((0, len(groups) - 1)))
    )


def _update_rollouts(groups: list[_Group], settings: UpdateSettings) -> Rollouts:
    prompt_ids = [group.prompt.id for group in groups for _ in group.completions]
    completions = [completion for group in groups for completion in group.completions]
    rewards = torch.cat([group.rewards for group in groups])
    advantages = group_advantages(rewards, torch.tensor(prompt_ids), settings.scale_rewards)
    rollouts = completed_rollouts(prompt_ids, completions, rewards=rewards, advantages=advantages)
    if not settings.mask_truncated_completions:
        return rollouts
    whole = torch.tensor([not completion.truncated for completion in completions])
    if not bool(whole.any()):
        raise ValueError(
            "update.mask_truncated_completions: expected a response that ends before the largest length, got none of "
            f"{len(completions)}; raise probe.max_completion_length, or leave it out"
        )
    return replace(rollouts, response_mask=rollouts.response_mask & whole[:, None])


def _update_report(
    kept: list[_Group], tried: list[_Group], rounds: int, settings: UpdateSettings, notes: Sequence[Note]
) -> SamplingReport:
    notes = list(notes)
    if len(kept) < settings.num_prompts:
        notes.append(TOO_FEW_PROMPTS(asked=settings.num_prompts, prompts=len(kept), tried=len(tried), rounds=rounds))
    flat = sum(group.has_equal_rewards for group in kept)
    if flat == len(kept):
        notes.insert(0, ALL_EQUAL_REWARDS())
    elif flat:
        notes.append(EQUAL_REWARDS(flat=flat, prompts=len(kept)))
    return SamplingReport(
        num_sequences=len(kept) * settings.group_size,
        num_prompts=len(kept),
        prompts_tried=len(tried),
        prompts_dropped=len(tried) - len(kept),
        rounds=rounds,
        reward_mean=float(torch.cat([group.rewards for group in tried]).double().mean()),
        truncated_fraction=fmean(c.truncated for group in tried for c in group.completions),
        mean_response_length=fmean(len(c.token_ids) for group in kept for c in group.completions),
        stopped_fraction=fmean(c.stopped for group in tried for c in group.completions),
        notes=tuple(notes),
    )


def repeated_prompts(prompts: Sequence[Prompt]) -> tuple[Note, ...]:
    """A note where a source holds a prompt several times; each copy can be drawn, as in training on that source."""
    distinct = len({repr(prompt.prompt) for prompt in prompts})
    return () if distinct == len(prompts) else (COPIES(prompts=len(prompts), distinct=distinct),)


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Make sure that there are prompts, with distinct ids."""
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        raise ValueError(f"prompts: expected distinct ids, got {len(set(ids))} for {len(ids)} prompts")


def numpy_generator(seed: int, stream: int) -> np.random.Generator:
    """The random numbers of draws; streams of one seed are independent."""
    return np.random.default_rng(np.random.SeedSequence([seed, stream]))
