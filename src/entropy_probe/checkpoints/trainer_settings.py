"""What a trainer wrote down of its own settings: ``training_args.bin`` of the Hugging Face Trainer and of TRL.

The file is a pickle. It is read with :class:`~entropy_probe.checkpoints.safe_read.Inert` in place of whatever it names:
nothing is imported and nothing is called. Of its hundred and more settings those are taken that the loss, the step and
the samples depend on, and no others: some are secrets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.errors import InvalidValueError, UnsupportedError, shown
from entropy_probe.checkpoints.safe_read import Inert, read_inert, read_json

TRAINING_ARGS = "training_args.bin"
ENTROPY_CONTROL = "entropy_ctrl_state.json"

LOSS = (
    *("loss_type", "beta", "use_bias_correction_kl", "epsilon", "epsilon_high", "delta", "importance_sampling_level"),
    *("sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg"),
    *("vespo_lambda_neg", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "entropy_target"),
    *("off_policy_mask_threshold", "use_vllm", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
    *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "num_iterations"),
    *("gradient_accumulation_steps", "steps_per_generation", "max_completion_length", "router_aux_loss_coef"),
)
"""TRL's names of what its losses depend on."""

OTHERS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "num_generations"),
    *("mask_truncated_completions", "scale_rewards", "reward_weights", "multi_objective_aggregation"),
    *("normalize_advantages", "reward_clip_range", "per_device_train_batch_size", "generation_batch_size"),
    *("max_grad_norm", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("max_steps", "num_train_epochs", "optim", "optim_args", "bf16", "fp16", "disable_dropout"),
    *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "use_liger_kernel", "use_liger_loss"),
    "logging_steps",
)
"""What else of the step and of the samples is said there."""

BEFORE: Mapping[str, Any] = {
    "loss_type": "grpo",
    "use_bias_correction_kl": False,
    "vllm_importance_sampling_correction": False,
    "vllm_importance_sampling_mode": "token_truncate",
}
"""What versions of TRL did that have no such setting, where it is not the default of later ones."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_COUNT = "a whole number above 0", lambda value: isinstance(value, int) and _is_number(value) and value > 0
KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("num_iterations", "gradient_accumulation_steps", "steps_per_generation"), _COUNT),
    **dict.fromkeys(("max_completion_length", "num_generations"), _COUNT),
    **dict.fromkeys(("per_device_train_batch_size", "generation_batch_size"), _COUNT),
    **dict.fromkeys(("temperature", "max_grad_norm"), ("a number", _is_number)),
    "scale_rewards": ("a word", lambda value: isinstance(value, str | bool)),
    "reward_weights": ("numbers", lambda value: isinstance(value, list) and all(map(_is_number, value))),
}
"""What settings are that more is done with than to hand them to a loss, which has checks of its own."""

GRPO, RLOO, GMPO = "GRPO", "RLOO", "GMPO"
_LOOPS = ("TrainingArguments", "Seq2SeqTrainingArguments")
_OTHER_LOSSES = re.compile(r"DPO|KTO|CPO|ORPO|BCO|SFT|SDFT|GKD|GOLD|PPO|Reward|Distil|Nash|XPO|PRM|TPO")
MOST_TEXT = 200


@dataclass(frozen=True)
class TrainerSettings:
    """What a trainer says of its loss and step."""

    file: Path  # where it says so
    trainer: str  # the class that the file is of, or the trainer
    # settings by the trainer's own names: numbers, words, None, and lists and mappings of these
    values: Mapping[str, Any]
    # those of the loss, as ``ProbeConfig(loss=...)`` takes them; None where the class does not tell the loss
    loss: Mapping[str, Any] | None
    other_loss: bool  # whether the class tells one that is not modelled


def read_training_args(path: Path) -> TrainerSettings | None:
    """The settings in a checkpoint directory of the Hugging Face Trainer; None where the file is missing."""
    file = path / TRAINING_ARGS
    if not file.is_file():
        return None
    remedy = "copy the checkpoint again, or delete the file and give the trainer's settings in the config"

    def build(args: Any) -> TrainerSettings:
        if not isinstance(args, Inert) or not isinstance(args.state, dict) or plain(args.named) is ...:
            raise UnsupportedError(f"{file}: expected the trainer's arguments, got {shown(args)}; {remedy}")
        control = path / ENTROPY_CONTROL
        return _settings(file, args.named, args.state, lambda: read_json(control) if control.is_file() else {}, remedy)

    return read_inert(file, f"archive of settings ({TRAINING_ARGS})", build, remedy)


def live_settings(args: Any, entropy_control: Mapping[str, Any]) -> TrainerSettings:
    """The settings of a trainer that is running, with ``entropy_coef`` and ``last_world_entropy`` as they are now."""
    named = f"{type(args).__module__}.{type(args).__qualname__}"
    return _settings(Path("trainer.args"), named, vars(args), lambda: entropy_control, "correct it")


def _settings(
    file: Path, named: str, state: Mapping[str, Any], control: Callable[[], Mapping[str, Any]], remedy: str
) -> TrainerSettings:
    values = {name: plain(state[name]) for name in (*LOSS, *OTHERS) if name in state}
    check_kinds(file, values, state, remedy)
    kind = _kind(named, values)
    loss = None if kind is None else _loss(kind, values, state, control)
    return TrainerSettings(file, named, values, loss, kind is None and not _is_a_loop(named))


def check_kinds(file: Path, values: Mapping[str, Any], told: Mapping[str, Any], remedy: str) -> None:
    """Check that settings are plain, and those that more is done with of their kind; ``told`` is what stood there."""
    for name, value in values.items():
        wanted, fits = KINDS.get(name, ("a finite number or a word", lambda value: value is not ...))
        if value is not None and not fits(value):
            raise InvalidValueError(f"{file}: {name}: expected {wanted}, got {shown(told[name])}; {remedy}")


def plain(value: Any, depth: int = 0) -> Any:
    """A setting as plain data; ``...`` for what is none."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if abs(value) < 2**63 and math.isfinite(value) else ...
    if isinstance(value, str):
        return value if len(value) <= MOST_TEXT and value.isprintable() else ...
    if isinstance(value, type) and issubclass(value, Inert):
        return plain(value.named)
    if isinstance(value, Inert):  # a member of an enumeration, made from its value
        return plain(value.arguments[0]) if len(value.arguments) == 1 and isinstance(value.arguments[0], str) else ...
    if depth == 2 or not isinstance(value, list | tuple | dict) or len(value) > MOST_TEXT:
        return ...
    if isinstance(value, dict):
        inside = {key: plain(item, depth + 1) for key, item in value.items() if isinstance(key, str)}
        return {key: item for key, item in inside.items() if item is not ... and key.isprintable()}
    items = [plain(item, depth + 1) for item in value]
    return ... if any(item is ... for item in items) else items


