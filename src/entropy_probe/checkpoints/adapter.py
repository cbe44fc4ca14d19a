"""What ``adapter_config.json`` says: the kind of adapter, its numbers, and the base model it belongs on."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.directory import read_json
from entropy_probe.checkpoints.errors import (
    InvalidValueError,
    MismatchError,
    MissingFileError,
    UnsafeFileError,
    UnsupportedError,
)

__all__ = ["find_base", "read_adapter_config", "starting_at_zero"]


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
        CheckpointError: if it is damaged, not LoRA, asks for a module to be imported, or has an impossible scale.
    """
    file = path / "adapter_config.json"
    config = read_json(file)
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


def starting_at_zero(config: dict[str, Any], names: tuple[str, ...]) -> dict[str, str]:
    """The trained parameters that start at 0, with their names in the adapter's file.

    ``lora_B``, and ``lora_embedding_A`` in an embedding, unless the adapter was initialised from the base's weights.
    """
    if config.get("init_lora_weights", True) not in (True, "gaussian"):
        return {}
    zero = re.compile(r"\.lora_B\.default\.weight$|\.lora_embedding_A\.default$")
    return {name: name.replace(".default", "") for name in names if zero.search(name)}


def find_base(path: Path, given: str | Path | None, recorded: Any) -> str:
    """The base model's directory, or its name when it looks like one of the hub's.

    A name that the checkpoint records may be absolute, as peft writes it, or relative to the working directory, the
    checkpoint and its parents; but it may not climb with ``..``, which only the user may.

    Args:
        path: the checkpoint.
        given: what the user passed.
        recorded: what ``adapter_config.json`` says.

    Raises:
        CheckpointError: if there is no name, no model at it, or it climbs.
    """
    file = path / "adapter_config.json"
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
    for found in places:
        if (found / "adapter_config.json").is_file():
            raise MismatchError(f"{found}: expected a base model, got an adapter; pass the model under both")
        if (found / "config.json").is_file():
            return str(found)
    if place.is_absolute() or str(name).startswith((".", "~")) or len(place.parts) > 2:
        raise MissingFileError(
            f"{name}: expected the base model's directory, found no config.json in it; pass base_model"
        )
    return str(name)
