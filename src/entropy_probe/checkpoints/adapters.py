"""The adapters in a checkpoint: which was trained, what its configuration says, on what base model, of how many bits.

Of a 4-bit base model (QLoRA, through bitsandbytes) only the linear layers' weights are quantised, and they never train.
What is loaded: their codes and scales as recorded, everything else and all arithmetic in the precision asked for.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entropy_probe.checkpoints.directory import adapters_of
from entropy_probe.checkpoints.errors import (
    CheckpointError,
    InvalidValueError,
    MappingError,
    MismatchError,
    MissingFileError,
    UnsafeFileError,
    UnsupportedError,
)
from entropy_probe.checkpoints.safe_read import read_json

_REFERENCE = ("ref", "reference")
"""Names of frozen copies that trainers keep for a KL penalty."""


def adapters_trained(names: Iterable[str], adapters: Iterable[str]) -> tuple[str, ...]:
    """Those of some adapters to which parameters belong, by the parameters' names."""
    trained = {match[1] for name in names for match in re.finditer(r"\.(?:lora_\w+|modules_to_save)\.([^.]+)", name)}
    return tuple(adapter for adapter in adapters if adapter in trained)


def trained_adapter(path: Path, asked: str | None = None, recorded: str | None = None) -> tuple[str, Path]:
    """Name and directory of the adapter that was trained; frozen reference copies are left out.

    Where several could be meant, the user (``asked``) or the manifest (``recorded``) has to name one: other files do
    not.
    """
    adapters = adapters_of(path)
    if asked is not None and recorded is not None and asked != recorded:
        raise MismatchError(f"{path}: adapter: expected {recorded!r:.60}, the manifest's, got {asked!r:.60}; pass that")
    name = recorded if asked is None else asked
    if name is not None:
        if name not in adapters:
            raise MissingFileError(
                f"{path}: adapter: expected one of {_listed(adapters)}, got {name!r:.60}; pass one that is there"
            )
        return name, adapters[name]
    candidates = [name for name in adapters if name not in _REFERENCE]
    if len(candidates) != 1:
        raise MappingError(
            f"{path}: expected one trained adapter, got {_listed(candidates) or 'only reference copies'}; pass "
            "adapter=... with the name of the one that was trained"
        )
    return candidates[0], adapters[candidates[0]]


def reference_copy(path: Path) -> str | None:
    """The adapter in which a checkpoint keeps a frozen copy for a KL penalty; ``None`` without one."""
    return next((name for name in adapters_of(path) if name in _REFERENCE), None)


def _listed(names: Iterable[str]) -> str:
    """Names of folders, which may hold any character, for a message of one line."""
    return ", ".join(name if name.isprintable() else ascii(name) for name in names)[:200]


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The configuration of the LoRA adapter in a directory."""
    file = path / "adapter_config.json"
    return check_adapter_config(file, read_json(file))


def check_adapter_config(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an adapter, checked as in :func:`read_adapter_config`; ``file`` is for messages."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"{file}: peft_type: expected 'LORA', got {kind!r:.60}; other adapters are not supported"
        )
    if config.get("megatron_config") is not None:
        raise UnsafeFileError(
            f"{file}: megatron_config: expected nothing, got settings that make peft import a module the file names; "
            "remove the key"
        )
    alphas = {"lora_alpha": config.get("lora_alpha"), **_numbers(config.get("alpha_pattern"))}
    for key, alpha in alphas.items():
        if type(alpha) not in (int, float) or not math.isfinite(alpha) or alpha == 0:
            raise InvalidValueError(
                f"{file}: {key}: expected a finite number other than 0, got {alpha!r:.60}; with such a scale the "
                "adapter does nothing or everything"
            )
    return config


def _numbers(pattern: Any) -> dict[str, Any]:
    return pattern if isinstance(pattern, dict) else {}


def starting_at_zero(config: dict[str, Any], names: tuple[str, ...], adapter: str) -> dict[str, str]:
    """The trained parameters that start at 0, with their names in the adapter's file.

    ``lora_B``, and ``lora_embedding_A`` in an embedding, unless the adapter was initialised from the base's weights.
    The magnitudes of DoRA, ``modules_to_save`` and biases start from the base's weights and are not among them.
    """
    if config.get("init_lora_weights", True) not in (True, "gaussian"):
        return {}
    own = re.escape(adapter)
    zero = re.compile(rf"(\.lora_B)\.{own}(\.weight)$|(\.lora_embedding_A)\.{own}$")
    inside = {name: zero.sub(lambda part: "".join(filter(None, part.groups())), name) for name in names}
    return {name: key for name, key in inside.items() if key != name}


def find_base(path: Path, directory: Path, given: str | Path | None, recorded: Any) -> str:
    """The base model's directory, or its name when it looks like one of the hub's.

    The name that the adapter's configuration has (``recorded``) may be absolute, as peft writes it, or relative to the
    working directory, the checkpoint and its parents; it may not climb with ``..``, which only the user's (``given``)
    may.
    """
    file = directory / "adapter_config.json"
    name = given or recorded
    if not name or not isinstance(name, str | Path) or "\0" in str(name):
        raise MissingFileError(f"{file}: base_model_name_or_path: expected a name, got {name!r:.60}; pass base_model")
    place = Path(name).expanduser() if given else Path(name)
    if not given and ".." in place.parts:
        raise UnsafeFileError(
            f"{file}: base_model_name_or_path: expected a name or a path without '..', got {str(name)!r:.200}; pass "
            "base_model if you trust it"
        )
    places = [place] if place.is_absolute() else [root / place for root in (Path(), path, *path.resolve().parents)]
    for base in places:
        if (base / "adapter_config.json").is_file():
            raise MismatchError(f"{base}: expected a base model, got an adapter; pass the model under both")
        if (base / "config.json").is_file():
            return str(base)
    if place.is_absolute() or str(name).startswith((".", "~")) or len(place.parts) > 2:
        raise MissingFileError(
            f"{name}: expected the base model's directory, found no config.json in it; pass base_model"
        )
    return str(name)


Quantization = Mapping[str, Any]
"""The settings of a ``BitsAndBytesConfig``, as in a model's ``config.json``."""

