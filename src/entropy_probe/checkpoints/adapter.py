"""The adapters in a checkpoint: which one was trained, what its ``adapter_config.json`` says, on what base model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.directory import adapters_of, read_json
from entropy_probe.checkpoints.errors import (
    InvalidValueError,
    MappingError,
    MismatchError,
    MissingFileError,
    UnsafeFileError,
    UnsupportedError,
)

__all__ = [
    "adapters_trained",
    "find_base",
    "read_adapter_config",
    "starting_at_zero",
    "trained_adapter",
]

_REFERENCE = ("ref", "reference")
"""Names of frozen copies that trainers keep for a KL penalty."""


def adapters_trained(names: Iterable[str], adapters: Iterable[str]) -> tuple[str, ...]:
    """Those of some adapters to which parameters belong, by the parameters' names."""
    found = {match[1] for name in names for match in re.finditer(r"\.(?:lora_\w+|modules_to_save)\.([^.]+)", name)}
    return tuple(adapter for adapter in adapters if adapter in found)


def trained_adapter(path: Path, asked: str | None = None, recorded: str | None = None) -> tuple[str, Path]:
    """Name and directory of the adapter that was trained; frozen reference copies are left out.

    Args:
        path: the checkpoint.
        asked: its name, as the user gave it.
        recorded: its name in the manifest. Where several could be meant one of the two is needed, since the other files
            do not say which one was trained.

    Raises:
        CheckpointError: if there is none of that name, the two names differ, or several could be meant and none is
            named.
    """
    found = adapters_of(path)
    if asked is not None and recorded is not None and asked != recorded:
        raise MismatchError(f"{path}: adapter: expected {recorded!r:.60}, the manifest's, got {asked!r:.60}; pass that")
    name = recorded if asked is None else asked
    if name is not None:
        if name not in found:
            raise MissingFileError(
                f"{path}: adapter: expected one of {_listed(found)}, got {name!r:.60}; pass one that is there"
            )
        return name, found[name]
    candidates = [name for name in found if name not in _REFERENCE]
    if len(candidates) != 1:
        raise MappingError(
            f"{path}: expected one trained adapter, got {_listed(candidates) or 'only reference copies'}; pass "
            "adapter=... with the name of the one that was trained"
        )
    return candidates[0], found[candidates[0]]


def _listed(names: Iterable[str]) -> str:
    """Names of folders, which may hold any character, for a message of one line."""
    return ", ".join(name if name.isprintable() else ascii(name) for name in names)[:200]


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The configuration of the LoRA adapter in a directory.

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


def starting_at_zero(config: dict[str, Any], names: tuple[str, ...], adapter: str) -> dict[str, str]:
    """The trained parameters that start at 0, with their names in the adapter's file.

    ``lora_B``, and ``lora_embedding_A`` in an embedding, unless the adapter was initialised from the base's weights.
    The magnitudes of DoRA, ``modules_to_save`` and biases start from the base's weights and are not among them.

    Args:
        config: the adapter's configuration.
        names: the trained parameters.
        adapter: the adapter's name, which is a part of theirs.
    """
    if config.get("init_lora_weights", True) not in (True, "gaussian"):
        return {}
    own = re.escape(adapter)
    zero = re.compile(rf"(\.lora_B)\.{own}(\.weight)$|(\.lora_embedding_A)\.{own}$")
    inside = {name: zero.sub(lambda part: "".join(filter(None, part.groups())), name) for name in names}
    return {name: key for name, key in inside.items() if key != name}


def find_base(path: Path, directory: Path, given: str | Path | None, recorded: Any) -> str:
    """The base model's directory, or its name when it looks like one of the hub's.

    A name that the checkpoint records may be absolute, as peft writes it, or relative to the working directory, the
    checkpoint and its parents; but it may not climb with ``..``, which only the user may.

    Args:
        path: the checkpoint.
        directory: where in it the adapter is.
        given: what the user passed.
        recorded: what ``adapter_config.json`` says.

    Raises:
        CheckpointError: if there is no name, no model at it, or it climbs.
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
