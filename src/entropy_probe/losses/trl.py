"""The losses of TRL's GRPO trainer and its kin, as of TRL 1.16.

``GRPOTrainer`` with every ``loss_type``, ``GMPOTrainer`` (``gmpo``) and ``RLOOTrainer`` (``rloo``).
Formulas: ``docs/theory.md``, "TRL's losses".
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from entropy_probe.losses.base import GLOBAL_MEAN, INERT, Loss, require
from entropy_probe.losses.pieces import (
    by_max_length,
    by_sequence,
    by_sequence_sum,
    by_token,
    check_microbatches,
    clipped_slope,
    gap,
    is_one,
    kl_slope,
    kl_value,
    microbatches,
    sequence_mean,
    sequence_sum,
    top_entropy_mask,
)
from entropy_probe.losses.trl_terms import (
    by_longest,
    check_balance,
    gamma_weights,
    geometric_mean,
    log_ratio_to_old,
    off_policy_mask,
    sampler_ratio,
    soft_gate_slope,
)
from entropy_probe.results.note import Note
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenCoefficients, TokenScores

LossType = Literal[
    "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo", "gmpo", "rloo", "per_prompt_max"
]
PER_TOKEN = ("bnpo", "dapo", "cispo", "vespo")
PER_GENERATION = ("dapo", "cispo", "vespo")
"""Divide by the tokens of the generation batch."""
OTHER_TRAINERS = ("gmpo", "rloo")
"""Losses of trainers of their own, which leave many of the settings aside."""


class TRLLoss(Loss):
    """A loss of TRL, with the names and defaults of its arguments; those of ``GRPOConfig`` unless said.

    Attributes:
        trainer: ``trl``.
        loss_type: that of ``GRPOConfig``; ``gmpo`` and ``rloo`` are the losses of the trainers of these names.
            ``per_prompt_max`` is none of TRL's: it divides by N times the longest response of the prompt's group.
        beta: coefficient of the KL term (k3) to the reference. Of ``rloo`` it is part of the reward.
        use_bias_correction_kl: multiply the KL term by the ratio; false for a TRL that has no such argument.
        epsilon: lower clip range; ``None`` is the trainer's default, 0.2 (``gmpo`` 0.4, of the ratio's logarithm).
        epsilon_high: upper clip range; ``None`` is ``epsilon``. Of ``cispo`` it is the cap itself, as TRL has it.
        delta: bound on the ratio before the minimum with the clipped one.
        importance_sampling_level: a ratio for every token or one for the sequence.
        sapo_temperature_pos: of ``sapo``, for positive advantages.
        sapo_temperature_neg: of ``sapo``, for the others.
        vespo_k_pos: of ``vespo``; exponent for advantages of at least 0.
        vespo_lambda_pos: decay for them.
        vespo_k_neg: exponent for the others.
        vespo_lambda_neg: decay for them.
        top_entropy_quantile: share of tokens, those of the highest entropy, in the policy term and the entropy bonus.
        entropy_coef: coefficient of the entropy bonus; with ``use_adaptive_entropy`` what it is at this step.
        use_adaptive_entropy: whether the bonus waits for entropy to fall to ``entropy_target``.
        entropy_target: nats per token.
        last_world_entropy: the entropy that decides; ``entropy_ctrl_state.json`` of a checkpoint has it and
            ``entropy_coef``.
        off_policy_mask_threshold: leave out sequences of negative advantage whose log-probabilities fell by more than
            this, nats per token.
        use_vllm: whether vLLM sampled; then ``sampled_logprobs`` count as below.
        vllm_importance_sampling_correction: multiply by ratios between old and sampled log-probabilities.
        vllm_importance_sampling_mode: by token or sequence, clipped or masked.
        vllm_importance_sampling_clip_max: upper end of these ratios.
        vllm_importance_sampling_clip_min: lower end.
        num_iterations: steps on the same rollouts.
        gradient_accumulation_steps: microbatches of a step, on each process.
        steps_per_generation: microbatches of a generation batch; ``None`` is ``gradient_accumulation_steps``.
        num_processes: data-parallel processes.
        num_items_in_batch: unmasked response tokens of the generation batch, all processes; needed where
            ``steps_per_generation`` is larger than ``gradient_accumulation_steps``, so that the update batch is a part
            of it.
        max_completion_length: of ``dr_grpo``, which divides by it.
        router_aux_loss_coef: coefficient of the loss that balances the experts of a mixture; ``None`` is the model's
            own. With any but 0 such a model is refused: the loss is no sum over tokens.
    """

    trainer: Literal["trl"] = "trl"
    loss_type: LossType = "dapo"
    beta: float = Field(default=0.0, ge=0)
    use_bias_correction_kl: bool = True
    epsilon: float | None = Field(default=None, ge=0)
    epsilon_high: float | None = Field(default=None, ge=0)
    delta: float | None = Field(default=None, gt=0)
    importance_sampling_level: Literal["token", "sequence"] = "token"
    sapo_temperature_pos: float = Field(default=1.0, gt=0)
    sapo_temperature_neg: float = Field(default=1.05, gt=0)
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    top_entropy_quantile: float = Field(default=1.0, ge=0, le=1)
    entropy_coef: float = 0.0
    use_adaptive_entropy: bool = False
    entropy_target: float = 0.2
    last_world_entropy: float | None = None
    off_policy_mask_threshold: float | None = None
    use_vllm: bool = False
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None
    num_iterations: int = Field(default=1, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    steps_per_generation: int | None = Field(default=None, ge=1)
    num_processes: int = Field(default=1, ge=1)
    num_items_in_batch: int | None = Field(default=None, gt=0)
    max_completion_length: int | None = Field(default=None, gt=0)
    router_aux_loss_coef: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check_adaptive(self) -> TRLLoss:
        if self.use_adaptive_entropy and self.last_world_entropy is None:
            raise ValueError(
                "loss.last_world_entropy: expected a number beside use_adaptive_entropy, got none; set it and "
                "entropy_coef to what entropy_ctrl_state.json of the checkpoint has"
            )
        return self

    @property
    def per_token(self) -> bool:
        """Whether the policy term divides by tokens."""
        return self.loss_type in PER_TOKEN

    @property
    def needs_reference(self) -> bool:
        """With a KL term in the loss."""
        return self.beta > 0 and self.loss_type != "rloo"

    @property
    def needs_old(self) -> bool:
        """Where a generation batch outlives the step."""
        return self.gradient_accumulation_steps % (self._steps_per_generation * self.num_iterations) != 0

    @property
    def weighs_sampler(self) -> bool:
        """With vLLM's importance sampling correction."""
        return self._of_sampler and self.vllm_importance_sampling_correction

    @property
    def models(self) -> tuple[str, ...]:
        """The KL term, the entropy bonus, ratios and the sampler's weights, where the settings have them."""
        there = {
            "the KL term": self.beta > 0,
            "the entropy bonus": (self.entropy_coef or self.use_adaptive_entropy)
            and self.loss_type not in OTHER_TRAINERS,
            "importance ratios other than 1": self.needs_old,
            "the weights that correct for the sampler": self.weighs_sampler,
        }
        return tuple(line for line, modelled in there.items() if modelled)

    def check_model(self, config: object) -> None:
        """Refuse a mixture of experts that TRL balances by an auxiliary loss."""
        check_balance(self.router_aux_loss_coef, config)

    def needs_scores(self, rollouts: Rollouts) -> bool:
        """Where a term depends on the policy as it is."""
        given = rollouts.old_logprobs is not None or self.needs_reference or self._of_sampler
        return given or (self.top_entropy_quantile < 1 and self.loss_type != "rloo")

    def weights(self, rollouts: Rollouts) -> Float[Tensor, "N L"]:
        """The weight ``omega_it`` of every response token in the policy and KL terms, 0 elsewhere."""
        mask = rollouts.response_mask
        match self.loss_type:
            case "grpo" | "sapo" | "gmpo":
                return by_sequence(mask)
            case "luspo" | "rloo":
                return by_sequence_sum(mask)
            case "bnpo":
                return by_token(mask, microbatches(rollouts))
            case "per_prompt_max":
                return by_longest(rollouts)
            case "dr_grpo":
                if self.max_completion_length is None:
                    raise ValueError(
                        "loss_type dr_grpo: expected max_completion_length, got None; set it to the trainer's value, "
                        "which the loss divides by"
                    )
                return by_max_length(mask, self.max_completion_length)
            case _:
                return self._by_generation(rollouts)

    def coefficients(self, rollouts: Rollouts, scores: TokenScores | None = None) -> TokenCoefficients:
        """Those of the policy term and the KL term, and of the entropy bonus."""
        self.check(rollouts)
        if self.needs_reference:
            require(rollouts, "reference_logprobs", "of a loss with a KL term", "record the reference's")
        mask, weights = rollouts.response_mask, self.weights(rollouts)
        keep = self._kept(rollouts, scores)
        if self.loss_type in OTHER_TRAINERS:
            policy = self._of_other_trainers(rollouts, scores, keep)
        else:
            policy = self._policy(rollouts, scores, weights * keep)
        if self.needs_reference:
            policy = policy + self.beta * self._kl(rollouts, scores, weights)
        bonus = -self._bonus * by_token(keep, microbatches(rollouts)) if self._bonus else None
        return TokenCoefficients(policy.masked_fill(~mask, 0.0), bonus)

    def notes(self, rollouts: Rollouts, scores: TokenScores | None) -> list[Note]:
        """Settings without effect, and means over microbatches that are not known."""
        notes = []
        given = [name for name in self._ratio_settings if name in self.model_fields_set]
        given = [name for name in given if getattr(self, name) is not None]
        if given and is_one(log_ratio_to_old(rollouts, scores)):
            what = "clip range" if set(given) & {"epsilon", "epsilon_high", "delta"} else "importance ratios"
            notes.append(INERT(what=what, reason="every ratio is 1 on this step", settings=", ".join(given)))
        if unit := self._unknown_means(rollouts):
            notes.append(GLOBAL_MEAN(what=unit[0], unit=unit[1]))
        return notes

    @property
    def _steps_per_generation(self) -> int:
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def _of_sampler(self) -> bool:
        """Whether the sampler's log-probabilities count."""
        used = self.vllm_importance_sampling_correction or self.off_policy_mask_threshold is not None
        return self.use_vllm and used and self.loss_type not in OTHER_TRAINERS

    @property
    def _bonus(self) -> float:
        """The coefficient of the entropy bonus at this step."""
        if self.loss_type in OTHER_TRAINERS:
            return 0.0
        if self.use_adaptive_entropy:
            assert self.last_world_entropy is not None
            return self.entropy_coef if self.last_world_entropy <= self.entropy_target else 0.0
        return self.entropy_coef

    @property
    def _clip(self) -> tuple[float, float]:
        low = self.epsilon if self.epsilon is not None else 0.4 if self.loss_type == "gmpo" else 0.2
        return low, low if self.epsilon_high is None else self.epsilon_high

    @property
    def _ratio_settings(self) -> tuple[str, ...]:
        """The settings that do nothing where every ratio is 1."""
        names = {
            "cispo": (),
            "sapo": ("sapo_temperature_pos", "sapo_temperature_neg"),
            "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        }.get(self.loss_type, ("epsilon", "epsilon_high", "delta"))
        return names if self.use_vllm else (*names, "off_policy_mask_threshold")

    def _unknown_means(self, rollouts: Rollouts) -> tuple[str, str] | None:
        """What is a mean over microbatches, or over a generation batch, that this batch does not tell apart."""
        steps, own = self._steps_per_generation, self.gradient_accumulation_steps
        by_microbatch = {
            "the bnpo mean over tokens": self.loss_type == "bnpo",
            "the entropy bonus": bool(self._bonus),
            "the top-entropy quantile": self.top_entropy_quantile < 1 and self.loss_type != "rloo",
        }
        unknown = rollouts.microbatch_ids is None
        terms = [name for name, there in by_microbatch.items() if there]
        if terms and unknown and own * self.num_processes > 1:
            return " and ".join(terms), "microbatch"
        whole = steps == own or self.num_items_in_batch is not None or (own % steps == 0 and not unknown)
        if self.loss_type in PER_GENERATION and not whole:
            return f"the {self.loss_type} mean over tokens", "generation batch"
        return None

    def check(self, rollouts: Rollouts) -> None:
        """Make sure that the batch has the log-probabilities that the loss takes, but for the reference's."""
        if self.needs_old:
            names = ("num_iterations", "steps_per_generation", "gradient_accumulation_steps")
            given = ", ".join(f"{name} {getattr(self, name)}" for name in names)
            where = f"of a trainer that uses rollouts for several steps ({given})"
            remedy = "record those that its ratios are taken to, or leave these out for the first step on a batch"
            require(rollouts, "old_logprobs", where, remedy)
        if self._of_sampler:
            where = "of a loss that corrects for the sampler (use_vllm)"
            require(rollouts, "sampled_logprobs", where, "record those of the sampler, or set use_vllm: false")

    def _by_generation(self, rollouts: Rollouts) -> Float[Tensor, "N L"]:
        """One over the tokens of each generation batch, as many of these as the step has."""
        mask, steps, own = rollouts.response_mask, self._steps_per_generation, self.gradient_accumulation_steps
        if self.num_items_in_batch is not None:
            return mask.double() * steps / (self.num_items_in_batch * own)
        if rollouts.microbatch_ids is None or steps == own or own % steps != 0:
            return by_token(mask)
        return by_token(mask, self._accumulation_step(rollouts) // steps)

    def _accumulation_step(self, rollouts: Rollouts) -> Int[Tensor, " N"]:
        """Which microbatch of the step each sequence is in, on whichever process."""
        check_microbatches(rollouts, self.gradient_accumulation_steps, self.num_processes)
        return microbatches(rollouts) // self.num_processes % self.gradient_accumulation_steps

    def _kept(self, rollouts: Rollouts, scores: TokenScores | None) -> Bool[Tensor, "N L"]:
        """The tokens in the policy term and the entropy bonus."""
        mask = rollouts.response_mask
        if self.top_entropy_quantile == 1 or self.loss_type == "rloo":
            return mask
        assert scores is not None
        return top_entropy_mask(scores.entropies, mask, self.top_entropy_quantile, self._accumulation_step(rollouts))

    def _policy(
        self, rollouts: Rollouts, scores: TokenScores | None, weights: Float[Tensor, "N L"]
    ) -> Float[Tensor, "N L"]:
        """Coefficients of the policy term of ``GRPOTrainer``."""
        ratio, advantages = self._ratio(rollouts, scores), rollouts.token_advantages.double()
        if self.off_policy_mask_threshold is not None:
            sampled = rollouts.sampled_logprobs if self.use_vllm else rollouts.old_logprobs
            fallen = gap(sampled, None if scores is None else scores.logprobs, rollouts.response_mask)
            weights = weights * off_policy_mask(fallen, rollouts, self.off_policy_mask_threshold)
        correction = self._sampler_ratio(rollouts, scores)
        if self.loss_type == "vespo":
            of_sign = ((self.vespo_k_pos, self.vespo_lambda_pos), (self.vespo_k_neg, self.vespo_lambda_neg))
            log_ratio = log_ratio_to_old(rollouts, scores)
            return -weights * gamma_weights(log_ratio, correction, advantages, *of_sign) * advantages
        weights = weights if correction is None else weights * correction
        low, high = self._clip
        if self.loss_type == "cispo":
            return -weights * ratio.clamp(max=high) * advantages
        if self.loss_type == "sapo":
            slope = soft_gate_slope(ratio, advantages, self.sapo_temperature_pos, self.sapo_temperature_neg)
        else:
            slope = clipped_slope(ratio, advantages, 1 - low, 1 + high, self.delta)
        return self._through_ratio(weights * slope, rollouts)

    def _kl(
        self, rollouts: Rollouts, scores: TokenScores | None, weights: Float[Tensor, "N L"]
    ) -> Float[Tensor, "N L"]:
        """Coefficients of the KL term, before its own coefficient."""
        assert scores is not None
        above = gap(scores.logprobs, rollouts.reference_logprobs, rollouts.response_mask)
        slope = weights * kl_slope("k3", above)
        if not self.use_bias_correction_kl or self.loss_type == "gmpo":
            return slope
        ratio = self._ratio(rollouts, scores)
        return ratio * slope + self._through_ratio(ratio * weights * kl_value("k3", above), rollouts)

    def _ratio(self, rollouts: Rollouts, scores: TokenScores | None) -> Float[Tensor, "N _"]:
        """The importance ratio of every token, or one for each sequence."""
        log_ratio = log_ratio_to_old(rollouts, scores)
        if self.importance_sampling_level == "token":
            return log_ratio.exp()
        return sequence_mean(log_ratio, rollouts.response_mask).exp()

    def _through_ratio(self, slopes: Float[Tensor, "N L"], rollouts: Rollouts) -> Float[Tensor, "N L"]:
        """Slopes in the logarithm of the ratio as coefficients of log-probabilities, over which that may be a mean."""
        if self.importance_sampling_level == "token":
            return slopes
        return sequence_mean(slopes, rollouts.response_mask).expand_as(slopes)

    def _sampler_ratio(self, rollouts: Rollouts, scores: TokenScores | None) -> Float[Tensor, "N _"] | None:
        if not (self.use_vllm and self.vllm_importance_sampling_correction):
            return None
        assert scores is not None
        old = scores.logprobs if rollouts.old_logprobs is None else rollouts.old_logprobs
        bounds = (self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max)
        return sampler_ratio(old, rollouts, self.vllm_importance_sampling_mode, *bounds)

    def _of_other_trainers(
        self, rollouts: Rollouts, scores: TokenScores | None, keep: Bool[Tensor, "N L"]
    ) -> Float[Tensor, "N L"]:
        """Coefficients of the policy term of ``RLOOTrainer`` or ``GMPOTrainer``: one ratio for a sequence."""
        mask, advantages = rollouts.response_mask, rollouts.token_advantages.double()
        log_ratio, (low, high) = log_ratio_to_old(rollouts, scores), self._clip
        if self.loss_type == "gmpo":
            return geometric_mean(log_ratio, advantages, keep, low, high)
        return by_sequence_sum(mask) * clipped_slope(sequence_sum(log_ratio, mask).exp(), advantages, 1 - low, 1 + high)
