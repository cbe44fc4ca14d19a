"""Everything that is checked before a checkpoint is loaded, from cheap to dear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from entropy_probe.checkpoints.adapters import (
    FourBit,
    Quantization,
    find_base,
    read_adapter_config,
    refuse_unmentioned,
    starting_at_zero,
    trained_adapter,
)
from entropy_probe.checkpoints.directory import check_contained, find_optimizer, read_global_step
from entropy_probe.checkpoints.errors import MismatchError, MissingFileError, UnsupportedError
from entropy_probe.checkpoints.evidence import check_adapter_never_trained, check_movement, check_weights_never_trained
from entropy_probe.checkpoints.formats import CheckpointFormat, Weights
from entropy_probe.checkpoints.grouping import policy_entries
from entropy_probe.checkpoints.manifest import Manifest, check_recorded, read_manifest, verify_files
from entropy_probe.checkpoints.mapping import ParameterMapping, StatedMapping, map_parameters, without_frozen
from entropy_probe.checkpoints.models import adapter_layout, base_skeleton, embedding_names, full_skeleton
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer, check_entries
from entropy_probe.checkpoints.optimizer_state import summarize
from entropy_probe.checkpoints.parameters import Layout, layout_of
from entropy_probe.checkpoints.tokenizer import check_vocabulary
from entropy_probe.checkpoints.training_run import TrainingRun
from entropy_probe.checkpoints.weights import (
    check_base,
    check_finite,
    check_shapes,
    has_weights,
    read_weights,
    refuse_adapter,
    split_adapter,
    unchanged,
)
from entropy_probe.results.checkpoint import MovementReport
from entropy_probe.results.probe import OptimizerStateReport

__all__ = ["Examined", "Request", "StoredModel", "examine"]


@dataclass(frozen=True)
class Request:
    """A checkpoint directory, already found to be one, and what the user said of it.

    Attributes:
        path: the directory.
        base_model: the base model, or the one that full weights started from.
        adapter: the name of the trained adapter.
        quantization: how training quantised the base model.
        mapping: which parameters the entries of a file without names belong to.
        any_trainer: whether the loss may be one that is not modelled.
    """

    path: Path
    base_model: str | Path | None = None
    adapter: str | None = None
    quantization: Quantization | None = None
    mapping: StatedMapping | None = None
    any_trainer: bool = False

    def starting_point(self, manifest: Manifest | None) -> Path | None:
        """The weights that full-weight training started from, where they are given or recorded, and local.

        A recorded path may not climb with ``..``, which only the user's may.
        """
        if self.base_model is not None:
            place = Path(self.base_model).expanduser()
        elif manifest is not None and manifest.base_model is not None:
            place = Path(manifest.base_model.name)
            if ".." in place.parts:
                return None
        else:
            return None
        return place if has_weights(place, "model") else None


@dataclass(frozen=True)
class StoredModel:
    """What the files say of the model, checked against a skeleton without storage.

    Attributes:
        directory: where the weights are: the checkpoint, or the adapter's folder in it.
        weights: the adapter's, or the full weights.
        layout: the parameters that train.
        configuration: the directory of the configuration of full weights; empty for an adapter.
        embeddings: the names of the embedding and output layer of full weights.
        base: the base model's directory or hub name; None for full weights.
        adapter: the adapter's name; None for full weights.
        adapter_config: its configuration.
        quantization: how the base model is quantised; None for plain weights.
    """

    directory: Path
    weights: Weights
    layout: Layout
    configuration: str = ""
    embeddings: frozenset[str] = frozenset()
    base: str | None = None
    adapter: str | None = None
    adapter_config: dict[str, Any] = field(default_factory=dict)
    quantization: FourBit | None = None


@dataclass(frozen=True)
class Examined:
    """A checkpoint that can be loaded, and all that was established about it.

    Attributes:
        path: the directory.
        format: the format of its optimizer's state.
        manifest: the manifest, its hashes verified.
        global_step: optimizer steps taken.
        model: what the files say of the model.
        saved: the optimizer's state.
        mapping: which parameter each of its entries belongs to.
        state: what the moments cover.
        movement: the check of entries of equal shape, where the weights' starting point is known.
        run: the trainer's settings and log.
        num_others: the optimizer's entries of another model, which were set aside.
    """

    path: Path
    format: CheckpointFormat
    manifest: Manifest | None
    global_step: int | None
    model: StoredModel
    saved: SavedOptimizer
    mapping: ParameterMapping
    state: OptimizerStateReport
    movement: MovementReport | None
    run: TrainingRun
    num_others: int


def examine(request: Request, facts: dict[str, Any]) -> Examined:
    """Check everything, and stop at the first thing that would keep the checkpoint from loading or being trusted.

    Args:
        request: the directory.
        facts: gets the fields of a ``CheckpointReport`` as they are established, for one on a checkpoint that is
            refused.

    Raises:
        CheckpointError: what that thing is.
    """
    path = request.path
    kind = facts["kind"] = _kind(path)
    check_contained(path)
    manifest = read_manifest(path)
    if manifest is not None:
        facts["manifest"] = manifest.recorded
        verify_files(path, manifest)
    global_step = facts["global_step"] = read_global_step(path)
    member, place = find_optimizer(path)
    run = TrainingRun.of(path, member, global_step)
    facts |= run.facts()
    saved = member.optimizer(place)
    facts |= {
        "optimizer": saved.kind.name,
        "groups": saved.group_reports(),
        "num_with_exp_avg_sq": saved.count("exp_avg_sq"),
        "num_with_step": saved.count("step"),
    }
    check_entries(saved)
    model = _adapter(request, manifest, facts) if kind == "lora" else _full_weights(request)
    if manifest is not None:
        configuration = model.directory / ("adapter_config.json" if kind == "lora" else "config.json")
        own = [] if run.settings is None else [run.settings.file]
        check_recorded(path, [saved.path, configuration, *model.weights.files, *own], manifest)
    check_finite(model.weights)
    start = request.starting_point(manifest) if kind == "full" else None
    in_file = without_frozen(saved, model.layout)
    moved = partial(_movement_status, model=model, request=request, start=start)
    known = manifest is not None or request.mapping is not None
    saved = in_file if known else policy_entries(in_file, model.layout, moved)
    others = in_file.num_parameters - saved.num_parameters
    facts |= {"num_with_exp_avg_sq": saved.count("exp_avg_sq"), "num_with_step": saved.count("step")}
    mapping = _map(saved, model, manifest, request, start)
    if others:
        mapping = replace(mapping, how=f"{mapping.how} + movement; {others} entries of another model are set aside")
    _check_tied(model, mapping)
    saved = saved.loaded()
    _check_never_trained(saved, mapping, model, start)
    state, facts["num_zero_elements"] = summarize(saved, mapping, model.layout)
    facts["optimizer_state"] = state
    movement = None
    movements, reference = _movements(saved, mapping.names, model, request, start)
    if movements:
        movement = facts["movement"] = check_movement(saved, mapping.names, movements, reference)
    else:
        facts["movement_not_checked"] = reference
    if not request.any_trainer:
        run.refuse_other_loss()
    return Examined(path, member, manifest, global_step, model, saved, mapping, state, movement, run, others)


def _kind(path: Path) -> Literal["lora", "full"]:
    whole = (path / "config.json").is_file() or has_weights(path, "model")
    return "full" if whole and not (path / "adapter_config.json").is_file() else "lora"


def _adapter(request: Request, manifest: Manifest | None, facts: dict[str, Any]) -> StoredModel:
    path = request.path
    adapter, directory = trained_adapter(path, request.adapter, manifest.adapter if manifest is not None else None)
    config = read_adapter_config(directory)
    base = facts["base_model"] = find_base(path, directory, request.base_model, config.get("base_model_name_or_path"))
    weights = read_weights(directory, "adapter_model")
    trained = manifest.quantization if manifest is not None else None
    skeleton, quantization = base_skeleton(base, request.quantization, trained)
    refuse_unmentioned(directory, quantization)
    check_vocabulary(path, base, skeleton)
    base_names = set(skeleton.state_dict())
    layout, expected = adapter_layout(skeleton, directory, adapter)
    if not weights.pretrained:
        weights, frozen = split_adapter(weights, expected, adapter, base_names)
        if quantization is None and has_weights(Path(base), "model"):
            check_base(frozen, read_weights(Path(base), "model"))
    check_shapes(weights.files[0], weights.shapes, expected)
    return StoredModel(
        directory, weights, layout, base=base, adapter=adapter, adapter_config=config, quantization=quantization
    )


def _full_weights(request: Request) -> StoredModel:
    path = request.path
    for name, given in (("adapter", request.adapter), ("quantization", request.quantization)):
        if given is not None:
            raise UnsupportedError(
                f"{path}: {name}: expected none with full weights, got {given!r:.60}; it is for adapters, leave it out"
            )
    weights = read_weights(path, "model")
    refuse_adapter(path, weights)
    configuration = _configuration(path, request.base_model)
    skeleton = full_skeleton(configuration, weights)
    check_vocabulary(path, request.base_model, skeleton)
    return StoredModel(path, weights, layout_of(skeleton), configuration, frozenset(embedding_names(skeleton)))


def _configuration(path: Path, base_model: str | Path | None) -> str:
    """The directory of the configuration of full weights; trainers save none with sharded ones."""
    if (path / "config.json").is_file():
        return str(path)
    if base_model is None:
        raise MissingFileError(
            f"{path / 'config.json'}: expected the model's configuration, found none beside its weights; pass "
            "base_model, the model that training started from"
        )
    return str(base_model)


def _map(
    saved: SavedOptimizer, model: StoredModel, manifest: Manifest | None, request: Request, start: Path | None
) -> ParameterMapping:
    """Match entries to parameters; by recorded or stated names, else by the rules over what was trained.

    Full weights of which a part was frozen have fewer entries than parameters. Without recorded names, those that
    are as in the model that training started from are taken as frozen.
    """
    moved = partial(_movement_status, saved, model=model, request=request, start=start)
    recorded = manifest is not None or any("param_names" in group for group in saved.groups)
    known = recorded or request.mapping is not None
    if known or start is None or saved.num_parameters >= len(model.layout.parameters):
        return map_parameters(saved, model.layout, manifest, request.mapping, moved)
    frozen = unchanged(model.weights, read_weights(start, "model")) & model.layout.parameters.keys()
    mapping = map_parameters(saved, model.layout.without(frozen), moved=moved)
    how = f"{mapping.how}; {len(frozen)} tensors that are as in {start} were frozen"
    return replace(mapping, how=how, others_frozen=True)


def _check_tied(model: StoredModel, mapping: ParameterMapping) -> None:
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


def _check_never_trained(
    saved: SavedOptimizer, mapping: ParameterMapping, model: StoredModel, start: Path | None
) -> None:
    if not saved.never_trained:
        return
    if model.adapter is None:
        before = read_weights(start, "model") if start is not None else None
        check_weights_never_trained(saved, mapping.names, model.weights, before)
    else:
        starting = starting_at_zero(model.adapter_config, mapping.names, model.adapter)
        check_adapter_never_trained(saved, mapping.names, model.weights, starting)


def _movement_status(
    saved: SavedOptimizer, names: tuple[str, ...], model: StoredModel, request: Request, start: Path | None
) -> str:
    """The status of the movement check; ``inconclusive`` too where there is nothing to compare."""
    movements, _ = _movements(saved, names, model, request, start)
    return check_movement(saved.loaded(), names, movements, "").status if movements else "inconclusive"


def _movements(
    saved: SavedOptimizer, names: tuple[str, ...], model: StoredModel, request: Request, start: Path | None
) -> tuple[dict[str, Callable[[], Tensor]], str]:
    """How far each parameter has moved since training started, and from what; where unknown none, and why."""
    if not saved.is_adam:
        return {}, f"it goes by Adam's moments, {saved.kind.name} keeps others"
    tensors = model.weights.tensors
    if model.adapter is not None:
        inside = starting_at_zero(model.adapter_config, names, model.adapter)
        movements = {name: tensors[key].read for name, key in inside.items() if key in tensors}
        how = model.adapter_config.get("init_lora_weights")
        unknown = f"init_lora_weights is {how!r:.60}, so where the adapter started is not known"
        return movements, "0, where lora_B starts" if movements else unknown
    if start is None:
        what = f"{request.base_model} has no local weights" if request.base_model else "it was not given"
        return {}, f"needs the model that training started from, and {what}; pass base_model"
    before = read_weights(start, "model").tensors
    common = [n for n in names if n in tensors and n in before and tensors[n].shape == before[n].shape]
    movements = {name: partial(_difference, tensors[name].read, before[name].read) for name in common}
    return movements, str(start) if movements else f"{start} has none of the trained tensors"


def _difference(now: Callable[[], Tensor], before: Callable[[], Tensor]) -> Tensor:
    return now().float() - before().float()
