"""A checkpoint directory before anything in it is opened: is it one, and does everything in it stay in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.errors import (
    DamagedFileError,
    InvalidValueError,
    MismatchError,
    MissingFileError,
    UnsafeFileError,
)

__all__ = ["check_layers", "open_directory", "read_global_step", "read_json", "refuse_remote_kernels"]


def open_directory(path: Path) -> Path:
    """The checkpoint directory, none of whose entries leads outside or could block.

    A link may point within the directory, or into ``blobs/`` of the Hugging Face cache the directory is in.

    Raises:
        MissingFileError: if ``path`` is not a checkpoint directory.
        UnsafeFileError: if an entry leads outside, or is neither a file nor a directory.
    """
    if not path.is_dir():
        raise MissingFileError(f"{path}: expected a checkpoint directory, found none; check the path")
    if not ((path / "adapter_config.json").is_file() or (path / "config.json").is_file()):
        inside = sorted(p.name for p in path.glob("checkpoint-*") if p.is_dir())
        hint = f"pass one of {', '.join(inside[-3:])} inside it" if inside else "pass a checkpoint-N of the Trainer"
        raise MissingFileError(f"{path}: expected adapter_config.json or config.json, found neither; {hint}")
    allowed = [path.resolve(), *_cache_blobs(path)]
    for entry in sorted(path.rglob("*")):
        target = entry.resolve()
        if entry.is_symlink() and not any(target.is_relative_to(root) for root in allowed):
            raise UnsafeFileError(
                f"{entry}: expected a file of the checkpoint, got a link to {target} outside it; replace it by a copy "
                "if you trust it"
            )
        if target.exists() and not (target.is_file() or target.is_dir()):
            raise UnsafeFileError(f"{entry}: expected a file, got a pipe or device; delete it")
    return path


def _cache_blobs(path: Path) -> Iterator[Path]:
    """Where the links of a Hugging Face cache point: ``<repo>/blobs`` beside ``<repo>/snapshots/<revision>``."""
    for parent in (path.absolute(), *path.absolute().parents):
        if parent.parent.name == "snapshots":
            yield (parent.parent.parent / "blobs").resolve()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        DamagedFileError: if the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: expected JSON, got: {error}; copy the checkpoint again") from error
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path}: expected a JSON object, got {type(value).__name__}; copy the checkpoint again")
    return value


def read_global_step(path: Path) -> int | None:
    """Optimizer steps taken, from ``trainer_state.json``; None when the file is not there.

    Raises:
        CheckpointError: if the file is damaged or its step is no count.
    """
    file = path / "trainer_state.json"
    if not file.is_file():
        return None
    step = read_json(file).get("global_step")
    if type(step) is not int or step < 0:
        raise InvalidValueError(
            f"{file}: global_step: expected a whole number, got {step!r:.60}; copy the checkpoint again"
        )
    return step


def refuse_remote_kernels(file: Path) -> None:
    """Refuse a ``config.json`` that names an implementation to be fetched from the hub and run.

    Raises:
        CheckpointError: if it does, or is not JSON.
    """
    waiting: list[Any] = [read_json(file)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        if not isinstance(value, dict):
            continue
        for key, inner in value.items():
            if key.removesuffix("_internal").endswith("_implementation"):
                names = inner.values() if isinstance(inner, dict) else [inner]
                if any(isinstance(name, str) and "/" in name for name in names):
                    raise UnsafeFileError(
                        f"{file}: {key}: expected a built-in implementation, got {inner!r:.80}, code to be fetched "
                        "from the hub; remove the key"
                    )
            waiting.append(inner)


def check_layers(file: Path, layers: Any, num_tensors: int) -> None:
    """Refuse a configuration that declares more layers than its weight files have tensors.

    Raises:
        CheckpointError: if it does; building such a model could take forever.
    """
    if type(layers) is int and layers > num_tensors:
        raise MismatchError(
            f"{file}: num_hidden_layers: expected at most the {num_tensors} tensors of the weights, got {layers}; "
            "pass intact weights with their own configuration"
        )
