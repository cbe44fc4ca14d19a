"""Model weights of a checkpoint: where they are, whether they fit the model, and whether the model got them.

A file of weights is safetensors, or the index of a sharded directory (``dcp.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.checkpoints.dcp import METADATA, ShardedWeights
from entropy_probe.checkpoints.directory import read_json, sharded_model
from entropy_probe.checkpoints.errors import (
    DamagedFileError,
    InvalidValueError,
    MismatchError,
    MissingFileError,
    UnsafeFileError,
    UnsupportedError,
)

__all__ = [
    "Shape",
    "check_finite",
    "check_loaded",
    "check_shapes",
    "has_weights",
    "is_sharded",
    "read_dtypes",
    "read_shapes",
    "tensor_readers",
    "unchanged",
    "weight_files",
]

Shape = tuple[int, ...]


def has_weights(directory: Path, stem: str) -> bool:
    """Whether there are weights: safetensors in one file or with an index, or of a whole model sharded."""
    safetensors = any((directory / f"{stem}.safetensors{suffix}").is_file() for suffix in ("", ".index.json"))
    return safetensors or (stem == "model" and sharded_model(directory) is not None)


def weight_files(directory: Path, stem: str) -> list[Path]:
    """The safetensors files of ``{stem}.safetensors`` or of its index, or the index of a sharded model.

    Raises:
        CheckpointError: if there are none, or one named by the index is missing.
    """
    whole, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if stem == "model" and not index.is_file() and (sharded := sharded_model(directory)) is not None:
        return [sharded / METADATA]
    if not index.is_file():
        raise MissingFileError(
            f"{whole}: expected safetensors weights, found no such file nor an index; "
            "weights saved as pickles (.bin) are not read, save them again with safe_serialization=True"
        )
    shards = read_json(index).get("weight_map")
    if not (isinstance(shards, dict) and shards and all(isinstance(name, str) for name in shards.values())):
        raise DamagedFileError(f"{index}: expected a 'weight_map' of tensor names to files; copy the checkpoint again")
    files = [directory / name for name in sorted(set(shards.values()))]
    for path in files:
        if path.parent != directory or path.name in ("", ".."):
            raise UnsafeFileError(
                f"{index}: expected files beside it, got {str(path)!r}, which is outside; it was not read"
            )
        if not path.is_file():
            raise MissingFileError(f"{path}: expected the shard that {index.name} names; copy the checkpoint again")
    return files


def is_sharded(files: list[Path]) -> bool:
    """Whether the files are the index of a sharded directory."""
    return files[0].name == METADATA


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if path.name == METADATA:
        return ShardedWeights(path.parent)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise DamagedFileError(f"{path}: expected safetensors, got: {error}; copy the checkpoint again") from error


def read_shapes(files: list[Path]) -> dict[str, Shape]:
    """Tensor names and shapes, from the headers of the files.

    Raises:
        CheckpointError: if a file is damaged.
    """
    shapes: dict[str, Shape] = {}
    for path in files:
        with _open(path) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def tensor_readers(files: list[Path]) -> dict[str, Callable[[], Tensor]]:
    """How to read each tensor of the files, by name."""
    readers: dict[str, Callable[[], Tensor]] = {}
    for path in files:
        file = _open(path)
        readers |= {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
    return readers


def _tensors(files: list[Path]) -> Iterator[tuple[Path, str, Tensor]]:
    for path in files:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118
                yield path, name, file.get_tensor(name)


def check_shapes(path: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Check that a file holds exactly the expected tensors, with their shapes.

    Raises:
        CheckpointError: naming what is missing, unknown or of another shape.
    """
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        remedy = "pass intact weights with their own configuration and base model"
        embeddings = [name for name in unknown if re.search(r"embed|lm_head|wte", name)]
        if not missing and embeddings == unknown:
            rows = ", ".join(f"{found[name][0]} rows" for name in embeddings[:1])
            remedy = (
                f"peft saved the embeddings along ({rows}), as where the vocabulary was resized, which is not put "
                "back: copy them into the base model resized to as many rows, save that as base_model, and take the "
                "unknown tensors out of this file"
            )
        raise MismatchError(
            f"{path}: expected {len(expected)} tensors, {len(missing)} missing {missing[:2]}, {len(unknown)} "
            f"unknown {unknown[:2]}; {remedy}"
        )
    wrong = [name for name in expected if found[name] != expected[name]]
    if wrong:
        raise MismatchError(
            f"{path}: {wrong[0]}: expected shape {list(expected[wrong[0]])}, got {list(found[wrong[0]])} "
            f"({len(wrong)} tensors differ); pass the base model and configuration it was trained with"
        )


def check_finite(files: list[Path]) -> None:
    """Check every floating-point tensor of the files, one at a time.

    Raises:
        CheckpointError: naming the first tensor with NaN or infinity, of complex numbers, or of less than 16 bits.
    """
    for path, name, tensor in _tensors(files):
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype.itemsize < 2):
            raise UnsupportedError(f"{path}: {name}: not supported: weights in {tensor.dtype}; save them in float32")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InvalidValueError(
                f"{path}: {name}: expected finite values, got NaN or infinity; training diverged before the save"
            )


def read_dtypes(files: list[Path]) -> set[str]:
    """The types of all tensors as safetensors names them (``F32``, ``BF16``), from the headers of the files.

    Raises:
        CheckpointError: if a file is damaged.
    """
    types: set[str] = set()
    for path in files:
        with _open(path) as file:
            types |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return types


def unchanged(files: list[Path], before: list[Path]) -> set[str]:
    """Names of the tensors that both sets of files hold with the same values, in the precision of the former.

    Raises:
        CheckpointError: if a file is damaged.
    """
    earlier = tensor_readers(before)
    return {
        name
        for _, name, tensor in _tensors(files)
        if name in earlier and torch.equal(earlier[name]().to(tensor.dtype), tensor)
    }


def check_loaded(files: list[Path], loaded: Mapping[str, Tensor], *, all_names: bool) -> None:
    """Check that a model holds the files' values, cast to its own precision.

    Args:
        files: the weight files.
        loaded: the model's tensors by their name in the files.
        all_names: whether every tensor of the files must be in ``loaded``.

    Raises:
        CheckpointError: naming the first tensor that is absent from the model or differs in it.
    """
    for path, name, tensor in _tensors(files):
        if name not in loaded:
            if all_names:
                raise MismatchError(f"{path}: {name}: expected the model to use it, but it has no such tensor")
            continue
        if not torch.equal(loaded[name].cpu(), tensor.to(loaded[name].dtype)):
            raise MismatchError(
                f"{path}: {name}: expected the model to hold these values once loaded, but it holds others; the "
                "file has tied weights that differ, or the installed library reads it differently"
            )
