"""What does not keep a checkpoint from loading but should be read before its numbers are used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from entropy_probe.checkpoints.adapters import starting_at_zero
from entropy_probe.checkpoints.optimizers import ADAMW_8BIT
from entropy_probe.results.note import NOTHING_TO_DO, Note, NoteKind
from entropy_probe.steps.moments import unmoved_adapter

if TYPE_CHECKING:
    from entropy_probe.checkpoints.examine import Examined
    from entropy_probe.checkpoints.optimizer_file import SavedOptimizer

LARGE_LEARNING_RATE = 0.1
SMALL_LEARNING_RATE = 1e-15
"""No schedule ends so low but at 0, and no weight moves by it."""
LARGE_EPS = 1e-3
LARGE_UNSCALED = {"SGD": 100.0, "Adadelta": 100.0}
"""Optimizers whose learning rate is not about the size of an element's step, so that only a far larger one is odd."""
UNUSABLE = NoteKind("unusable", "{reason}", "Nothing can be computed from this checkpoint until that is put right.")
EXCHANGED = NoteKind(
    "moments_exchanged",
    "the optimizer state of {parameters} seems exchanged{more}: the weights have moved along each other's moments, not "
    "their own; the entries are in another order than the mapping says",
    "Do not use these numbers: record a manifest during training, which maps entries by name.",
)
RATE_IS_ZERO = NoteKind(
    "learning_rate_zero",
    "learning rate is 0, as after a finished schedule; set probe.learning_rate",
    "Set probe.learning_rate to that of the step you ask about; a sweep has rates of its own.",
)
RATE_IS_LARGE = NoteKind(
    "learning_rate_large",
    "learning rate {rate:g} is above {bound:g}; check it",
    "Make sure that the rate is meant; probe.learning_rate sets another.",
)
RATE_IS_SMALL = NoteKind(
    "learning_rate_small",
    "learning rate {rate:g} is below {bound:g}, by which no weight moves; check it",
    "Set probe.learning_rate to that of the step you ask about.",
)
EPS_IS_LARGE = NoteKind(
    "eps_large",
    "eps {eps:g} is above {bound:g}, larger than most gradients: the step is hardly scaled by the second moment",
    "Make sure that the trainer's eps is meant (1e-8 by default).",
)
BETAS_EXCHANGED = NoteKind(
    "betas_exchanged",
    "betas ({first:g}, {second:g}): the first moment remembers longer than the second; exchanged?",
    "Make sure that the trainer's betas are meant ((0.9, 0.999) by default).",
)
ZERO_FIRST_MOMENTS = NoteKind(
    "zero_first_moments",
    "exp_avg is all zero for {parameters} of {of} parameters whose exp_avg_sq is not: no training leaves that, and the "
    "step would lack its momentum",
    "Do not use these numbers: copy the checkpoint again, or look for what reset the state.",
)
ZERO_MOMENTS = NoteKind(
    "zero_moments",
    "exp_avg_sq is all zero for {share:.0%} of the elements; normal for lora_A after the first step and for embeddings "
    "of tokens that never occurred; otherwise these parameters were not trained",
    "Compare with a later checkpoint; frozen or unused parts may be left out of training.",
)
STEPS_DIFFER = NoteKind(
    "steps_differ",
    "step counts differ between parameters ({least} to {most}); some were not always trained",
    "Make sure that the late starters were unfrozen on purpose.",
)
TWO_SAVES = NoteKind(
    "two_saves",
    "optimizer.pt is at step {optimizer}, trainer_state.json at {trainer}; files of two saves?",
    "Do not mix files of different saves: copy the checkpoint again.",
)
DECAY_UNKNOWN = NoteKind(
    "weight_decay_unknown",
    "the file does not say whether weight decay is decoupled; taken as AdamW, the Trainer's",
    "Right for the Trainer's AdamW; else record a manifest during training.",
)
OTHER_BASE = NoteKind(
    "other_base_model",
    "the adapter was trained on {recorded}, the base model given is {given}; with other weights of the same shapes "
    "every number is wrong, and only a manifest could tell",
    "Give the base model that it was trained on, and record a manifest.",
)
OTHER_MODEL = NoteKind(
    "other_model_in_optimizer",
    "{count:.0f} entries of the optimizer belong to another model that it steps too, such as PPO's value model; they "
    "are set aside, and so is their gradient, which the trainer clips together with the policy's",
    "Where clipping was active, set probe.max_grad_norm to what it left of the policy's gradient.",
)
EMBEDDINGS_ALONG = NoteKind(
    "embeddings_along",
    "the embeddings ({rows:.0f} rows) are those that were saved, not the base model's ({base_rows:.0f} rows)",
    NOTHING_TO_DO,
)
EMBEDDINGS_CHANGED = NoteKind(
    "embeddings_changed",
    "the embeddings that were saved with the adapter, which did not train them, differ from the base model's in "
    "{changed:.0f} of {rows:.0f} rows that both have: another base model, one that was resized once more, or "
    "embeddings that were trained before",
    "Give the base model that the adapter was trained on; with another one every number is wrong.",
)
EIGHT_BIT = NoteKind(
    "eight_bit_state",
    "the moments are stored in 8 bits: the step is AdamW's from the dequantised ones, which is the step that "
    "bitsandbytes takes, to 1e-5 of it; that it quantises them again afterwards changes later steps only",
    NOTHING_TO_DO,
)


