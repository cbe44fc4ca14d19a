"""SkyRL's policy losses: PPO's, GSPO, SAPO, CISPO, DPPO and importance sampling, with a KL loss and an entropy bonus.

Sources: ``skyrl/backends/skyrl_train/utils/ppo_utils.py`` and ``workers/worker.py``. Advantage estimators and a KL in
the reward are in the advantages, not in the loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from entropy_probe.losses.base import GLOBAL_MEAN, RATIO_ONE, Loss, inert_clip, require
from entropy_probe.losses.pieces import (
    KLKind,
    by_max_length,
    by_sequence,
    by_token,
    by_token_of_shares,
    clipped_slope,
    gap,
    kl_slope,
    kl_value,
    microbatches,
    sequence_mean,
    trust_region,
)
from entropy_probe.losses.trl_terms import soft_gate_slope
from entropy_probe.results.note import Note
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenCoefficients, TokenScores

__all__ = ["SkyRLLoss"]

BOUND, BOUND_OF_SEQUENCE, BOUND_OF_KL = 20.0, 10.0, 10.0
"""Log ratios of tokens, those of sequences and estimates of the KL divergence are held within these, in nats."""


class SkyRLLoss(Loss):
    """SkyRL's policy loss, with the names and defaults of ``trainer.algorithm``.

    Attributes:
        trainer: ``skyrl``.
        policy_loss_type: ``gspo`` takes a ratio for each sequence, ``sapo`` soft gates in place of clipping;
            ``rollout_is`` and ``dppo`` take ratios to the sampler (``sampled_logprobs``). ``clip_cov`` and ``kl_cov``
            are not modelled.
        loss_reduction: what the loss is a mean over; ``token_mean_legacy`` by each microbatch.
        max_seq_len: what ``seq_mean_token_sum_norm`` divides by.
        eps_clip_low: lower clip range.
        eps_clip_high: upper.
        clip_ratio_c: of ``dual_clip``.
        tau_pos: [``sapo.tau_pos``] for positive advantages.
        tau_neg: [``sapo.tau_neg``] for the others.
        cispo_anchor: [``cispo.cispo_anchor``] whether ratios are to the ``old`` policy or to the sampler (``rollout``).
        cispo_eps_clip_low: [``cispo.cispo_eps_clip_low``] how far below 1 a token's weight may be.
        cispo_eps_clip_high: [``cispo.cispo_eps_clip_high``] how far above.
        dppo_type: [``dppo.dppo_type``] by what ``dppo`` judges how far a token's probability moved.
        delta_low: [``dppo.delta_low``] how far it may fall.
        delta_high: [``dppo.delta_high``] how far it may rise.
        use_kl_loss: whether there is a KL loss to the reference, a mean over sequences.
        kl_loss_coef: its coefficient.
        kl_estimator_type: ``abs`` is not modelled.
        use_entropy_loss: whether there is an entropy bonus, a mean over each microbatch's tokens, by its sequences.
        entropy_loss_coef: its coefficient.
        off_policy_correction: must be off: weights and masks by the ratio to the sampler are not modelled.
        update_epochs_per_batch: passes over the rollouts.
        train_batch_size: prompts of a batch of rollouts.
        policy_mini_batch_size: prompts of a step; fewer than those of a batch need ``old_logprobs``.
    """

    trainer: Literal["skyrl"] = "skyrl"
    policy_loss_type: Literal[
        "regular", "dual_clip", "gspo", "sapo", "cispo", "rollout_is", "dppo", "importance_sampling"
    ] = "regular"
    loss_reduction: Literal[
        "token_mean", "token_mean_legacy", "sequence_mean", "seq_mean_token_sum_norm", "prompt_mean"
    ] = "token_mean"
    max_seq_len: int | None = Field(default=None, ge=1)
    eps_clip_low: float = Field(default=0.2, ge=0)
    eps_clip_high: float = Field(default=0.2, ge=0)
    clip_ratio_c: float = Field(default=3.0, gt=1)
    tau_pos: float = Field(default=1.0, gt=0)
    tau_neg: float = Field(default=1.05, gt=0)
    cispo_anchor: Literal["old", "rollout"] = "old"
    cispo_eps_clip_low: float = Field(default=1.0, ge=0)
    cispo_eps_clip_high: float = Field(default=4.0, ge=0)
    dppo_type: Literal["binary_tv", "binary_kl"] = "binary_tv"
    delta_low: float = Field(default=0.2, ge=0)
    delta_high: float = Field(default=0.2, ge=0)
    use_kl_loss: bool = True
    kl_loss_coef: float = Field(default=0.001, ge=0)
    kl_estimator_type: KLKind = "k3"
    use_entropy_loss: bool = False
    entropy_loss_coef: float = 0.01
    off_policy_correction: None = None
    update_epochs_per_batch: int = Field(default=1, ge=1)
    train_batch_size: int | None = Field(default=None, ge=1)
    policy_mini_batch_size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check_length(self) -> SkyRLLoss:
        if self.loss_reduction == "seq_mean_token_sum_norm" and self.max_seq_len is None:
            raise ValueError("loss.max_seq_len: expected it with seq_mean_token_sum_norm, got None; set the trainer's")
        return self

    @property
    def per_token(self) -> bool:
        """Whether the policy term divides by tokens of the step."""
        return self.loss_reduction in ("token_mean", "token_mean_legacy", "prompt_mean")

    @property
    def needs_reference(self) -> bool:
        """With a KL loss."""
        return self.use_kl_loss and self.kl_loss_coef > 0

    @property
    def needs_old(self) -> bool:
        """Where a batch of rollouts is several steps, and ratios are to the policy before them."""
        return not self.weighs_sampler and (self.update_epochs_per_batch > 1 or self._steps not in (None, 1))

    @property
    def weighs_sampler(self) -> bool:
        """Where ratios are to the sampler."""
        of_cispo = self.policy_loss_type == "cispo" and self.cispo_anchor == "rollout"
        return of_cispo or self.policy_loss_type in ("rollout_is", "dppo")

    @property
    def models(self) -> tuple[str, ...]:
        """The KL term and the entropy bonus, where there are any."""
        return ("the KL term",) * self.needs_reference + ("the entropy bonus",) * self.use_entropy_loss

    def needs_scores(self, rollouts: Rollouts) -> bool:
        """Where a term depends on the policy as it is."""
        return rollouts.old_logprobs is not None or self.needs_reference or self.weighs_sampler

    def check(self, rollouts: Rollouts) -> None:
        """Make sure that the batch has the log-probabilities that ratios are of."""
        if self.weighs_sampler:
            where = "of a loss that takes ratios to the sampler"
            require(rollouts, "sampled_logprobs", where, "record SkyRL's rollout_logprobs")
        if self.needs_old:
            require(rollouts, "old_logprobs", "of a loss of several steps on it", "record SkyRL's action_log_probs")

    def coefficients(self, rollouts: Rollouts, scores: TokenScores | None) -> TokenCoefficients:
        """Those of the policy loss, the KL loss and the entropy bonus.

        Raises:
            ValueError: if the batch lacks what the loss takes.
        """
        self.check(rollouts)
        mask = rollouts.response_mask
        logprobs = self._slopes(rollouts, scores) * self._mean(rollouts)
        if self.needs_reference:
            require(rollouts, "reference_logprobs", "of a loss with a KL term", "record the reference's")
            above = gap(None if scores is None else scores.logprobs, rollouts.reference_logprobs, mask)
            inside = (kl_value("k3", above).abs() <= BOUND_OF_KL) | (self.kl_estimator_type != "k3")
            slope = kl_slope(self.kl_estimator_type, above) * inside
            logprobs = logprobs + self.kl_loss_coef * by_sequence(mask) * slope
        bonus = by_token_of_shares(mask, microbatches(rollouts)) if self.use_entropy_loss else None
        entropies = None if bonus is None else -self.entropy_loss_coef * bonus
        return TokenCoefficients(logprobs.masked_fill(~mask, 0.0), entropies)

    def notes(self, rollouts: Rollouts, scores: TokenScores | None) -> list[Note]:
        """Settings without effect, ratios and microbatches that are not known."""
        settings = ("eps_clip_low", "eps_clip_high", "clip_ratio_c", "cispo_eps_clip_low", "cispo_eps_clip_high")
        notes = inert_clip(self, settings, self._log_ratio(rollouts, scores))
        if rollouts.microbatch_ids is None and (self.use_entropy_loss or self.loss_reduction == "token_mean_legacy"):
            what = "the loss" if self.loss_reduction == "token_mean_legacy" else "the entropy bonus"
            notes.append(GLOBAL_MEAN(what=what, unit="microbatch"))
        if rollouts.old_logprobs is None and self._steps is None and not self.weighs_sampler:
            notes.append(RATIO_ONE(settings="train_batch_size and policy_mini_batch_size"))
        return notes

    @property
    def _steps(self) -> float | None:
        """Steps on each batch of rollouts and epoch."""
        if self.train_batch_size is None or self.policy_mini_batch_size is None:
            return None
        return self.train_batch_size / self.policy_mini_batch_size

    def _log_ratio(self, rollouts: Rollouts, scores: TokenScores | None) -> Float[Tensor, "N L"]:
        old = rollouts.sampled_logprobs if self.weighs_sampler else rollouts.old_logprobs
        return gap(None if scores is None else scores.logprobs, old, rollouts.response_mask)

    def _slopes(self, rollouts: Rollouts, scores: TokenScores | None) -> Float[Tensor, "N L"]:
        """Of each token's loss, in its log-probability."""
        log_ratio, advantages = self._log_ratio(rollouts, scores), rollouts.token_advantages.double()
        if self.policy_loss_type == "gspo":
            log_ratio = sequence_mean(log_ratio, rollouts.response_mask).expand_as(log_ratio)
            low, high = -torch.inf, BOUND_OF_SEQUENCE
        else:
            low, high = -BOUND, BOUND
        ratio, free = log_ratio.clamp(low, high).exp(), (log_ratio >= low) & (log_ratio <= high)
        smallest, largest = 1 - self.eps_clip_low, 1 + self.eps_clip_high
        match self.policy_loss_type:
            case "sapo":
                return soft_gate_slope(ratio, advantages, self.tau_pos, self.tau_neg) * free
            case "cispo":
                return -ratio.clamp(1 - self.cispo_eps_clip_low, 1 + self.cispo_eps_clip_high) * advantages
            case "rollout_is":
                return -ratio * advantages * ((ratio > smallest) & (ratio < largest))
            case "importance_sampling":
                return -log_ratio.exp() * advantages
            case "dppo":
                assert scores is not None
                kind, bounds = self.dppo_type.removeprefix("binary_"), (self.delta_low, self.delta_high)
                kept = trust_region(kind, scores.logprobs, log_ratio, advantages, *bounds)
                return -ratio * advantages * kept * free
        dual = self.clip_ratio_c if self.policy_loss_type == "dual_clip" else None
        return clipped_slope(ratio, advantages, smallest, largest, dual=dual) * free

    def _mean(self, rollouts: Rollouts) -> Float[Tensor, "N L"]:
        mask = rollouts.response_mask
        match self.loss_reduction:
            case "token_mean":
                return by_token(mask)
            case "token_mean_legacy":
                return by_token(mask, microbatches(rollouts))
            case "sequence_mean":
                return by_sequence(mask)
            case "prompt_mean":
                return by_token(mask, rollouts.prompt_ids)
            case _:
                assert self.max_seq_len is not None
                return by_max_length(mask, self.max_seq_len)
