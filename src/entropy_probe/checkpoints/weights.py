"""Model weights of a checkpoint: where they are, whether they fit the model, and whether the model got them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from entropy_probe.checkpoints.errors import (
    DamagedFileError,
    InvalidValueError,
    MismatchError,
    MissingFileError,
    UnsafeFileError,
    UnsupportedError,
)
from entropy_probe.checkpoints.formats import StoredTensor, Weights, weights_of
from entropy_probe.checkpoints.safe_read import is_file_name, read_json

Shape = tuple[int, ...]


def has_weights(directory: Path, stem: str) -> bool:
    """Whether there are weights: safetensors in one file or with an index, or a whole model in another format."""
    safetensors = any((directory / f"{stem}.safetensors{suffix}").is_file() for suffix in ("", ".index.json"))
    return safetensors or (stem == "model" and weights_of(directory) is not None)


def read_weights(directory: Path, stem: str) -> Weights:
    """The tensors of ``{stem}.safetensors`` or of its index, or those of another format."""
    whole, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return safetensors(whole)
    elsewhere = weights_of(directory) if not index.is_file() else None
    if elsewhere is not None:
        checkpoint_format, place = elsewhere
        return checkpoint_format.weights(place)
    if not index.is_file():
        raise MissingFileError(
            f"{whole}: expected safetensors weights, found no such file nor an index; "
            "weights saved as pickles (.bin) are not read, save them again with safe_serialization=True"
        )
    return safetensors(*_shards(directory, index))


def _shards(directory: Path, index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not (isinstance(shards, dict) and shards and all(isinstance(name, str) for name in shards.values())):
        raise DamagedFileError(f"{index}: expected a 'weight_map' of tensor names to files; copy the checkpoint again")
    names = sorted(set(shards.values()))
    for name in names:
        if not is_file_name(name):
            raise UnsafeFileError(f"{index}: expected files beside it, got {name!r}, which is outside; it was not read")
        if not (directory / name).is_file():
            raise MissingFileError(
                f"{directory / name}: expected the shard that {index.name} names; copy the checkpoint again"
            )
    return [directory / name for name in names]


def safetensors(*files: Path) -> Weights:
    """The tensors of safetensors files, from their headers."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, StoredTensor] = {}
    for path in files:
        try:
            file = safe_open(path, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise DamagedFileError(f"{path}: expected safetensors, got: {error}; copy the checkpoint again") from error
        for name in file.keys():  # noqa: SIM118
            shape = tuple(file.get_slice(name).get_shape())
            tensors[name] = StoredTensor(path, shape, partial(file.get_tensor, name))
    return Weights(files, tensors, pretrained=True)


def check_base(frozen: Weights, base: Weights) -> None:
    """Check that the frozen tensors beside an adapter are the base model's, in the lower precision of the two."""
    for path, name, tensor in _tensors(frozen):
        if name not in base.tensors:  # tied
            continue
        other = base.tensors[name].read()
        dtype = min(tensor.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        if tensor.shape != other.shape or not torch.equal(tensor.to(dtype), other.to(dtype)):
            raise MismatchError(
                f"{path}: {name}: expected the frozen base model to be {base.files[0].parent}, got other values; pass "
                "the base model that the adapter was trained on"
            )


def _tensors(weights: Weights) -> Iterator[tuple[Path, str, Tensor]]:
    """Every tensor, read one at a time."""
    for name, stored in weights.tensors.items():
        yield stored.file, name, stored.read()


def check_shapes(path: Path, stored: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Check that a file holds exactly the expected tensors, with their shapes."""
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or unknown:
        remedy = "pass intact weights with their own configuration and base model"
        embeddings = [name for name in unknown if re.search(r"embed|lm_head|wte", name)]
        if not missing and embeddings == unknown:
            rows = ", ".join(f"{stored[name][0]} rows" for name in embeddings[:1])
            remedy = (
                f"peft saved the embeddings along ({rows}), as where the vocabulary was resized, which is not put "
                "back: copy them into the base model resized to as many rows, save that as base_model, and take the "
                "unknown tensors out of this file"
            )
        raise MismatchError(
            f"{path}: expected {len(expected)} tensors, {len(missing)} missing {missing[:2]}, {len(unknown)} "
            f"unknown {unknown[:2]}; {remedy}"
        )
    wrong = [name for name in expected if stored[name] != expected[name]]
    if wrong:
        raise MismatchError(
            f"{path}: {wrong[0]}: expected shape {list(expected[wrong[0]])}, got {list(stored[wrong[0]])} "
            f"({len(wrong)} tensors differ); pass the base model and configuration it was trained with"
        )


def check_finite(weights: Weights, parameters: Collection[str] = ()) -> None:
    """Check every floating-point tensor, one at a time; those of ``parameters`` must be floating point."""
    for path, name, tensor in _tensors(weights):
        whole = name in parameters and not tensor.is_floating_point()
        if whole or tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype.itemsize < 2):
            raise UnsupportedError(f"{path}: {name}: not supported: weights in {tensor.dtype}; save them in float32")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InvalidValueError(
                f"{path}: {name}: expected finite values, got NaN or infinity; training diverged before the save"
            )


def unchanged(weights: Weights, before: Weights) -> set[str]:
    """Names of the tensors that are the same before and now, in the precision of now."""
    return {
        name
        for _, name, tensor in _tensors(weights)
        if name in before.tensors and torch.equal(before.tensors[name].read().to(tensor.dtype), tensor)
    }


MIN_COSINE = 0.5
"""Between weights and those that training started from; of independent ones it is about 0."""
SAMPLED = 2**16
"""Elements of each matrix that are compared, evenly spaced."""


def check_related(weights: Weights, before: Weights, start: str) -> None:
    """Check that weights are near those that training started from, over all matrices."""
    product = own = other = 0.0
    for _, name, tensor in _tensors(weights):
        if name in before.tensors and before.tensors[name].shape == tuple(tensor.shape) and tensor.dim() > 1:
            every = -(-tensor.numel() // SAMPLED)
            a, b = (x.flatten()[::every].double() for x in (tensor, before.tensors[name].read()))
            product, own, other = product + float(a @ b), own + float(a @ a), other + float(b @ b)
    if own and other and product < MIN_COSINE * (own * other) ** 0.5:
        raise MismatchError(
            f"{weights.files[0]}: expected weights near those of {start}, from which training started, got a cosine of "
            f"{product / (own * other) ** 0.5:.2f}; pass the model that it started from, or copy the checkpoint "
            "again if files of ranks may have been swapped"
        )


def check_loaded(weights: Weights, loaded: Mapping[str, Tensor], *, all_names: bool) -> None:
    """Check that a model holds the files' values, by their names there, cast to its own precision."""
    for path, name, tensor in _tensors(weights):
        if name not in loaded:
            if all_names:
                raise MismatchError(f"{path}: {name}: expected the model to use it, but it has no such tensor")
            continue
        if not torch.equal(loaded[name].cpu(), tensor.to(loaded[name].dtype)):
            raise MismatchError(
                f"{path}: {name}: expected the model to hold these values once loaded, but it holds others; the "
                "file has tied weights that differ, or the installed library reads it differently"
            )
