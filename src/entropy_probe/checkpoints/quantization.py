"""A 4-bit base model under a trained adapter (QLoRA), through bitsandbytes.

Only the linear layers' weights are quantised, and they never train. What is loaded: their codes and scales as recorded,
everything else and all arithmetic in the precision that was asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entropy_probe.checkpoints.errors import CheckpointError, MismatchError, UnsupportedError

__all__ = [
    "FourBit",
    "Quantization",
    "live_settings",
    "load_arguments",
    "quantization_of",
    "refuse_unmentioned",
    "set_precision",
]

Quantization = Mapping[str, Any]
"""The settings of a ``BitsAndBytesConfig``, as in a model's ``config.json``."""

_SETTINGS = {
    *("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"),
    *("bnb_4bit_quant_storage", "llm_int8_skip_modules"),
}
_CARD = "The following `bitsandbytes` quantization config was used during training:"


@dataclass(frozen=True)
class FourBit:
    """How a base model is quantised.

    Attributes:
        settings: those of its ``BitsAndBytesConfig``.
        stored: whether its files hold 4-bit weights; else plain ones are quantised while they are loaded.
    """

    settings: dict[str, Any]
    stored: bool


def live_settings(model: nn.Module) -> dict[str, Any] | None:
    """The settings with which the base of a model in training is quantised, as plain values; None for plain weights."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    settings = _plain(config)
    return {key: settings[key] for key in sorted(_SETTINGS | {"quant_method"}) if settings.get(key) is not None}


def _plain(settings: Any) -> dict[str, Any]:
    """Settings as JSON holds them."""
    found = dict(settings if isinstance(settings, Mapping) else settings.to_dict())
    return {
        key: value
        if isinstance(value, bool | list | None)
        else str(getattr(value, "value", value)).removeprefix("torch.")
        for key, value in found.items()
    }


def quantization_of(
    base: str, recorded: Any, given: Quantization | None, trained: Quantization | None = None
) -> FourBit | None:
    """The 4-bit settings of a base model: those in its configuration, else those given; None for plain weights.

    Args:
        base: the base model, for messages.
        recorded: ``quantization_config`` of its ``config.json``.
        given: what training passed when it quantised the base model while loading it.
        trained: the same as the manifest has it.

    Raises:
        CheckpointError: for another method than 4-bit bitsandbytes, both sources at once, or unknown settings.
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

    Raises:
        MismatchError: with what to pass.
    """
    card = directory / "README.md"
    if quantization is None and card.is_file() and _CARD in card.read_text(encoding="utf-8", errors="replace"):
        raise MismatchError(
            f"{card}: says that the base model was quantised in training, but its configuration does not; pass "
            "quantization={'load_in_4bit': True, ...} with the settings listed there"
        )


def load_arguments(base: str, quantization: FourBit | None, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` needs besides, with the arithmetic in ``dtype``.

    Args:
        base: the base model, for messages.
        quantization: its settings; None for plain weights.
        dtype: precision of everything that is not quantised.

    Raises:
        CheckpointError: if bitsandbytes is missing, or does not compute in ``dtype``.
    """
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
