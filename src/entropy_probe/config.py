"""The settings of a probe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from entropy_probe.estimators.first_order import EntropyKind, Normalization
from entropy_probe.losses import LossType

__all__ = ["ProbeConfig"]


class ProbeConfig(BaseModel):
    """How to probe. All fields are keyword arguments and validated; unknown ones are errors.

    Attributes:
        temperature: the sampling temperature; the policy is ``softmax(logits / temperature)``.
        loss_type: the trainer's loss, which sets the weight of every update token.
        max_completion_length: the trainer's generation limit in tokens; needed by ``dr_grpo``.
        max_grad_norm: the trainer's clipping threshold; ``None`` for no clipping.
        learning_rate: replaces the optimizer's rate in every group; ``None`` keeps each group's own.
        geometry: ``adamw`` predicts the optimizer's real next step, whatever its class; ``frozen`` the step
            ``-lr P g`` with Adam's second moment held fixed, without momentum, weight decay or clipping.
        normalization: entropies per ``token`` or per ``sequence``.
        entropy: ``rao_blackwell`` uses exact next-token entropies, ``surprisal`` minus the sampled log-probabilities.
        realized: how the realized change is estimated. ``per_decision`` always uses exact entropies.
        evaluation_unit: what is independent in the evaluation batch: ``sequence`` (prompts drawn with replacement,
            one response per draw), ``prompt`` (distinct prompts with a group of responses each), or ``auto``:
            ``prompt`` if every prompt has the same number of responses, at least 2 (with fewer than 8 prompts, in
            consecutive rows); else ``sequence``.
        min_ess_fraction: below this share of effective samples the realized change is marked ``low_ess``.
        frozen_max_scale: upper clamp on the frozen preconditioner.
        checkpoint_step: Adam's step count for parameters whose state lacks one, in the frozen preconditioner.
        identity_if_coverage_below: take the identity for the frozen preconditioner if less than this share of the
            elements has a second moment; ``None`` makes less than 0.9 an error.
        one_batch_units: what the cross-prompt statistic treats as a unit: every prompt (``exact``), blocks of prompts
            (``block``), or ``auto``: blocks once there are more than 128 prompts.
        block_size: prompts per block; must divide their number. ``None`` gives the smallest size above 1 that makes
            16 to 128 blocks; where there is none, ``auto`` takes every prompt.
        max_tokens_per_microbatch: bound on padded tokens per forward pass.
        max_stored_gradient_gib: per-prompt gradients of the update batch are kept in host memory up to this size;
            beyond it a second pass over the update batch takes their place.
        dtype: the least precision of the model's parameters; a model in a lower one is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(default=1.0, gt=0)
    loss_type: LossType = "dapo"
    max_completion_length: int | None = Field(default=None, gt=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)
    geometry: Literal["adamw", "frozen"] = "adamw"
    normalization: Normalization = "token"
    entropy: EntropyKind = "rao_blackwell"
    realized: Literal["per_decision", "snis"] = "per_decision"
    evaluation_unit: Literal["auto", "sequence", "prompt"] = "auto"
    min_ess_fraction: float = Field(default=0.5, ge=0, le=1)
    frozen_max_scale: float = Field(default=1e3, gt=0)
    checkpoint_step: int | None = Field(default=None, gt=0)
    identity_if_coverage_below: float | None = Field(default=None, ge=0, le=1)
    one_batch_units: Literal["auto", "exact", "block"] = "auto"
    block_size: int | None = Field(default=None, gt=0)
    max_tokens_per_microbatch: int = Field(default=8192, gt=0)
    max_stored_gradient_gib: float = Field(default=2.0, ge=0)
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
