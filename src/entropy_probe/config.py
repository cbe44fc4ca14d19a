"""The settings of a probe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializeAsAny,
    field_serializer,
    model_validator,
)

from entropy_probe.estimators.baselines import EntropyKind
from entropy_probe.estimators.first_order import Normalization
from entropy_probe.estimators.importance import ImportanceMode
from entropy_probe.losses import Loss, Settings, build_loss, default_loss

__all__ = ["ProbeConfig", "StepDtype"]

StepDtype = Literal["auto", "float32", "bfloat16", "float16"]

LONGEST = "max_completion_length"


class ProbeConfig(Settings):
    """How to probe. All fields are keyword arguments and validated; unknown ones are errors.

    Attributes:
        temperature: the sampling temperature; the policy is ``softmax(logits / temperature)``.
        loss: the trainer's loss with all its settings, which set the coefficient of every update token: a member of
            :func:`entropy_probe.losses.trainers`, or its settings by name: ``{trainer: trl, loss_type: dapo}``.
        loss_type: short for a loss of TRL with default settings; not beside ``loss``.
        max_completion_length: the trainer's generation limit in tokens; needed by ``dr_grpo``.
        max_grad_norm: the trainer's clipping threshold; ``None`` for no clipping.
        learning_rate: replaces the optimizer's rate in every group; ``None`` keeps each group's own.
        geometry: ``adamw`` predicts the optimizer's real next step, whatever its class; ``frozen`` the step
            ``-lr P g`` with Adam's second moment held fixed, without momentum, weight decay or clipping.
        normalization: entropies per ``token`` or per ``sequence``.
        entropy: ``rao_blackwell`` uses exact next-token entropies, ``surprisal`` minus the sampled log-probabilities.
        realized: how the realized change is estimated. ``per_decision`` always uses exact entropies.
        horizon: which point of the profile over horizons (:class:`~entropy_probe.Horizons`) states the change: the
            whole response where it is told from 0, else the shortest that no longer one contradicts (``auto``), or
            this many tokens. A number is the horizon of attribution and sweeps too; by default attribution takes the
            shortest whose contributions correlate at least 0.99 with the whole response's. ``None`` is the whole
            response everywhere, and leaves the profile out, which saves one scoring of the evaluation batch.
        coast: also measure what momentum alone will still do, by steps with zero gradients on copies of parameters and
            optimizer until they end. Costs one more scoring of the evaluation batch, and another with weight decay.
            One batch takes such steps without each prompt, too.
        evaluation_unit: what is independent in the evaluation batch: ``sequence`` (prompts drawn with replacement,
            one response per draw), ``prompt`` (distinct prompts with a group of responses each), or ``auto``:
            ``prompt`` if every prompt has the same number of responses, at least 2 (with fewer than 8 prompts, in
            consecutive rows); else ``sequence``. Rows of one trajectory (``Rollouts.trajectory_ids``) are one sequence.
        merge_equal_prompts: prompts with the same tokens are one prompt, whatever their ids. Responses to one prompt
            depend on each other through it, so counting them as several makes errors too small, and a one-batch
            prediction keeps products of a prompt with itself. The trainer's groups (``per_prompt_max``) stay as given.
        is_mode: the weights of ``snis``: as they are, capped (``clip``), or Pareto-smoothed (``psis``).
        log_weight_clamp: clamp the log-weights of ``snis`` to plus and minus this, in nats.
        weight_clip: the cap of ``clip`` in units of the mean weight; ``None`` is the root of the number of sequences.
        min_ess_fraction: below this share of effective samples the weights are not trusted; those of a reweighted
            batch count.
        on_low_ess: what to do then, or when the weights' tail is too heavy (Pareto k above its threshold): ``refuse``
            gives no realized change; ``psis`` gives that of Pareto-smoothed weights if their tail allows it;
            ``resample`` samples fresh responses after the step, for which the probe needs a ``resample`` function.
        on_mismatch: what to do when a batch does not fit the policy (its surprisal minus entropy is more than 4 of its
            errors from 0, or the mean ``|delta log pi|`` per token to the sampler's own log-probabilities exceeds
            ``max_mismatch``): ``report`` notes it; ``refuse`` is an error; ``reweight`` weights each evaluation
            sequence by ``pi / pi_sampler``, for which the sampler's log-probabilities must be those it really drew
            with. The update batch is taken as it is, as in training.
        max_mismatch: in nats per token; engines in bfloat16 differ by about a tenth of the default. Rollouts whose
            root mean square is above 0.7 of it, and three times what rounding to bfloat16 does to this policy, do not
            fit either. 0 beside ``reweight`` weights whatever the distance is, for rollouts whose log-probabilities are
            known to be right: nothing else is looked for that may explain it.
        update_selected: update responses were kept or dropped by what they are (prompts whose rewards are all equal,
            truncated responses), which moves their surprisal: they are not held against the policy for it.
        frozen_max_scale: upper clamp on the frozen preconditioner.
        checkpoint_step: Adam's step count for parameters whose state lacks one, in the frozen preconditioner.
        identity_if_coverage_below: take the identity for the frozen preconditioner if less than this share of the
            elements has a second moment; ``None`` makes less than 0.9 an error.
        one_batch_units: what the cross-prompt statistic treats as a unit: every prompt (``exact``), blocks of prompts
            (``block``), or ``auto``: blocks once there are more than 128 prompts.
        block_size: prompts per block; must divide their number. ``None`` gives the smallest size above 1 that makes
            16 to 128 blocks; where there is none, ``auto`` takes every prompt.
        max_tokens_per_microbatch: bound on padded tokens per forward pass; ``None`` takes what the model's layers and
            the machine's memory have room for (:func:`~entropy_probe.scoring.memory.fitting_tokens`). No number depends
            on it but by rounding.
        max_stored_gradient_gib: per-prompt gradients of the update batch are kept in host memory up to this size;
            beyond it a second pass over the update batch takes their place.
        dtype: the least precision of the model's parameters; a model in a lower one is refused.
        step_dtype: the precision that the trainer keeps its weights in, and so rounds every step to: ``bfloat16``,
            ``float16``, or ``float32``, which a trainer adds its steps to that keeps a float32 copy (in the optimizer,
            or under autocast). ``auto`` takes a 16-bit type where the weights are numbers of it and the optimizer's
            state is in it. Whatever it is, ``dtype`` is what scores are computed in.
        autocast: run the model under autocast in ``bfloat16``, as some trainers do. Realized changes of small steps
            drown in its rounding.
        measure_noise_floor: score some evaluation sequences again after tiny opposite moves, to learn what rounding
            does to the realized change.
    """

    temperature: float = Field(default=1.0, gt=0)
    loss: SerializeAsAny[Loss] = Field(default_factory=default_loss)
    loss_type: str | None = Field(default=None, exclude=True)
    max_completion_length: int | None = Field(default=None, gt=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)
    geometry: Literal["adamw", "frozen"] = "adamw"
    normalization: Normalization = "token"
    entropy: EntropyKind = "rao_blackwell"
    realized: Literal["per_decision", "snis"] = "per_decision"
    horizon: Annotated[int, Field(ge=0)] | Literal["auto"] | None = "auto"
    coast: bool = False
    evaluation_unit: Literal["auto", "sequence", "prompt"] = "auto"
    merge_equal_prompts: bool = True
    is_mode: ImportanceMode = "snis"
    log_weight_clamp: float | None = Field(default=None, gt=0)
    weight_clip: float | None = Field(default=None, ge=1)
    min_ess_fraction: float = Field(default=0.5, ge=0, le=1)
    on_low_ess: Literal["refuse", "psis", "resample"] = "refuse"
    on_mismatch: Literal["report", "refuse", "reweight"] = "report"
    max_mismatch: float = Field(default=0.05, ge=0)
    update_selected: bool = False
    frozen_max_scale: float = Field(default=1e3, gt=0)
    checkpoint_step: int | None = Field(default=None, gt=0)
    identity_if_coverage_below: float | None = Field(default=None, ge=0, le=1)
    one_batch_units: Literal["auto", "exact", "block"] = "auto"
    block_size: int | None = Field(default=None, gt=0)
    max_tokens_per_microbatch: int | None = Field(default=None, gt=0)
    max_stored_gradient_gib: float = Field(default=2.0, ge=0)
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    step_dtype: StepDtype = "auto"
    autocast: Literal["off", "bfloat16"] = "off"
    measure_noise_floor: bool = True

    @model_validator(mode="before")
    @classmethod
    def _build_loss(cls, settings: Any) -> Any:
        """The loss from its settings or its short form, with the largest length of the probe where it takes one."""
        if not isinstance(settings, Mapping):
            return settings
        settings = dict(settings)
        short, loss = settings.pop("loss_type", None), settings.get("loss")
        if short is not None and loss is not None:
            raise ValueError(f"loss_type: expected loss or loss_type, got both; set loss.loss_type to {short!r}")
        if short is not None:
            loss = {"trainer": "trl", "loss_type": short}
        if loss is None:
            loss = default_loss()
        if not isinstance(loss, Loss | Mapping):
            raise ValueError(
                f"loss: expected settings with a trainer, got {loss!r}; write {{trainer: trl, beta: 0.04}}"
            )
        loss = loss if isinstance(loss, Loss) else build_loss(loss)
        own, longest = getattr(loss, LONGEST, None), settings.get(LONGEST)
        if isinstance(longest, int) and longest > 0 and LONGEST in type(loss).model_fields:
            if own is not None and own != longest:
                raise ValueError(f"loss.{LONGEST}: expected {longest}, as {LONGEST} is, got {own}; leave it out")
            loss = loss.model_copy(update={LONGEST: longest})
        return settings | {"loss": loss}

    @field_serializer("loss")
    def _without_longest(self, loss: Loss) -> dict[str, Any]:
        """The loss without what the probe says already, so that one place in a file sets it."""
        said = {LONGEST} if self.max_completion_length is not None else set()
        return loss.model_dump(mode="json", exclude=said)

    @model_validator(mode="after")
    def _check_weight_options(self) -> ProbeConfig:
        for name in ("is_mode", "log_weight_clamp"):
            value = getattr(self, name)
            if self.realized != "snis" and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}: expected realized: snis beside it, got {self.realized}; it changes nothing else"
                )
        if self.coast and self.geometry == "frozen":
            raise ValueError(
                "coast: expected geometry: adamw beside it, got frozen, which has no momentum; leave it out"
            )
        if self.weight_clip is not None and self.is_mode != "clip":
            raise ValueError(f"weight_clip: expected is_mode: clip beside it, got {self.is_mode}")
        return self
