"""Model weights of a checkpoint: where they are, whether they fit the model, and whether the model got them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from entropy_probe.checkpoints.errors import CheckpointError

__all__ = [
    "check_finite",
    "check_loaded",
    "check_shapes",
    "read_dtypes",
    "read_json",
    "read_shapes",
    "unchanged",
    "weight_files",
]

Shape = tuple[int, ...]


def read_json(path: Path) -> dict:
    """A JSON object from a file of the checkpoint.

    Raises:
        CheckpointError: if the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected JSON, got: {error}; copy the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}; copy the checkpoint again")
    return value


def weight_files(directory: Path, stem: str) -> list[Path]:
    """The safetensors files of ``{stem}.safetensors`` or of its sharded index.

    Raises:
        CheckpointError: if there are none, or one named by the index is missing.
    """
    whole, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise CheckpointError(
            f"{whole}: expected safetensors weights, found no such file nor an index; "
            "weights saved as pickles (.bin) are not read, save them again with safe_serialization=True"
        )
    shards = read_json(index).get("weight_map")
    if not (isinstance(shards, dict) and shards and all(isinstance(name, str) for name in shards.values())):
        raise CheckpointError(f"{index}: expected a 'weight_map' of tensor names to files; copy the checkpoint again")
    files = [directory / name for name in sorted(set(shards.values()))]
    for path in files:
        if path.parent != directory or not path.is_file():
            raise CheckpointError(f"{path}: expected the shard that {index.name} names; copy the checkpoint again")
    return files


def _open(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected safetensors, got: {error}; copy the checkpoint again") from error


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
        raise CheckpointError(
            f"{path}: expected {len(expected)} tensors, {len(missing)} missing {missing[:2]}, {len(unknown)} "
            f"unknown {unknown[:2]}; pass intact weights with their own configuration and base model"
        )
    wrong = [name for name in expected if found[name] != expected[name]]
    if wrong:
        raise CheckpointError(
            f"{path}: {wrong[0]}: expected shape {list(expected[wrong[0]])}, got {list(found[wrong[0]])} "
            f"({len(wrong)} tensors differ); pass the base model and configuration it was trained with"
        )


def check_finite(files: list[Path]) -> None:
    """Check every floating-point tensor of the files, one at a time.

    Raises:
        CheckpointError: naming the first tensor with NaN or infinity.
    """
    for path, name, tensor in _tensors(files):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: {name}: expected finite values, got NaN or infinity; training diverged before the save"
            )


def read_dtypes(files: list[Path]) -> set[torch.dtype]:
    """The types of all tensors of the files."""
    return {tensor.dtype for _, _, tensor in _tensors(files)}


def unchanged(files: list[Path], before: list[Path]) -> set[str]:
    """Names of the tensors that both sets of files hold with the same values, in the precision of the former."""
    earlier: dict[str, Path] = {name: path for path in before for name in read_shapes([path])}
    same = set()
    for _, name, tensor in _tensors(files):
        if name in earlier:
            with _open(earlier[name]) as file:
                if torch.equal(file.get_tensor(name).to(tensor.dtype), tensor):
                    same.add(name)
    return same


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
                raise CheckpointError(f"{path}: {name}: expected the model to use it, but it has no such tensor")
            continue
        if not torch.equal(loaded[name].cpu(), tensor.to(loaded[name].dtype)):
            raise CheckpointError(
                f"{path}: {name}: expected the model to hold these values once loaded, but it holds others; the "
                "file has tied weights that differ, or the installed library reads it differently"
            )