_SETTINGS = {
    *("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"),
    *("bnb_4bit_quant_storage", "llm_int8_skip_modules"),
}
_CARD = "The following `bitsandbytes` quantization config was used during training:"


@dataclass(frozen=True)
class FourBit:
    """How a base model is quantised."""

    settings: dict[str, Any]  # those of its ``BitsAndBytesConfig``
    stored: bool  # whether its files hold 4-bit weights; else plain ones are quantised while they are loaded


def live_settings(model: nn.Module) -> dict[str, Any] | None:
    """The settings with which the base of a model in training is quantised, as plain values; None for plain weights."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    settings = _plain(config)
    return {key: settings[key] for key in sorted(_SETTINGS | {"quant_method"}) if settings.get(key) is not None}


def _plain(settings: Any) -> dict[str, Any]:
    """Settings as JSON holds them."""
    entries = settings if isinstance(settings, Mapping) else settings.to_dict()
    return {
        key: value
        if isinstance(value, bool | list | None)
        else str(getattr(value, "value", value)).removeprefix("torch.")
        for key, value in entries.items()
    }


def quantization_of(
    base: str, recorded: Any, given: Quantization | None, trained: Quantization | None = None
) -> FourBit | None:
    """The 4-bit settings of a base model; None for plain weights.

    Those ``recorded`` in its ``config.json``, else those with which training quantised it while loading: as ``given``
    by the user, or ``trained`` with by the manifest.
    """
    if given is not None and trained is not None:
        ours, theirs = _plain(given), _plain(trained)
        other = sorted(key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key])
        if other:
            raise MismatchError(
                f"{base}: quantization: expected what training used, {other[0]} {theirs[other[0]]!r:.40}, got "
                f"{ours[other[0]]!r:.40}; leave quantization out, the manifest has it"
            )
    given = trained if given is None and recorded is None else given
    if recorded is not None and given is not None:
        raise MismatchError(f"{base}: is stored quantised already; leave out the quantization that was given")
    chosen = given if recorded is None else recorded
    if chosen is None:
        return None
    settings = dict(chosen if isinstance(chosen, Mapping) else chosen.to_dict())
    method = settings.pop("quant_method", None)
    method = str(getattr(method, "value", method or "bitsandbytes"))
    if method != "bitsandbytes" or settings.get("load_in_4bit") is not True:
        what = f"{method:.60}" if method != "bitsandbytes" else "bitsandbytes without load_in_4bit"
        raise UnsupportedError(
            f"{base}: not supported: weights quantised by {what}; expected bitsandbytes with load_in_4bit, or plain "
            "weights"
        )
    unknown = sorted(map(str, settings.keys() - _SETTINGS)) if given else []
    if unknown:
        raise UnsupportedError(f"{base}: quantization: expected {', '.join(sorted(_SETTINGS))}; unknown {unknown}")
    return FourBit(settings, stored=recorded is not None)


def refuse_unmentioned(directory: Path, quantization: FourBit | None) -> None:
    """Refuse to put an adapter on plain weights if its model card says that the base model was quantised.

    Of the card only one sentence is looked for; nothing in it is run or followed.
    """
    card = directory / "README.md"
    if quantization is None and card.is_file() and _CARD in card.read_text(encoding="utf-8", errors="replace"):
        raise MismatchError(
            f"{card}: says that the base model was quantised in training, but its configuration does not; pass "
            "quantization={'load_in_4bit': True, ...} with the settings listed there"
        )


def load_arguments(base: str, quantization: FourBit | None, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` needs besides, with the arithmetic in ``dtype``."""
    if quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CheckpointError(
            f"{base}: a 4-bit base model needs bitsandbytes, which is not installed; pip install 'entropy-probe[qlora]'"
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedError(
            f"{base}: dtype: a 4-bit base model computes in float32 or bfloat16, got {dtype}; choose one of the two"
        )
    if quantization.stored:
        return {}
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(**{**quantization.settings, "bnb_4bit_compute_dtype": dtype})}


def set_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Everything but the 4-bit codes in ``dtype``, and the arithmetic with the dequantised weights too.

    On processors with AVX512-BF16 that takes switching off bitsandbytes' repacking of weights on the first evaluation,
    whose kernel computes in bfloat16 and has no gradient.
    """
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            module.compute_dtype, module.compute_type_is_set = dtype, True  # type: ignore[assignment]
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            state.dtype = dtype
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and not hasattr(tensor, "quant_state"):
            tensor.data = tensor.data.to(dtype)
