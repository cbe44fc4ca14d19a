"""A checkpoint directory before anything in it is opened: is it one, and does everything in it stay in it."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.errors import (
    DamagedFileError,
    InvalidValueError,
    MismatchError,
    MissingFileError,
    UnsafeFileError,
    UnsupportedError,
)
from entropy_probe.checkpoints.other_trainers import checkpoints_below, whose_directory

__all__ = [
    "adapters_of",
    "check_contained",
    "check_layers",
    "open_directory",
    "optimizer_file",
    "read_global_step",
    "read_json",
    "refuse_remote_code",
    "sharded_model",
    "sharded_optimizer",
]


def open_directory(path: Path) -> Path:
    """The checkpoint directory, of which nothing is known yet but that it is one.

    Raises:
        MissingFileError: if it is not.
    """
    if not path.is_dir():
        raise MissingFileError(f"{path}: expected a checkpoint directory, found none; check the path")
    if any((path / name).is_file() for name in ("config.json", "model.safetensors")):
        return path
    megatron = (path / "common.pt").is_file()  # beside .metadata, of names and shapes of its own
    if not adapters_of(path) and (megatron or sharded_model(path) is None):
        inside = [str(place.relative_to(path)) for place in checkpoints_below(path)]
        if inside:
            raise MissingFileError(
                f"{path}: expected a checkpoint, got a directory of checkpoints; pass one of "
                f"{', '.join(inside[-3:])} inside it"
            )
        _refuse_other_trainers(path, "a checkpoint that is read")
        raise MissingFileError(
            f"{path}: expected adapter_config.json, config.json or weights, found none; pass a checkpoint-N of the "
            "Trainer, or a directory of torch.distributed.checkpoint"
        )
    return path


def adapters_of(path: Path) -> dict[str, Path]:
    """Adapters by name: ``default`` in the checkpoint itself, every other in a folder of its name."""
    found = {"default": path} if (path / "adapter_config.json").is_file() else {}
    folders = [file.parent for file in sorted(path.glob("*/adapter_config.json"))]
    return found | {folder.name: folder for folder in folders if not (folder / "optimizer.pt").is_file()}


def sharded_model(path: Path) -> Path | None:
    """Where ``torch.distributed.checkpoint`` saved a model: in a folder of its own, or in the directory.

    The folder is called ``pytorch_model_fsdp_0`` (accelerate), ``model`` (Miles, slime) or ``weights`` (NeMo-RL).
    """
    return _sharded(path, "pytorch_model_fsdp", "model", "weights")


def sharded_optimizer(path: Path) -> Path | None:
    """The same of an optimizer, in ``optimizer_0`` or ``optimizer``."""
    return _sharded(path, "optimizer", "optimizer")


def _sharded(path: Path, stem: str, *others: str) -> Path | None:
    if (path / f"{stem}_1" / ".metadata").is_file():
        raise UnsupportedError(f"{path / f'{stem}_1'}: not supported: several models or optimizers; save one")
    places = [path / f"{stem}_0", *(path / name for name in others), path]
    return next((place for place in places if (place / ".metadata").is_file()), None)


def optimizer_file(path: Path) -> Path:
    """The optimizer's file: ``optimizer.pt``, or ``optimizer.bin`` as accelerate calls it.

    Raises:
        CheckpointError: if there is neither; where another trainer wrote the directory, its name.
    """
    places = [path / "optimizer.pt", path / "optimizer.bin"]
    found = next((place for place in places if place.is_file()), None)
    if found is not None:
        return found
    _refuse_other_trainers(path, "optimizer.pt")
    raise MissingFileError(
        f"{places[0]}: expected the optimizer's state, found no such file; train with save_only_model=False, or copy "
        "the whole checkpoint again"
    )


def _refuse_other_trainers(path: Path, expected: str) -> None:
    whose = whose_directory(path)
    if whose is not None:
        raise UnsupportedError(f"{path}: expected {expected}, {whose}")


def check_contained(path: Path) -> None:
    """Check that no entry of a directory leads outside or could block.

    A link may point within the directory, or into ``blobs/`` of the Hugging Face cache the directory is in.

    Raises:
        UnsafeFileError: if an entry leads outside, or is neither a file nor a directory.
    """
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


def refuse_remote_code(file: Path, known_types: Container[Any]) -> None:
    """Refuse a ``config.json`` whose model needs code from its directory or the hub.

    Where the library knows the model type itself, ``auto_map`` is ignored: its own class is used.

    Args:
        file: the configuration.
        known_types: the model types that the library implements.

    Raises:
        CheckpointError: if the file needs such code, or is not JSON.
    """
    config = read_json(file)
    if "auto_map" in config and config.get("model_type") not in known_types:
        raise UnsafeFileError(
            f"{file}: auto_map: expected a model type that transformers implements, got "
            f"{config.get('model_type')!r:.60} with code of its own; remote code is never run"
        )
    for key, value in _items(config):
        if key.removesuffix("_internal").endswith("_implementation"):
            names = value.values() if isinstance(value, dict) else [value]
            if any(isinstance(name, str) and "/" in name for name in names):
                raise UnsafeFileError(
                    f"{file}: {key}: expected a built-in implementation, got {value!r:.80}, code to be fetched "
                    "from the hub; remove the key"
                )


def check_layers(file: Path, most: int) -> None:
    """Refuse a configuration of more layers than its weight files have tensors: building it could take forever.

    Args:
        file: the configuration.
        most: the number of tensors, or some bound.

    Raises:
        CheckpointError: if a number of layers anywhere in the file is larger, or it is not JSON.
    """
    for key, value in _items(read_json(file)):
        if key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers") and not (
            value is None or (type(value) is int and 0 < value <= most)
        ):
            raise MismatchError(
                f"{file}: {key}: expected a number up to {most}, the tensors of the weights, got {str(value)[:60]}; "
                "pass intact weights with their own configuration"
            )


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, list):
            waiting += found
        elif isinstance(found, dict):
            yield from found.items()
            waiting += found.values()
