"""OpenRLHF's actor loss (0.9.0 to 0.11.0): policy loss, KL loss and entropy bonus.

Sources: ``openrlhf/models/loss.py``, ``openrlhf/trainer/ray/ppo_actor.py``, ``openrlhf/utils/loss_utils.py``. Advantage
estimators (``reinforce``, ``rloo``, ``group_norm``, ``dr_grpo`` ...) and a KL in the reward are in the advantages, not
in the loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from entropy_probe.losses.base import GLOBAL_MEAN, NOT_A_NUMBER, RATIO_ONE, Loss, inert_clip, require
from entropy_probe.losses.pieces import (
    KLKind,
    by_token_of_shares,
    clipped_slope,
    gap,
    group_sum,
    kl_slope,
    kl_value,
    microbatches,
    sequence_mean,
)
from entropy_probe.results.note import Note
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenCoefficients, TokenScores

FIRST, LAST = (0, 9, 0), (0, 11, 0)
BOUNDED_SINCE, WHOLE_STEP_SINCE = (0, 10, 3), (0, 10, 4)


class OpenRLHFLoss(Loss):
    """OpenRLHF's actor loss, with the names and defaults of its command line (before 0.10.2, and as in brackets since).

    Attributes:
        trainer: ``openrlhf``.
        version: OpenRLHF's. Up to 0.10.2 each microbatch is normalised by itself, in 0.10.3 those of all processes in
            one accumulation step together (the whole step with dynamic batches), since 0.10.4 the whole step.
        policy_loss_type: [``actor.policy_loss_type``] ``gspo`` takes the mean over sequences.
        eps_clip: [``actor.eps_clip``] clip range, either side.
        eps_clip_low_high: [``actor.eps_clip_low_high``] clip ranges of their own.
        dual_clip: [``actor.dual_clip``] of dual clip, off by default.
        token_level_loss: of ``PolicyLoss``: the mean over tokens, or over sequences of each one's mean.
        use_kl_loss: [``algo.kl.use_loss``] whether there is a KL loss to the reference.
        init_kl_coef: [``algo.kl.init_coef``] its coefficient; with a ``kl_target`` what it is at this step.
        kl_estimator: [``algo.kl.estimator``].
        entropy_loss_coef: [``actor.entropy_coef``] coefficient of the entropy bonus.
        enable_vllm_is_correction: [``algo.advantage.is_correction_enable``] multiply by ratios between old and sampled
            log-probabilities; ``gspo`` takes its ratio to the sampled ones instead.
        vllm_is_truncated_threshold: [``algo.advantage.is_correction_threshold``] their bounds; up to 0.9.0 one number,
            the upper one.
        vllm_is_correction_type: [``algo.advantage.is_correction_type``] bounded (``tis``), 0 outside (``icepop``), or 0
            for sequences whose geometric mean is outside (``seq-mask-tis``).
        max_epochs: [``train.max_epochs``] passes over the rollouts. With more than one, or several batches,
            ``old_logprobs`` are needed.
        rollout_batch_size: [``rollout.batch_size``] prompts.
        n_samples_per_prompt: [``rollout.n_samples_per_prompt``] responses to each.
        train_batch_size: [``train.batch_size``] responses of a step.
        use_dynamic_batch: [``train.dynamic_batch_enable``] microbatches of about equal numbers of tokens.
        num_processes: data-parallel processes.
    """

    trainer: Literal["openrlhf"] = "openrlhf"
    version: str = "0.11.0"
    policy_loss_type: Literal["ppo", "gspo"] = "ppo"
    eps_clip: float = Field(default=0.2, ge=0)
    eps_clip_low_high: tuple[float, float] | None = None
    dual_clip: float | None = Field(default=None, gt=1)
    token_level_loss: bool = True
    use_kl_loss: bool = False
    init_kl_coef: float = Field(default=0.01, ge=0)
    kl_estimator: KLKind = "k1"
    entropy_loss_coef: float | None = None
    enable_vllm_is_correction: bool = False
    vllm_is_truncated_threshold: float | tuple[float, float] = (0.5, 5.0)
    vllm_is_correction_type: Literal["tis", "icepop", "seq-mask-tis"] = "tis"
    max_epochs: int = Field(default=1, ge=1)
    rollout_batch_size: int | None = Field(default=None, ge=1)
    n_samples_per_prompt: int | None = Field(default=None, ge=1)
    train_batch_size: int | None = Field(default=None, ge=1)
    use_dynamic_batch: bool = False
    num_processes: int = Field(default=1, ge=1)

    @field_validator("version")
    @classmethod
    def _check_version(cls, version: str) -> str:
        parts = version.split(".")
        numbers = tuple(map(int, parts[:3])) if len(parts) >= 3 and all(part.isdigit() for part in parts[:3]) else ()
        if not FIRST <= numbers <= LAST:
            raise ValueError(f"expected one from 0.9.0 to 0.11.0, got {version!r}; its loss may be another one")
        return version

    @model_validator(mode="after")
    def _check_threshold(self) -> OpenRLHFLoss:
        bounds = self.vllm_is_truncated_threshold
        takes_one = self._version == FIRST
        if self.enable_vllm_is_correction and isinstance(bounds, tuple) == takes_one and self.policy_loss_type == "ppo":
            expected = f"{'one number' if takes_one else 'two numbers'} with version {self.version}"
            raise ValueError(f"loss.vllm_is_truncated_threshold: expected {expected}, got {bounds}")
        return self

    @property
    def per_token(self) -> bool:
        """Whether the policy term divides by tokens."""
        return self.token_level_loss and self.policy_loss_type == "ppo"

    @property
    def needs_reference(self) -> bool:
        """With a KL loss."""
        return self.use_kl_loss and self.init_kl_coef > 0

    @property
    def needs_old(self) -> bool:
        """Where a batch of rollouts is several steps."""
        return not self._ratio_to_sampler and (self.max_epochs > 1 or self._steps not in (None, 1))

    @property
    def weighs_sampler(self) -> bool:
        """With the correction for vLLM."""
        return self.enable_vllm_is_correction

    @property
    def models(self) -> tuple[str, ...]:
        """The KL term and the entropy bonus, where they have a coefficient."""
        return ("the KL term",) * self.needs_reference + ("the entropy bonus",) * bool(self.entropy_loss_coef)

    def needs_scores(self, rollouts: Rollouts) -> bool:
        """Where a term depends on the policy as it is."""
        return rollouts.old_logprobs is not None or self.needs_reference or self.enable_vllm_is_correction

    def check(self, rollouts: Rollouts) -> None:
        """Make sure that the batch has the log-probabilities that the loss takes, but for the reference's."""
        if self.needs_old:
            where = "of a trainer that uses rollouts for several steps (max_epochs, train_batch_size)"
            require(rollouts, "old_logprobs", where, "record OpenRLHF's action_log_probs")
        if self.weighs_sampler:
            where = "of a loss that corrects for the sampler (enable_vllm_is_correction)"
            require(rollouts, "sampled_logprobs", where, "record OpenRLHF's rollout_log_probs")

    def coefficients(self, rollouts: Rollouts, scores: TokenScores | None = None) -> TokenCoefficients:
        """Those of the policy loss, the KL loss and the entropy bonus."""
        self.check(rollouts)
        mask = rollouts.response_mask
        by_token = self._mean(rollouts, by_token=True)
        logprobs = self._policy(rollouts, scores)
        if self.needs_reference:
            require(rollouts, "reference_logprobs", "of a loss with a KL term", "record the reference's")
            above = gap(None if scores is None else scores.logprobs, rollouts.reference_logprobs, mask)
            inside = kl_value(self.kl_estimator, above).abs() <= 10
            logprobs = logprobs + self.init_kl_coef * by_token * kl_slope(self.kl_estimator, above) * inside
        entropies = -self.entropy_loss_coef * by_token if self.entropy_loss_coef else None
        return TokenCoefficients(logprobs.masked_fill(~mask, 0.0), entropies)

    def notes(self, rollouts: Rollouts, scores: TokenScores | None) -> list[Note]:
        """Settings without effect, and means over microbatches that are not known."""
        settings = ("eps_clip", "eps_clip_low_high", "dual_clip")
        notes = inert_clip(self, settings, self._log_ratio(rollouts, scores))
        if not self._whole_step and rollouts.microbatch_ids is None:
            notes.append(GLOBAL_MEAN(what="the loss", unit="microbatch"))
        if rollouts.old_logprobs is None and not self._ratio_to_sampler and self._steps is None:
            settings = "rollout_batch_size, n_samples_per_prompt and train_batch_size"
            notes.append(RATIO_ONE(settings=settings))
        if self._version < BOUNDED_SINCE and not self.per_token and not rollouts.response_mask.any(1).all():
            notes.append(NOT_A_NUMBER(why="a mean over sequences of which some have no response token"))
        return notes

    @property
    def _version(self) -> tuple[int, ...]:
        return tuple(map(int, self.version.split(".")[:3]))

    @property
    def _whole_step(self) -> bool:
        """Whether the step is normalised as a whole."""
        return self._version >= (BOUNDED_SINCE if self.use_dynamic_batch else WHOLE_STEP_SINCE)

    @property
    def _steps(self) -> float | None:
        """Steps on each batch of rollouts and epoch."""
        prompts, samples, of_step = self.rollout_batch_size, self.n_samples_per_prompt, self.train_batch_size
        if prompts is None or samples is None or of_step is None:
            return None
        return prompts * samples / of_step

    @property
    def _ratio_to_sampler(self) -> bool:
        return self.policy_loss_type == "gspo" and self.enable_vllm_is_correction

    def _log_ratio(self, rollouts: Rollouts, scores: TokenScores | None) -> Float[Tensor, "N L"]:
        old = rollouts.sampled_logprobs if self._ratio_to_sampler else rollouts.old_logprobs
        return gap(None if scores is None else scores.logprobs, old, rollouts.response_mask)

    def _policy(self, rollouts: Rollouts, scores: TokenScores | None) -> Float[Tensor, "N L"]:
        """Coefficients of the policy loss."""
        mask, log_ratio = rollouts.response_mask, self._log_ratio(rollouts, scores)
        low, high = self.eps_clip_low_high or (self.eps_clip, self.eps_clip)
        bound = 20.0 if self._version >= BOUNDED_SINCE else torch.inf
        ratio = log_ratio.clamp(-bound, bound).exp()
        if self.policy_loss_type == "gspo":
            ratio = sequence_mean(log_ratio, mask).exp()
        slopes = clipped_slope(ratio, rollouts.token_advantages.double(), 1 - low, 1 + high, dual=self.dual_clip)
        slopes = slopes * self._mean(rollouts, by_token=self.per_token)
        if self.policy_loss_type == "gspo":
            return sequence_mean(slopes, mask).expand_as(slopes)
        return slopes * (log_ratio.abs() <= bound) * self._sampler_ratio(rollouts, scores)

    def _sampler_ratio(self, rollouts: Rollouts, scores: TokenScores | None) -> Float[Tensor, "N L"] | float:
        """OpenRLHF's correction for vLLM: old over sampled probabilities, held within bounds."""
        if not self.enable_vllm_is_correction:
            return 1.0
        assert scores is not None
        old = scores.logprobs if rollouts.old_logprobs is None else rollouts.old_logprobs
        beyond = gap(old, rollouts.sampled_logprobs, rollouts.response_mask)
        bounds = self.vllm_is_truncated_threshold
        if not isinstance(bounds, tuple):
            return beyond.exp().clamp(max=bounds)
        if self.vllm_is_correction_type == "tis":
            return beyond.exp().clamp(*bounds)
        judged = sequence_mean(beyond, rollouts.response_mask) if self.vllm_is_correction_type != "icepop" else beyond
        return beyond.exp() * ((judged.exp() >= bounds[0]) & (judged.exp() <= bounds[1]))

    def _mean(self, rollouts: Rollouts, *, by_token: bool) -> Float[Tensor, "N L"]:
        """Weights of the mean over tokens, or over sequences; of the step, or of each microbatch."""
        mask: Bool[Tensor, "N L"] = rollouts.response_mask
        groups = torch.zeros(len(mask), dtype=torch.long) if self._whole_step else microbatches(rollouts)
        if self._version >= BOUNDED_SINCE:
            groups = groups // self.num_processes
        lengths = mask.sum(1).double()
        if by_token:
            return by_token_of_shares(mask, groups)
        share = group_sum(torch.ones_like(lengths), groups) / len(mask)
        answered = group_sum((lengths > 0).double(), groups)
        return mask * (share / (answered * lengths).clamp(min=1))[:, None]
