"""prime-rl's loss (0.2 to 0.8): the policy gradient by the ratio to the sampler, inside a trust region.

Sources: ``src/prime_rl/trainer/rl/loss.py`` and ``train.py``. Advantage estimators are in the advantages.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from entropy_probe.losses.base import GLOBAL_MEAN, Loss, require
from entropy_probe.losses.pieces import by_sequence, by_token, gap, microbatches, sequence_mean, sequence_sum
from entropy_probe.results.note import Note
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenCoefficients, TokenScores

FIRST = ("0.2", "0.3", "0.4")
"""Versions of the loss with bounds on ratios; since then they are on probabilities."""
PER_PROCESS = (*FIRST, "0.5")
OF_FIRST = (
    *("ratio_type", "token_mask_low", "token_mask_high", "geo_mask_low", "geo_mask_high"),
    *("sequence_mask_low", "sequence_mask_high", "sequence_clip_high"),
)
OF_SECOND = ("ipo_mask_low", "ipo_mask_high")
OF_PRESENT = ("type", "dppo_mask_low", "dppo_mask_high", "ipo_threshold")


class PrimeRLLoss(Loss):
    """prime-rl's loss, with the names and defaults of ``trainer.loss``.

    Ratios are taken to ``sampled_logprobs``, those of its inference servers.

    Attributes:
        trainer: ``prime_rl``.
        version: prime-rl's. Up to 0.4 tokens and sequences are left out by their ratios, in 0.5 tokens by how far their
            probability moved, since then also by the sign of the advantage.
        type: ``default``, or ``ipo`` (since 0.6), which leaves out as 0.5 did.
        dppo_mask_low: largest fall of probability, for advantages of at most 0.
        dppo_mask_high: largest rise of probability, for positive advantages.
        ipo_threshold: of ``ipo``: largest change of probability.
        ipo_mask_low: of 0.5: largest fall of probability.
        ipo_mask_high: of 0.5: largest rise.
        ratio_type: up to 0.4: of every token, or one for the sequence, whose tokens are then averaged.
        token_mask_low: up to 0.4: least ratio of a token.
        token_mask_high: largest.
        geo_mask_low: least geometric mean of a sequence's ratios.
        geo_mask_high: largest.
        sequence_mask_low: leave out sequences with a ratio below this.
        sequence_mask_high: or above this.
        sequence_clip_high: bound on the ratio of a sequence.
        adv_tau: multiplies the advantages.
        teacher_tau: up to 0.5: multiplies how far ``reference_logprobs``, a teacher's, are above the policy's, and adds
            to the advantages.
        kl_tau: coefficient of the squared logarithm of the ratio; up to 0.4 of the logarithm, taken off the advantages.
            ``None`` is the default of the version, 1e-3 or, up to 0.4, 0.
        num_processes: data-parallel ranks; up to 0.5 each divides by its own tokens.
    """

    trainer: Literal["prime_rl"] = "prime_rl"
    version: Literal["0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8"] = "0.8"
    type: Literal["default", "ipo"] = "default"
    dppo_mask_low: float = Field(default=0.2, ge=0)
    dppo_mask_high: float = Field(default=0.2, ge=0)
    ipo_threshold: float = Field(default=0.1, ge=0)
    ipo_mask_low: float = Field(default=0.2, ge=0)
    ipo_mask_high: float = Field(default=0.2, ge=0)
    ratio_type: Literal["token", "sequence"] = "token"
    token_mask_low: float = Field(default=0.125, ge=0)
    token_mask_high: float = Field(default=8.0, ge=0)
    geo_mask_low: float = Field(default=0.1, ge=0)
    geo_mask_high: float = Field(default=10.0, ge=0)
    sequence_mask_low: float = Field(default=0.0, ge=0)
    sequence_mask_high: float = Field(default=100.0, ge=0)
    sequence_clip_high: float = Field(default=10.0, ge=0)
    adv_tau: float = Field(default=1.0, ge=0)
    teacher_tau: float = Field(default=0.0, ge=0)
    kl_tau: float | None = Field(default=None, ge=0)
    num_processes: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check_version(self) -> PrimeRLLoss:
        others = [
            *(() if self.version in FIRST else OF_FIRST),
            *(() if self.version == "0.5" else OF_SECOND),
            *(("teacher_tau",) if self.version > "0.5" else OF_PRESENT),
            *(("adv_tau", "teacher_tau") if self.version == "0.2" else ()),
        ]
        strays = [name for name in others if getattr(self, name) != type(self).model_fields[name].default]
        if strays:
            raise ValueError(
                f"loss.{strays[0]}: not a setting of prime-rl {self.version}'s loss; set version to the trainer's, or "
                "leave it out"
            )
        return self

    @property
    def per_token(self) -> bool:
        """Whether the policy term divides by tokens."""
        return self.ratio_type == "token"

    @property
    def needs_reference(self) -> bool:
        """With a teacher."""
        return self.teacher_tau > 0

    @property
    def weighs_sampler(self) -> bool:
        """Always: ratios are to the sampler."""
        return True

    def needs_scores(self, rollouts: Rollouts) -> bool:
        """Always: ratios are to the sampler."""
        return True

    def check(self, rollouts: Rollouts) -> None:
        """Make sure that the batch has the sampler's log-probabilities."""
        where = "of prime-rl's loss, which takes ratios to the sampler"
        require(rollouts, "sampled_logprobs", where, "record prime-rl's inference_logprobs")

    def coefficients(self, rollouts: Rollouts, scores: TokenScores | None = None) -> TokenCoefficients:
        """Those of the policy gradient and the squared log ratio."""
        assert scores is not None
        self.check(rollouts)
        mask, log_ratio = rollouts.response_mask, self._log_ratio(rollouts, scores)
        advantages = self.adv_tau * rollouts.token_advantages.double()
        if self.needs_reference:
            require(rollouts, "reference_logprobs", "of a loss with a teacher (teacher_tau)", "record the teacher's")
            advantages = advantages + self.teacher_tau * gap(rollouts.reference_logprobs, scores.logprobs, mask)
        if self.version in FIRST:
            slopes = self._first(log_ratio, advantages, mask)
        else:
            kept = self._trusted(rollouts, scores)
            slopes = -log_ratio.exp() * advantages * kept + 2 * self._kl_tau * log_ratio
        return TokenCoefficients((slopes * self._mean(rollouts)).masked_fill(~mask, 0.0), None)

    def notes(self, rollouts: Rollouts, scores: TokenScores | None) -> list[Note]:
        """Means over microbatches or ranks that are not known."""
        if rollouts.microbatch_ids is not None:
            return []
        if self.ratio_type == "sequence":
            return [GLOBAL_MEAN(what="the loss", unit="microbatch")]
        by_process = self.version in PER_PROCESS and self.num_processes > 1
        return [GLOBAL_MEAN(what="the loss", unit="process")] if by_process else []

    @property
    def _kl_tau(self) -> float:
        if self.kl_tau is not None:
            return self.kl_tau
        return 0.0 if self.version in FIRST else 1e-3

    def _mean(self, rollouts: Rollouts) -> Float[Tensor, "N L"]:
        """Weights of tokens: over those of the step, of its process, or of its sequence and by microbatches."""
        mask, groups = rollouts.response_mask, microbatches(rollouts)
        if self.ratio_type == "sequence":
            return by_sequence(mask) * len(mask) / len(groups.unique())
        return by_token(mask, groups % self.num_processes if self.version in PER_PROCESS else None)

    def _log_ratio(self, rollouts: Rollouts, scores: TokenScores) -> Float[Tensor, "N L"]:
        return gap(scores.logprobs, rollouts.sampled_logprobs, rollouts.response_mask)

    def _trusted(self, rollouts: Rollouts, scores: TokenScores) -> Bool[Tensor, "N L"]:
        """Tokens whose probability has moved little since they were sampled."""
        new = scores.logprobs.double().exp()
        moved = new - (scores.logprobs.double() - self._log_ratio(rollouts, scores)).exp()
        if self.version == "0.5":
            return (moved <= self.ipo_mask_high) & (moved >= -self.ipo_mask_low)
        if self.type == "ipo":
            return moved.abs() <= self.ipo_threshold
        return torch.where(rollouts.token_advantages > 0, moved <= self.dppo_mask_high, moved >= -self.dppo_mask_low)

    def _first(
        self, log_ratio: Float[Tensor, "N L"], advantages: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"]
    ) -> Float[Tensor, "N L"]:
        """Slopes of the loss up to 0.4."""
        ratio, mean = log_ratio.exp(), sequence_mean(log_ratio, mask).exp()
        least = ratio.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
        most = ratio.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
        kept = (
            (ratio >= self.token_mask_low) & (ratio <= self.token_mask_high)
            & (mean >= self.geo_mask_low) & (mean <= self.geo_mask_high)
            & (least >= self.sequence_mask_low) & (most <= self.sequence_mask_high)
        )  # fmt: skip
        weight = ratio
        if self.ratio_type == "sequence":
            weight = sequence_sum(log_ratio, mask).clamp(max=10).exp().clamp(max=self.sequence_clip_high)
        return -weight * (advantages - self._kl_tau * log_ratio) * kept
