"""AReaL's actor loss (1.0): PPO's, decoupled from the policy that sampled, with rejection by the ratio between the two.

Sources: ``areal/utils/functional/functional.py``, ``areal/trainer/ppo/actor.py``. Norms of rewards and advantages and a
KL in the reward (``kl_ctl``) are in the advantages, not in the loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from entropy_probe.losses.base import RATIO_ONE, Loss, inert_clip, require
from entropy_probe.losses.pieces import by_token, clipped_slope, gap, kl_value, sequence_mean, sequence_sum
from entropy_probe.losses.trl_terms import soft_gate_slope
from entropy_probe.results.note import Note
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenCoefficients, TokenScores

__all__ = ["AReaLLoss", "RejectionSampling"]


class RejectionSampling(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """What is done about tokens whose probability moved since they were sampled, before the step.

    Attributes:
        level: each token is judged, or each sequence.
        action: leave it out, or hold its weight, the ratio, within the bounds.
        metric: the ratio of old to sampled probabilities, or an estimate of the KL divergence.
        agg: of a sequence's tokens; of ratios that of their logarithms.
        upper: upper bound.
        lower: lower bound.
    """

    level: Literal["token", "sequence"] = "token"
    action: Literal["mask", "clamp"] = "mask"
    metric: Literal["ratio", "kl_k1", "kl_k2", "kl_k3"] = "ratio"
    agg: Literal["sum", "mean", "max"] = "mean"
    upper: float = 5.0
    lower: float | None = None

    def weights(
        self, beyond: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"]
    ) -> tuple[Float[Tensor, "N L"], Bool[Tensor, "N L"]]:
        """What each token's loss is multiplied by, and the tokens that are kept.

        Args:
            beyond: how far old log-probabilities are above sampled ones, nats.
            mask: the response tokens.
        """
        ratios = self.metric == "ratio"
        judged = beyond if ratios else kl_value(self.metric.removeprefix("kl_"), beyond)  # type: ignore[arg-type]
        weights = beyond
        if self.level == "sequence":
            judged = self._of_sequence(judged, mask).expand_as(mask)
            weights = sequence_mean(beyond, mask).expand_as(beyond) if ratios else beyond
        judged, weights = judged.exp() if ratios else judged, weights.exp()
        low = -torch.inf if self.lower is None else self.lower
        inside = (judged <= self.upper) & (judged >= low)
        if self.action == "mask":
            return weights, mask & inside
        held = weights.clamp(min=0.0 if self.lower is None else self.lower, max=self.upper)
        return (held if self.level == "token" else torch.where(inside, weights, held)), mask

    def _of_sequence(self, values: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N 1"]:
        if self.agg == "max":
            largest = values.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
            return largest.masked_fill(~mask.any(1, keepdim=True), 0.0)
        return (sequence_sum if self.agg == "sum" else sequence_mean)(values, mask)


class AReaLLoss(Loss):
    """AReaL's actor loss, with the names and defaults of ``actor``.

    Attributes:
        trainer: ``areal``.
        eps_clip: clip range, either side.
        eps_clip_higher: upper clip range of its own.
        c_clip: of dual clip, off by default.
        use_decoupled_loss: ratios are to the policy before the step (``old_logprobs``), not to the one that sampled.
        recompute_logprob: the same without rejection; with neither, ratios are to ``sampled_logprobs``.
        prox_logp_method: how the old ones are had; ``loglinear``, which estimates them, is not modelled.
        importance_sampling_level: ratios of tokens, or one for a sequence, of its mean advantage.
        rejection_sampling: with ``use_decoupled_loss``; see :class:`RejectionSampling`.
        use_sapo_loss: soft gates in place of clipping.
        sapo_tau_pos: of these, for positive advantages.
        sapo_tau_neg: for the others.
        m2_threshold: must be off: M2PO's mask is not modelled.
        behave_imp_weight_cap: must be off: the decoupled loss is modelled with ``rejection_sampling``.
        ppo_n_minibatches: steps on a batch of rollouts; with more than one ``old_logprobs`` are needed.
    """

    trainer: Literal["areal"] = "areal"
    eps_clip: float = Field(default=0.2, ge=0)
    eps_clip_higher: float | None = Field(default=None, ge=0)
    c_clip: float | None = Field(default=None, gt=1)
    use_decoupled_loss: bool = False
    recompute_logprob: bool = False
    prox_logp_method: Literal["recompute", "metrics"] = "recompute"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    rejection_sampling: RejectionSampling | None = None
    use_sapo_loss: bool = False
    sapo_tau_pos: float = Field(default=1.0, gt=0)
    sapo_tau_neg: float = Field(default=1.05, gt=0)
    m2_threshold: None = None
    behave_imp_weight_cap: None = None
    ppo_n_minibatches: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check_sapo(self) -> AReaLLoss:
        if self.use_sapo_loss and self.use_decoupled_loss:
            raise ValueError(
                "loss.use_sapo_loss: expected it without use_decoupled_loss, as AReaL demands, got both; set "
                "use_decoupled_loss to false"
            )
        return self

    @property
    def per_token(self) -> bool:
        """Always."""
        return True

    @property
    def needs_old(self) -> bool:
        """Where a batch of rollouts is several steps, and ratios are to the policy before them."""
        return not self._ratio_to_sampler and self.ppo_n_minibatches not in (None, 1)

    @property
    def weighs_sampler(self) -> bool:
        """Where ratios are to the sampler, or weights between it and the old policy."""
        return self._ratio_to_sampler or self._rejects

    def needs_scores(self, rollouts: Rollouts) -> bool:
        """Where a ratio depends on the policy as it is."""
        return rollouts.old_logprobs is not None or self.weighs_sampler

    def check(self, rollouts: Rollouts) -> None:
        """Make sure that the batch has the log-probabilities that ratios are of."""
        if self.weighs_sampler:
            where = "of AReaL's loss, which takes ratios to the sampler"
            require(rollouts, "sampled_logprobs", where, "record those of the inference engine")
        if self.needs_old:
            where = f"of a loss of several steps on the same rollouts (ppo_n_minibatches {self.ppo_n_minibatches})"
            require(rollouts, "old_logprobs", where, "record the trainer's")

    def coefficients(self, rollouts: Rollouts, scores: TokenScores | None) -> TokenCoefficients:
        """Those of the policy loss; its denominator counts the tokens that were rejected too.

        Raises:
            ValueError: if the batch lacks what the loss takes.
        """
        self.check(rollouts)
        mask, kept = rollouts.response_mask, rollouts.response_mask
        weights: Float[Tensor, "N L"] | float = 1.0
        if self._rejects and self.rejection_sampling is not None and scores is not None:
            old = scores.logprobs if rollouts.old_logprobs is None else rollouts.old_logprobs
            weights, kept = self.rejection_sampling.weights(gap(old, rollouts.sampled_logprobs, mask), mask)
        slopes = self._slopes(rollouts, scores, kept) * weights * kept * by_token(mask)
        if self.importance_sampling_level == "sequence":
            slopes = sequence_mean(slopes, kept).expand_as(slopes) * kept
        return TokenCoefficients(slopes, None)

    def notes(self, rollouts: Rollouts, scores: TokenScores | None) -> list[Note]:
        """Settings without effect, and ratios that are not known."""
        settings = ("eps_clip", "eps_clip_higher", "c_clip")
        notes = inert_clip(self, settings, self._log_ratio(rollouts, scores))
        if rollouts.old_logprobs is None and not self._ratio_to_sampler and self.ppo_n_minibatches is None:
            notes.append(RATIO_ONE(settings="ppo_n_minibatches"))
        return notes

    @property
    def _ratio_to_sampler(self) -> bool:
        return not (self.use_decoupled_loss or self.recompute_logprob)

    @property
    def _rejects(self) -> bool:
        return self.use_decoupled_loss and self.rejection_sampling is not None

    def _log_ratio(self, rollouts: Rollouts, scores: TokenScores | None) -> Float[Tensor, "N L"]:
        old = rollouts.sampled_logprobs if self._ratio_to_sampler else rollouts.old_logprobs
        return gap(None if scores is None else scores.logprobs, old, rollouts.response_mask)

    def _slopes(
        self, rollouts: Rollouts, scores: TokenScores | None, kept: Bool[Tensor, "N L"]
    ) -> Float[Tensor, "N L"]:
        """Of each token's loss, in the logarithm of its ratio or its sequence's."""
        log_ratio, advantages = self._log_ratio(rollouts, scores), rollouts.token_advantages.double()
        if self.importance_sampling_level == "sequence":
            log_ratio = sequence_mean(log_ratio, kept).expand_as(log_ratio)
            advantages = sequence_mean(advantages, kept).expand_as(advantages)
        if self.use_sapo_loss:
            return soft_gate_slope(log_ratio.exp(), advantages, self.sapo_tau_pos, self.sapo_tau_neg)
        high = self.eps_clip if self.eps_clip_higher is None else self.eps_clip_higher
        return clipped_slope(log_ratio.exp(), advantages, 1 - self.eps_clip, 1 + high, dual=self.c_clip)
