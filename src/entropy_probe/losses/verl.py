"""verl's actor loss (0.7.0 to 0.9.0): policy loss, KL loss and entropy bonus under ``loss_agg_mode``.

Sources: ``verl/trainer/ppo/core_algos.py``, ``verl/workers/utils/losses.py``, ``verl/workers/actor/dp_actor.py``.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from entropy_probe.losses.base import GLOBAL_MEAN, INERT, NOT_A_NUMBER, RATIO_ONE, Loss, inert_clip, require
from entropy_probe.losses.pieces import gap, group_sum, microbatches, sequence_mean
from entropy_probe.losses.verl_correction import Rejection, importance_weights, rejections, threshold
from entropy_probe.losses.verl_policies import KL_KINDS, POLICY_SLOPES, Tokens, kl_loss_slope
from entropy_probe.results.note import Note, NoteKind
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenCoefficients, TokenScores

LossMode = Literal[
    "vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo"
]
Aggregation = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
SINCE = {"dppo_tv": "0.7.1", "dppo_kl": "0.7.1", "dro": "0.9.0", "token-sum": "0.9.0"}
"""The version that brought a name, where it was not the first."""
CLIPPED = ("vanilla", "gspo", "clip_cov", "geo_mean", "cispo", "dppo_tv", "dppo_kl")
CLIP_SETTINGS = ("clip_ratio_low", "clip_ratio_high", "clip_ratio_c")
BY_SEQUENCE = ("gspo", "sapo", "geo_mean")
"""Policy losses that are aggregated over sequences whatever ``loss_agg_mode`` says."""


OWN_DRAW = NoteKind(
    "own_draw",
    "{what} are drawn at random, here with seed {seed}: another draw than the trainer's, which nothing records",
    "Repeat with other seeds (loss.seed) to see what the draw does to the numbers.",
)


class VerlLoss(Loss):
    """verl's actor loss, with the names and defaults of ``actor_rollout_ref.actor`` and of the sections named.

    Ratios are taken to ``old_logprobs``; without them to the policy as it is, as verl does where a batch is one
    mini-batch of one epoch.

    Attributes:
        trainer: ``verl``.
        version: verl's. Before 0.7.1 ``seq-mean-token-sum-norm`` does not divide by the number of sequences.
        use_legacy_worker_impl: of ``trainer``; before 0.8.0 ``auto`` is the old workers, which normalise each
            microbatch by itself; the new ones and all since normalise over the mini-batch.
        loss_mode: of ``policy_loss``.
        loss_agg_mode: how losses of tokens become one; ``gspo`` and ``sapo`` take ``seq-mean-token-mean``, ``geo_mean``
            the mean over sequences.
        loss_scale_factor: of ``seq-mean-token-sum-norm``; where verl has none (and always with the old workers), the
            length that it pads responses to, ``data.max_response_length``.
        clip_ratio: takes the place of the two that follow where they are null.
        clip_ratio_low: of ``dppo_tv`` and ``dppo_kl`` how far probability may fall, or the divergence of such tokens.
        clip_ratio_high: likewise for rises.
        clip_ratio_c: of dual clip; of ``dppo_tv`` and ``dppo_kl`` the largest ratio.
        tau_pos: of ``sapo``, for positive advantages.
        tau_neg: of ``sapo``, for the others.
        clip_cov_ratio: of ``policy_loss``: the share of tokens that Clip-Cov drops.
        clip_cov_lb: least covariance of these.
        clip_cov_ub: largest.
        seed: of the draw of Clip-Cov. It is not verl's draw, which is not recorded.
        kl_cov_ratio: of ``policy_loss``: the share of tokens that KL-Cov holds back.
        ppo_kl_coef: how strongly.
        dro_beta: of ``policy_loss``, for ``dro``.
        use_kl_loss: whether there is a KL loss to the reference.
        kl_loss_coef: its coefficient.
        kl_loss_type: its estimate; ``+`` behind it: with the gradient of ``k2``, from 0.8.0 on.
        entropy_coeff: coefficient of the entropy bonus.
        rollout_is: of ``algorithm.rollout_correction``: weights by ``token`` or ``sequence``, from ``old_logprobs``
            and ``sampled_logprobs``.
        rollout_is_threshold: where they are cut off; ``"lower_upper"``: 0 outside, from 0.8.0 on.
        rollout_is_batch_normalize: to mean 1 over the batch.
        rollout_rs: which tokens or sequences are rejected; several with commas between. From 0.7.1 on.
        rollout_rs_threshold: beyond what.
        bypass_mode: take ratios, and weights by the policy as it is, to ``sampled_logprobs``.
        loss_type: of bypass mode.
        ppo_epochs: passes over the rollouts. With more than one, or several mini-batches, ``old_logprobs`` are needed.
        train_batch_size: of ``data``; in prompts, as the one that follows.
        ppo_mini_batch_size: a mini-batch, which is one step.
        num_processes: data-parallel ranks, needed where verl does not make up for averaging gradients over them.
    """

    trainer: Literal["verl"] = "verl"
    version: Literal["0.7.0", "0.7.1", "0.8.0", "0.9.0"] = "0.9.0"
    use_legacy_worker_impl: Literal["auto", "enable", "disable"] = "auto"
    loss_mode: LossMode = "vanilla"
    loss_agg_mode: Aggregation = "token-mean"
    loss_scale_factor: float | None = Field(default=None, gt=0)
    clip_ratio: float = Field(default=0.2, ge=0)
    clip_ratio_low: float | None = Field(default=0.2, ge=0)
    clip_ratio_high: float | None = Field(default=0.2, ge=0)
    clip_ratio_c: float = Field(default=3.0, gt=1)
    tau_pos: float = Field(default=1.0, gt=0)
    tau_neg: float = Field(default=1.05, gt=0)
    clip_cov_ratio: float = Field(default=0.0002, gt=0)
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    seed: int = 0
    kl_cov_ratio: float = Field(default=0.0002, gt=0)
    ppo_kl_coef: float = 0.1
    dro_beta: float | None = Field(default=None, gt=0)
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.001
    kl_loss_type: str = "low_var_kl"
    entropy_coeff: float = 0.0
    rollout_is: Literal["token", "sequence"] | None = None
    rollout_is_threshold: float | str = 2.0
    rollout_is_batch_normalize: bool = False
    rollout_rs: str | None = None
    rollout_rs_threshold: float | str | None = None
    bypass_mode: bool = False
    loss_type: Literal["ppo_clip", "reinforce"] = "ppo_clip"
    ppo_epochs: int = Field(default=1, ge=1)
    train_batch_size: int | None = Field(default=None, ge=1)
    ppo_mini_batch_size: int | None = Field(default=None, ge=1)
    num_processes: int | None = Field(default=None, ge=1)

    @field_validator("kl_loss_type")
    @classmethod
    def _check_kl(cls, kind: str) -> str:
        if kind == "full":
            raise ValueError("full, over the whole vocabulary, is not implemented in verl either; take low_var_kl")
        if kind.removesuffix("+") not in KL_KINDS:
            raise ValueError(f"expected one of {', '.join(KL_KINDS)}, each also with a + behind it, got {kind!r}")
        return kind

    @model_validator(mode="after")
    def _check_version(self) -> VerlLoss:
        for name in (self.loss_mode, self.loss_agg_mode):
            if self.version < SINCE.get(name, ""):
                raise ValueError(f"{name} came with verl {SINCE[name]}, got version {self.version}; set the right one")
        early, since_08 = self.version < "0.8.0", "from verl 0.8.0 on"
        misplaced = {
            "use_legacy_worker_impl": (self.use_legacy_worker_impl == "enable" and not early, "up to verl 0.7.1"),
            "kl_loss_type": (self.kl_loss_type.endswith("+") and early, since_08),
            "rollout_is_threshold": ("_" in str(self.rollout_is_threshold) and early, since_08),
            "rollout_rs": (self.rollout_rs is not None and self.version < "0.7.1", "from verl 0.7.1 on"),
        }
        for name, (wrong, range_) in misplaced.items():
            if wrong:
                raise ValueError(f"loss.{name}: {getattr(self, name)} is known {range_}, got version {self.version}")
        return self

    @model_validator(mode="after")
    def _check_needs(self) -> VerlLoss:
        if self.loss_mode == "dro" and self.dro_beta is None:
            raise ValueError("loss.dro_beta: expected a number above 0 beside loss_mode dro, got none")
        if self.loss_agg_mode == "seq-mean-token-sum-norm" and self.loss_scale_factor is None:
            raise ValueError(
                "loss.loss_scale_factor: expected a number beside seq-mean-token-sum-norm, got none; where verl has "
                "none set data.max_response_length, which it takes then"
            )
        if self._over_ranks and self.num_processes is None:
            raise ValueError(
                f"loss.num_processes: expected the number of data-parallel ranks beside {self._over_ranks}, which "
                "verl averages over them, got none"
            )
        return self

    @model_validator(mode="after")
    def _check_correction(self) -> VerlLoss:
        threshold("rollout_is_threshold", self.rollout_is_threshold)
        _ = self._rejections
        if self.bypass_mode and self._by_microbatch:
            raise ValueError(
                "loss.bypass_mode: with the old workers verl takes ratios to the policy itself in one case and to the "
                "sampler's in another; not supported, expected use_legacy_worker_impl: disable"
            )
        if self.bypass_mode and self.rollout_is_batch_normalize:
            raise ValueError(
                "loss.rollout_is_batch_normalize: with bypass_mode over microbatches of all ranks; leave it out"
            )
        return self

    @property
    def clip_ratios(self) -> tuple[float, float]:
        """``clip_ratio_low`` and ``clip_ratio_high`` as verl takes them."""
        low, high = self.clip_ratio_low, self.clip_ratio_high
        return (self.clip_ratio if low is None else low), (self.clip_ratio if high is None else high)

    @property
    def clip_range(self) -> tuple[float, float]:
        """The ratios that are not clipped."""
        low, high = self.clip_ratios
        return 1 - low, 1 + high

    @property
    def per_token(self) -> bool:
        """Whether the policy term divides by tokens."""
        return self.loss_agg_mode == "token-mean" and self.loss_mode not in BY_SEQUENCE

    @property
    def needs_reference(self) -> bool:
        """With a KL loss."""
        return self.use_kl_loss and self.kl_loss_coef != 0

    @property
    def needs_old(self) -> bool:
        """Where a batch of rollouts is several steps."""
        return not self.bypass_mode and (self.ppo_epochs > 1 or self._mini_batches not in (None, 1))

    @property
    def weighs_sampler(self) -> bool:
        """With rollout correction."""
        return self.bypass_mode or self.rollout_is is not None or self.rollout_rs is not None

    @property
    def models(self) -> tuple[str, ...]:
        """The KL term and the entropy bonus, where they have a coefficient."""
        return ("the KL term",) * self.needs_reference + ("the entropy bonus",) * (self.entropy_coeff != 0)

    def needs_scores(self, rollouts: Rollouts) -> bool:
        """Where a term depends on the policy as it is."""
        of_policy = self.loss_mode == "clip_cov" or (rollouts.old_logprobs is not None and self.loss_mode != "gpg")
        return of_policy or self.needs_reference or self.weighs_sampler

    def check(self, rollouts: Rollouts) -> None:
        """Make sure that the batch has the log-probabilities that the loss takes, but for the reference's."""
        if self.needs_old:
            where = "of a trainer that uses rollouts for several steps (ppo_epochs, ppo_mini_batch_size)"
            require(rollouts, "old_logprobs", where, "record verl's old_log_probs")
        if self.weighs_sampler:
            where = "of a loss that corrects for the sampler (rollout_is, rollout_rs, bypass_mode)"
            require(rollouts, "sampled_logprobs", where, "record verl's rollout_log_probs")

    def coefficients(self, rollouts: Rollouts, scores: TokenScores | None = None) -> TokenCoefficients:
        """Those of the policy loss, the KL loss and the entropy bonus."""
        self.check(rollouts)
        mask = rollouts.response_mask
        weights, kept = self._correction(rollouts, scores)
        counted = mask if self.bypass_mode else kept
        slopes = POLICY_SLOPES[self._policy](self._tokens(rollouts, scores, kept), self)
        if self._policy == "geo_mean" and self.rollout_is is not None:
            weights = sequence_mean((weights + 1e-10).log(), kept).exp()
        aggregation = "seq-mean-token-mean" if self._policy in BY_SEQUENCE else self.loss_agg_mode
        logprobs = slopes * weights * self._aggregate(rollouts, aggregation, kept, counted, self._policy == "geo_mean")
        others = self._aggregate(rollouts, self.loss_agg_mode, counted, counted)
        if self.needs_reference:
            require(rollouts, "reference_logprobs", "of a loss with a KL term", "record the reference's")
            above = gap(None if scores is None else scores.logprobs, rollouts.reference_logprobs, mask)
            logprobs = logprobs + self.kl_loss_coef * others * kl_loss_slope(self.kl_loss_type, above)
        entropies = -self.entropy_coeff * others if self.entropy_coeff else None
        return TokenCoefficients(logprobs.masked_fill(~mask, 0.0), entropies)

    def notes(self, rollouts: Rollouts, scores: TokenScores | None) -> list[Note]:
        """Settings without effect, means over microbatches that are not known, and the draw of Clip-Cov."""
        notes = inert_clip(self, CLIP_SETTINGS if self._policy in CLIPPED else (), self._log_ratio(rollouts, scores))
        if "clip_ratio" in self.model_fields_set and None not in (self.clip_ratio_low, self.clip_ratio_high):
            reason = "verl takes it where clip_ratio_low or clip_ratio_high is null"
            notes.append(INERT(what="clip range", reason=reason, settings="clip_ratio"))
        if self.bypass_mode and "loss_mode" in self.model_fields_set:
            notes.append(INERT(what="policy loss", reason="bypass_mode goes by loss_type", settings="loss_mode"))
        per_microbatch = {
            "the loss": self._by_microbatch,
            f"the covariance of {self._policy}": self._policy in ("clip_cov", "kl_cov"),
            "the mean of geo_mean": self._policy == "geo_mean",
        }
        what = [name for name, there in per_microbatch.items() if there]
        if what and rollouts.microbatch_ids is None:
            notes.append(GLOBAL_MEAN(what=what[0], unit="microbatch"))
        if self._by_microbatch:
            left = group_sum(self._correction(rollouts, scores)[1].sum(1).double(), microbatches(rollouts))
            if bool((left == 0).any()):
                notes.append(NOT_A_NUMBER(why="a microbatch has no response token, or none that is not rejected"))
        if rollouts.old_logprobs is None and not self.bypass_mode and self._mini_batches is None:
            notes.append(RATIO_ONE(settings="train_batch_size and ppo_mini_batch_size"))
        if self._policy == "clip_cov":
            notes.append(OWN_DRAW(what="the tokens that Clip-Cov drops", seed=self.seed))
        return notes

    @property
    def _mini_batches(self) -> float | None:
        """Steps on each batch of rollouts and epoch."""
        if self.train_batch_size is None or self.ppo_mini_batch_size is None:
            return None
        return self.train_batch_size / self.ppo_mini_batch_size

    @property
    def _by_microbatch(self) -> bool:
        """Whether each microbatch is normalised by itself."""
        return self.version < "0.8.0" and self.use_legacy_worker_impl != "disable"

    @property
    def _over_ranks(self) -> str | None:
        """What ends up divided by the number of ranks."""
        if self._by_microbatch:
            return None
        if self.loss_mode == "geo_mean":
            return "geo_mean"
        first_norm = self.version == "0.7.0" and self.loss_agg_mode == "seq-mean-token-sum-norm"
        return "seq-mean-token-sum-norm of version 0.7.0" if first_norm else None

    @property
    def _ranks(self) -> int:
        return self.num_processes if self._over_ranks and self.num_processes else 1

    @property
    def _rejections(self) -> tuple[Rejection, ...]:
        return () if self.rollout_rs is None else rejections(self.rollout_rs, self.rollout_rs_threshold)

    @property
    def _policy(self) -> str:
        """The name of the policy loss that is computed."""
        if not self.bypass_mode:
            return self.loss_mode
        return {"ppo_clip": "vanilla", "reinforce": "gpg"}[self.loss_type]

    def _log_ratio(self, rollouts: Rollouts, scores: TokenScores | None) -> Float[Tensor, "N L"]:
        old = rollouts.sampled_logprobs if self.bypass_mode else rollouts.old_logprobs
        return gap(None if scores is None else scores.logprobs, old, rollouts.response_mask)

    def _tokens(self, rollouts: Rollouts, scores: TokenScores | None, kept: Bool[Tensor, "N L"]) -> Tokens:
        log_ratio = self._log_ratio(rollouts, scores)
        # only what compares policies looks at them, and without scores these are the same
        logprobs = torch.zeros_like(log_ratio) if scores is None else scores.logprobs.double()
        index = microbatches(rollouts).unique(return_inverse=True)[1]
        return Tokens(logprobs, log_ratio, rollouts.token_advantages.double(), kept, index)

    def _correction(
        self, rollouts: Rollouts, scores: TokenScores | None
    ) -> tuple[Float[Tensor, "N L"], Bool[Tensor, "N L"]]:
        """What the policy loss of each token is multiplied by, and which tokens are not rejected."""
        mask = rollouts.response_mask
        weights = torch.ones(mask.shape, dtype=torch.float64)
        if not self.weighs_sampler:
            return weights, mask
        assert scores is not None
        own = self.bypass_mode or rollouts.old_logprobs is None
        beyond = gap(scores.logprobs if own else rollouts.old_logprobs, rollouts.sampled_logprobs, mask)
        kept = mask
        for rejection in self._rejections:
            kept = kept & rejection.kept(beyond, mask)
        # in bypass mode PPO's ratio is the correction
        if self.rollout_is is not None and not (self.bypass_mode and self.loss_type == "ppo_clip"):
            bounds = threshold("rollout_is_threshold", self.rollout_is_threshold)
            weights = importance_weights(
                beyond, mask, self.rollout_is, bounds, normalize=self.rollout_is_batch_normalize
            )
        return weights, kept

    def _aggregate(
        self,
        rollouts: Rollouts,
        aggregation: str,
        mask: Bool[Tensor, "N L"],
        counted: Bool[Tensor, "N L"],
        geo_mean: bool = False,
    ) -> Float[Tensor, "N L"]:
        """The weight of each token's loss; ``counted`` are the tokens of the mini-batch that its normaliser counts."""
        groups, ones = microbatches(rollouts), torch.ones(len(mask), dtype=torch.float64)
        rows, lengths = group_sum(ones, groups), mask.sum(1).double()
        if self._by_microbatch:
            share = rows / len(mask)
            tokens, sequences = group_sum(lengths, groups), group_sum((lengths > 0).double(), groups)
        else:
            share, tokens, sequences = ones, ones * counted.sum(), ones * len(mask)
        tokens, sequences = tokens.clamp(min=1), rows * self._ranks if geo_mean else sequences.clamp(min=1)
        match aggregation:
            case "token-mean":
                divisor = tokens
            case "token-sum":
                divisor = ones
            case "seq-mean-token-sum":
                divisor = sequences
            case "seq-mean-token-mean":
                divisor = sequences * lengths.clamp(min=1)
            case _:
                assert self.loss_scale_factor is not None
                divisor = self.loss_scale_factor * (ones * self._ranks if self.version == "0.7.0" else sequences)
        return mask * (share / divisor)[:, None]
