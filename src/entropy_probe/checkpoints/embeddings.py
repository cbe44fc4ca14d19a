"""Embeddings that were saved along an adapter: of a resized vocabulary, or since the adapter is in one of them.

peft saves the embedding and the output layer with an adapter where training resized the vocabulary, where one of them
is adapted, and where it was asked to. They take the place of the base model's, which gets as many rows first.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from entropy_probe.checkpoints.errors import MismatchError
from entropy_probe.checkpoints.formats import Weights

__all__ = ["SavedAlong", "check_covered", "embedding_rows", "resize_embeddings", "saved_along"]

_PREFIX = "base_model.model."
_INSIDE = re.compile(r"\.(?:base_layer|original_module|token_adapter\.base_layer)(?=\.)")
"""How peft calls the module that it wraps."""


@dataclass(frozen=True)
class SavedAlong:
    """Embeddings in an adapter's file that it did not train.

    Attributes:
        rows: how many they have.
        base_rows: how many the base model has.
        changed: rows that both have and that differ from the base model's; 0 where its weights are not local.
    """

    rows: int
    base_rows: int
    changed: int


def embedding_rows(model: Any) -> int:
    """The rows of a model's embedding."""
    return model.get_input_embeddings().weight.shape[0]


def resize_embeddings(model: Any, weights: Weights) -> frozenset[int]:
    """Give a base model's embeddings the rows of those that peft saved along an adapter; without any do nothing.

    New rows are NaN until the adapter's file is loaded over them, so that nothing is computed from one that no file
    has.

    Args:
        model: the base model; it is changed.
        weights: those of the adapter's file.

    Returns:
        The ``id`` of each parameter that was resized.

    Raises:
        MismatchError: if there are several numbers of rows.
    """
    if not weights.pretrained:
        return frozenset()
    layers = _layers(model)
    rows: dict[int, str] = {}
    for key, shape in weights.shapes.items():
        if key.endswith(".weight") and _plain(key.replace(".modules_to_save.", ".")).removesuffix(".weight") in layers:
            rows.setdefault(shape[0], key)
    if len(rows) > 1:
        (some, one), (others, other) = list(rows.items())[:2]
        raise MismatchError(
            f"{weights.files[0]}: expected embeddings of one number of rows, got {some} in {one} and {others} in "
            f"{other}; copy the checkpoint again"
        )
    before = embedding_rows(model)
    if rows.keys() <= {before}:
        return frozenset()
    model.resize_token_embeddings(next(iter(rows)), mean_resizing=False)
    parameters = [parameter for layer in _layers(model).values() for parameter in layer.parameters()]
    for parameter in parameters:
        parameter.data[before:] = torch.nan
    return frozenset(map(id, parameters))


def check_covered(model: nn.Module, resized: Collection[int], weights: Weights) -> None:
    """Check that the file of an adapter has all resized embeddings that the policy computes with.

    Args:
        model: the base model with the adapter.
        resized: what :func:`resize_embeddings` returned for the base model.
        weights: those of the adapter's file.

    Raises:
        MismatchError: naming one that it lacks.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in resized:
            names.setdefault(id(parameter), []).append(name)
    for own in names.values():
        # what an adapter's copy stands for is not computed with
        if not weights.tensors.keys() & set(own) and not all(".original_module." in name for name in own):
            raise MismatchError(
                f"{weights.files[0]}: expected {own[0]} in it, since it has embeddings of other rows than the base "
                "model's, found none; pass as base_model the resized model that training started from, or save with "
                "save_embedding_layers=True"
            )


def saved_along(weights: Weights, frozen: Collection[str], base_rows: int, base: Weights | None) -> SavedAlong | None:
    """What is to be said of embeddings that an adapter did not train; None without any.

    Args:
        weights: those of the adapter's file.
        frozen: the parameters of the base model with the adapter that do not train.
        base_rows: of the base model's embedding.
        base: its weights, where they are local.
    """
    own = {_plain(name): tensor for name, tensor in weights.tensors.items() if name in frozen}
    changed = 0
    for name, stored in own.items():
        other = None if base is None else base.tensors.get(name)
        if other is not None:
            rows = min(stored.shape[0], other.shape[0])
            pair = stored.read()[:rows], other.read()[:rows]
            dtype = min((x.dtype for x in pair), key=lambda dtype: dtype.itemsize)
            changed = max(changed, int((pair[0].to(dtype) != pair[1].to(dtype)).reshape(rows, -1).any(1).sum()))
    return SavedAlong(next(iter(own.values())).shape[0], base_rows, changed) if own else None


def _layers(model: Any) -> dict[str, nn.Module]:
    """The embedding and the output layer, by their names in the model."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: module for name, module in model.named_modules() if any(module is layer for layer in layers)}


def _plain(key: str) -> str:
    """A name in the base model, of one in an adapter's file."""
    return _INSIDE.sub("", key.removeprefix(_PREFIX))