def remarks_on(examined: Examined) -> Iterator[Note]:
    """A note for what should be known though nothing speaks against the checkpoint."""
    if examined.saved.kind is ADAMW_8BIT:
        yield EIGHT_BIT()
    along = examined.model.along
    if along is not None and not along.changed:
        yield EMBEDDINGS_ALONG(rows=along.rows, base_rows=along.base_rows)


def doubts_about(examined: Examined) -> Iterator[Note]:
    """A note for each doubt, the gravest first."""
    saved, state = examined.saved, examined.state
    if examined.movement is not None and (cycles := examined.movement.exchanged):
        names = " and ".join(cycles[0][:2]) + (f" and {len(cycles[0]) - 2} others" if len(cycles[0]) > 2 else "")
        yield EXCHANGED(parameters=names, more=f" and {len(cycles) - 1} more" if len(cycles) > 1 else "")
    if examined.num_others:
        yield OTHER_MODEL(count=examined.num_others)
    if unmoved := _unmoved(examined):
        yield unmoved
    rates = [group["lr"] for group in saved.groups if group["params"]]
    if not any(rates):
        yield RATE_IS_ZERO()
    large = LARGE_UNSCALED.get(saved.kind.name, LARGE_LEARNING_RATE)
    if max(rates) > large:
        yield RATE_IS_LARGE(rate=max(rates), bound=large)
    if 0 < max(rates) < SMALL_LEARNING_RATE:
        yield RATE_IS_SMALL(rate=max(rates), bound=SMALL_LEARNING_RATE)
    yield from _odd_settings(saved)
    if saved.is_adam and (zero := _without_first_moment(saved)):
        yield ZERO_FIRST_MOMENTS(parameters=zero, of=saved.num_parameters)
    if saved.is_adam and state.coverage < 1:
        yield ZERO_MOMENTS(share=1 - state.coverage)
    low, high = state.steps
    if low != high:
        yield STEPS_DIFFER(least=low, most=high)
    if examined.global_step is not None and examined.global_step != high and saved.count("step"):
        yield TWO_SAVES(optimizer=high, trainer=examined.global_step)
    yield from examined.format.doubts(examined.path)
    if saved.is_adam and any(g["weight_decay"] and "decoupled_weight_decay" not in g for g in saved.groups):
        yield DECAY_UNKNOWN()
    yield from _doubts_about_base(examined)


def _unmoved(examined: Examined) -> Note | None:
    """Whether an adapter is as training began."""
    model, saved, names = examined.model, examined.saved, examined.mapping.names
    if model.adapter is None or not saved.is_adam:
        return None
    tensors, masters = model.weights.tensors, examined.masters
    inside = starting_at_zero(model.adapter.config, names, model.adapter.name)
    return unmoved_adapter(
        (masters.get(name, tensors[inside[name]]).read(), saved.state.get(index, {}))
        for index, name in enumerate(names)
        if inside.get(name) in tensors
    )


def _odd_settings(saved: SavedOptimizer) -> Iterator[Note]:
    """Settings that are allowed, and that hardly anybody trains with."""
    groups = [group for group in saved.groups if group["params"]]
    eps = max((group["eps"] for group in groups if isinstance(group.get("eps"), float)), default=0.0)
    if eps > LARGE_EPS:
        yield EPS_IS_LARGE(eps=eps, bound=LARGE_EPS)
    pairs = (group["betas"] for group in groups if saved.is_adam)
    exchanged = next((betas for betas in pairs if betas[0] > betas[1]), None)
    if exchanged is not None:
        yield BETAS_EXCHANGED(first=exchanged[0], second=exchanged[1])


def _without_first_moment(saved: SavedOptimizer) -> int:
    """How many parameters have a second moment and no first one, which decays more slowly than it would take."""
    count = 0
    for index in range(saved.num_parameters):
        first, second = (saved.state.get(index, {}).get(key) for key in ("exp_avg", "exp_avg_sq"))
        count += first is not None and second is not None and not _any(first) and _any(second)
    return count


def _any(values: Tensor) -> bool:
    """Whether an element is not 0; most often one of the first is not."""
    flat = values.reshape(-1)
    return bool(flat[:4096].any()) or bool(flat.any())


def _doubts_about_base(examined: Examined) -> Iterator[Note]:
    """Another base model of the same shapes loads without an error and gives wrong numbers."""
    adapter, manifest = examined.model.adapter, examined.manifest
    proven = manifest is not None and manifest.base_model is not None and manifest.base_model.files
    along = examined.model.along
    if along is not None and along.changed:
        yield EMBEDDINGS_CHANGED(changed=along.changed, rows=min(along.rows, along.base_rows))
    if adapter is None or proven:
        return
    recorded = adapter.config.get("base_model_name_or_path")
    if isinstance(recorded, str) and Path(recorded).name.lower() != Path(adapter.base).name.lower():
        yield OTHER_BASE(recorded=recorded, given=adapter.base)
