"""Embeddings that were saved along an adapter: of a resized vocabulary, or since the adapter is in one of them.

peft saves the embedding and the output layer with an adapter where training resized the vocabulary, where one of them
is adapted, and where it was asked to. They take the place of the base model's, which gets as many rows first.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entropy_probe.checkpoints.errors import MismatchError
from entropy_probe.checkpoints.formats import Weights
from entropy_probe.checkpoints.peft_names import name_in_base
from entropy_probe.checkpoints.safe_read import read_json

__all__ = ["SavedAlong", "check_covered", "embedding_rows", "resize_embeddings", "saved_along"]


@dataclass(frozen=True)
class SavedAlong:
    """Embeddings that the files have in place of the base model's, of other rows or as an adapter was saved.

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


def configured_rows(config: Path) -> int | None:
    """The rows of the embedding by a model's ``config.json``; None where there is none, or it does not say."""
    told = read_json(config) if config.is_file() else {}
    inner = told.get("text_config")
    rows = told.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return rows if type(rows) is int else None


def check_configured(config: Path, model: Any) -> None:
    """Check that a base model has the rows that the checkpoint's own configuration says.

    Args:
        config: the checkpoint's ``config.json``, which may be missing.
        model: the base model, with the rows of the embeddings in the checkpoint, if there are any.

    Raises:
        MismatchError: if not.
    """
    rows = configured_rows(config)
    if rows not in (None, embedding_rows(model)):
        raise MismatchError(
            f"{config}: expected a vocabulary of the {embedding_rows(model)} rows of the base model's embedding, got "
            f"{rows}; training resized it and did not save the embeddings, pass as base_model the resized model"
        )


def resize_embeddings(model: Any, weights: Weights) -> frozenset[int]:
    """Give a model's embeddings the rows of those in its files or along an adapter; without any do nothing.

    New rows are NaN until the files are loaded over them, so that nothing is computed from one that no file has.

    Args:
        model: the model, of an adapter the base; it is changed.
        weights: those of the model's files, or of the adapter's by the names in a file of peft.

    Returns:
        The ``id`` of each parameter that was resized.

    Raises:
        MismatchError: if there are several numbers of rows.
    """
    layers = _layers(model)
    rows: dict[int, str] = {}
    for key, shape in weights.shapes.items():
        plain = name_in_base(key.replace(".modules_to_save.", "."))
        if plain.endswith(".weight") and plain.removesuffix(".weight") in layers:
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
    own = {name_in_base(name): tensor for name, tensor in weights.tensors.items() if name in frozen}
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
