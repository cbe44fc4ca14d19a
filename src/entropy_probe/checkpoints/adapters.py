"""The adapters in a checkpoint: which one was trained, and on what base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.errors import CheckpointError
from entropy_probe.checkpoints.weights import read_json

__all__ = ["adapters_of", "find_base", "read_adapter_config", "trained_adapter"]

_REFERENCE = ("ref", "reference")
"""Names of frozen copies that trainers keep for a KL penalty."""


def adapters_of(path: Path) -> dict[str, Path]:
    """Adapters by name, ``default`` in the checkpoint itself, every other in a folder of its name."""
    found = {"default": path} if (path / "adapter_config.json").is_file() else {}
    folders = [file.parent for file in sorted(path.glob("*/adapter_config.json"))]
    return found | {folder.name: folder for folder in folders if not (folder / "optimizer.pt").is_file()}


def trained_adapter(path: Path, asked: str | None = None) -> tuple[str, Path]:
    """Name and directory of the adapter that was trained; frozen reference copies are left out.

    Args:
        path: the checkpoint.
        asked: its name; needed where several could be meant, since the files do not say which one was trained.

    Raises:
        CheckpointError: if there is none of that name, or several and none was asked for.
    """
    found = adapters_of(path)
    if asked is not None:
        if asked not in found:
            raise CheckpointError(f"{path}: adapter: expected one of {', '.join(found)}, got {asked!r}")
        return asked, found[asked]
    candidates = [name for name in found if name not in _REFERENCE]
    if len(candidates) != 1:
        raise CheckpointError(
            f"{path}: expected one trained adapter, got {', '.join(candidates) or 'only reference copies'}; pass "
            "adapter=... with the name of the one that was trained"
        )
    return candidates[0], found[candidates[0]]


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The configuration of a LoRA adapter."""
    config = read_json(path / "adapter_config.json")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path / 'adapter_config.json'}: peft_type: expected 'LORA', got {kind!r}; "
            "other adapters are not supported"
        )
    return config


def find_base(path: Path, name: str | Path | None) -> str:
    """The base model's directory, or its name when it looks like one of the hub's."""
    if not name:
        raise CheckpointError(f"{path / 'adapter_config.json'}: names no base model; pass base_model")
    given = Path(name).expanduser()
    places = [given] if given.is_absolute() else [root / given for root in (Path(), path, *path.resolve().parents)]
    for place in places:
        if (place / "adapter_config.json").is_file():
            raise CheckpointError(f"{place}: expected a base model, got an adapter; pass the model under both")
        if (place / "config.json").is_file():
            return str(place)
    if given.is_absolute() or str(name).startswith((".", "~")) or len(given.parts) > 2:
        raise CheckpointError(
            f"{name}: expected the base model's directory, found no config.json in it; pass base_model"
        )
    return str(name)
