"""What the files have to show of a mapping once it is made: tied tensors, parameters without state, movements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.checkpoints.adapters import starting_at_zero
from entropy_probe.checkpoints.errors import MismatchError
from entropy_probe.checkpoints.evidence import check_adapter_never_trained, check_movement, check_weights_never_trained
from entropy_probe.checkpoints.formats import StoredTensor
from entropy_probe.checkpoints.mapping import ParameterMapping
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer
from entropy_probe.checkpoints.weights import read_weights

if TYPE_CHECKING:
    from entropy_probe.checkpoints.examine import Request, StoredModel


def check_tied(model: StoredModel, mapping: ParameterMapping) -> None:
    """Names say what trained, so a layer that was tied in training would count as frozen if it is not here."""
    trained = [name for name in model.embeddings if name in mapping.names]
    tensors = model.weights.tensors
    if len(model.embeddings) == 2 and len(trained) == 1 and model.embeddings <= tensors.keys():
        first, second = sorted(model.embeddings)
        if torch.equal(tensors[first].read(), tensors[second].read()):
            raise MismatchError(
                f"{model.weights.files[0]}: {first}: expected other values than {second}, or both tied, got equal "
                f"ones, of which only {trained[0]} was trained; pass the configuration that the model was trained with"
            )


def without_untrained(
    saved: SavedOptimizer, mapping: ParameterMapping, start: Path | None
) -> tuple[SavedOptimizer, ParameterMapping]:
    """Without the parameters of full weights that a trainer listed though they were frozen.

    The Trainer's two groups list what trains, so there the loss did not reach them and may yet.
    """
    lost = saved.never_trained
    may_be_frozen = saved.lists_frozen or saved.has_names or len(saved.sizes) == 1
    if not may_be_frozen or start is None or not lost:
        return saved, mapping
    kept = [i for i in range(saved.num_parameters) if i not in lost]
    how = f"{mapping.how}; {len(lost)} tensors without state, that are as in {start}, were frozen"
    return saved.only(kept), ParameterMapping(tuple(mapping.names[i] for i in kept), how, others_frozen=True)


def check_never_trained(
    saved: SavedOptimizer, mapping: ParameterMapping, model: StoredModel, start: Path | None
) -> None:
    """Parameters without state are as training began."""
    if not saved.never_trained:
        return
    if model.adapter is None:
        before = read_weights(start, "model") if start is not None else None
        check_weights_never_trained(saved, mapping.names, model.weights, before)
    else:
        starting = starting_at_zero(model.adapter.config, mapping.names, model.adapter.name)
        check_adapter_never_trained(saved, mapping.names, model.weights, starting)


def movements(
    saved: SavedOptimizer,
    names: tuple[str, ...],
    model: StoredModel,
    request: Request,
    start: Path | None,
    masters: Mapping[str, StoredTensor],
) -> tuple[dict[str, Callable[[], Tensor]], str]:
    """How far each parameter has moved since training started, and from what; where unknown none, and why.

    Masters take the place of the weights that are rounded from them, which hardly move.
    """
    if not saved.is_adam:
        return {}, f"it goes by Adam's moments, {saved.kind.name} keeps others"
    tensors = model.weights.tensors
    if model.adapter is not None:
        inside = starting_at_zero(model.adapter.config, names, model.adapter.name)
        moved = {name: masters.get(name, tensors[key]).read for name, key in inside.items() if key in tensors}
        how = model.adapter.config.get("init_lora_weights")
        unknown = f"init_lora_weights is {how!r:.60}, so where the adapter started is not known"
        return moved, "0, where lora_B starts" if moved else unknown
    if start is None:
        what = f"{request.base_model} has no local weights" if request.base_model else "it was not given"
        return {}, f"needs the model that training started from, and {what}; pass base_model"
    before = read_weights(start, "model").tensors
    common = [n for n in names if n in tensors and n in before and tensors[n].shape == before[n].shape]
    moved = {name: partial(_difference, masters.get(name, tensors[name]).read, before[name].read) for name in common}
    return moved, str(start) if moved else f"{start} has none of the trained tensors"


def movement_status(
    saved: SavedOptimizer, names: tuple[str, ...], model: StoredModel, request: Request, start: Path | None
) -> str:
    """The status of the movement check; ``inconclusive`` too where there is nothing to compare."""
    moved, _ = movements(saved, names, model, request, start, {})
    return check_movement(saved.loaded(), names, moved, "").status if moved else "inconclusive"


def _difference(now: Callable[[], Tensor], before: Callable[[], Tensor]) -> Tensor:
    return now().float() - before().float()