def _is_a_loop(trainer: str) -> bool:
    """Whether the class is one that people write loops of any loss with."""
    module, _, name = trainer.rpartition(".")
    return name in _LOOPS or not (module.startswith("trl.") or _OTHER_LOSSES.search(name))


def _kind(trainer: str, values: Mapping[str, Any]) -> str | None:
    """Which of TRL's losses a class is of, derived ones by their name or their settings; None for none of them."""
    module, _, name = trainer.rpartition(".")
    if name.endswith("GMPOConfig"):
        return GMPO
    if module.startswith("trl.experimental"):
        return None
    if "GRPO" in name or "RLOO" in name:
        return RLOO if "RLOO" in name else GRPO
    known = {"loss_type", "epsilon", "num_generations"} <= values.keys()
    return GRPO if known and not _OTHER_LOSSES.search(name) else None


def _loss(
    kind: str, values: Mapping[str, Any], state: Mapping[str, Any], control: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    loss = {"trainer": "trl", **BEFORE, **{name: values[name] for name in LOSS if name in values}}
    if kind != GRPO:
        loss["loss_type"] = kind.lower()
    if "vllm_importance_sampling_clip_max" not in values:  # called a cap before
        loss["vllm_importance_sampling_clip_max"] = plain(state.get("vllm_importance_sampling_cap"))
    microbatch, rows = values.get("per_device_train_batch_size"), values.get("generation_batch_size")
    if microbatch and rows:
        at_once = microbatch * (loss.get("steps_per_generation") or loss.get("gradient_accumulation_steps") or 1)
        loss["num_processes"] = max(1, rows // at_once)
    if loss.get("use_adaptive_entropy"):
        kept = {key: plain(value) for key, value in control().items() if key in ("entropy_coef", "last_world_entropy")}
        loss |= {key: value for key, value in kept.items() if value is not ...}
    return loss
