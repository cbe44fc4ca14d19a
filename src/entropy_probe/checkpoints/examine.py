"""Everything that is checked before a checkpoint is loaded, from cheap to dear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from entropy_probe.checkpoints.adapters import (
    FourBit,
    Quantization,
    find_base,
    read_adapter_config,
    refuse_unmentioned,
    trained_adapter,
)
from entropy_probe.checkpoints.confirm import (
    check_never_trained,
    check_tied,
    movement_status,
    movements,
    without_untrained,
)
from entropy_probe.checkpoints.directory import check_contained, find_optimizer, read_global_step
from entropy_probe.checkpoints.embeddings import (
    SavedAlong,
    check_configured,
    configured_rows,
    embedding_rows,
    resize_embeddings,
    saved_along,
)
from entropy_probe.checkpoints.errors import MissingFileError, UnsupportedError
from entropy_probe.checkpoints.evidence import check_movement
from entropy_probe.checkpoints.formats import CheckpointFormat, StoredTensor, Weights, home_of
from entropy_probe.checkpoints.inner_adapter import (
    as_in_file,
    base_among,
    configuration,
    name_among,
    refuse_adapter,
    split_adapter,
    written_config,
)
from entropy_probe.checkpoints.manifest import Manifest, check_recorded, read_manifest, verify_files
from entropy_probe.checkpoints.mapping import ParameterMapping, StatedMapping, map_parameters, without_frozen
from entropy_probe.checkpoints.masters import Copy, check_masters, described
from entropy_probe.checkpoints.models import AdapterFiles, adapter_layout, base_skeleton, embedding_names, full_skeleton
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer, check_entries
from entropy_probe.checkpoints.optimizer_state import summarize
from entropy_probe.checkpoints.parameters import Layout, layout_of
from entropy_probe.checkpoints.policy_part import entries_of_policy, weights_of_policy
from entropy_probe.checkpoints.tokenizer import check_vocabulary
from entropy_probe.checkpoints.training_run import TrainingRun
from entropy_probe.checkpoints.weights import (
    check_base,
    check_finite,
    check_related,
    check_shapes,
    has_weights,
    read_weights,
    unchanged,
)
from entropy_probe.results.checkpoint import MovementReport
from entropy_probe.results.probe import OptimizerStateReport


@dataclass(frozen=True)
class Request:
    """A checkpoint directory, already found to be one, and what the user said of it."""

    path: Path  # the directory
    base_model: str | Path | None = None  # the base model, or the one that full weights started from
    adapter: str | None = None  # the name of the trained adapter
    quantization: Quantization | None = None  # how training quantised the base model
    mapping: StatedMapping | None = None  # which parameters the entries of a file without names belong to
    weights: Copy = "masters"  # which copy of the weights to take where the optimizer keeps another
    # the policy's name in the module that the optimizer is over, where there is a value model beside it
    policy: str | None = None
    any_trainer: bool = False  # whether the loss may be one that is not modelled
    trainer_config: str | Path | None = None  # the trainer's own config, where it is not beside the checkpoint

    @property
    def tokenizer_home(self) -> Path:
        """Where to look for a tokenizer first: where the trainer puts it, unless a base model is given."""
        return self.path if self.base_model is not None else home_of(self.path)

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
    """What the files say of the model, checked against a skeleton without storage."""

    directory: Path  # where the weights are: the checkpoint, or the adapter's folder in it
    weights: Weights  # the adapter's, or the full weights
    layout: Layout  # the parameters that train
    adapter: AdapterFiles | None = None  # the adapter, and what it is put on; None for full weights
    configuration: str = ""  # the directory of the configuration of full weights
    embeddings: frozenset[str] = frozenset()  # the names of the embedding and output layer of full weights
    # embeddings that are not the base model's: saved along an adapter that did not train them, or of other rows
    along: SavedAlong | None = None


@dataclass(frozen=True)
class Examined:
    """A checkpoint that can be loaded, and all that was established about it."""

    path: Path  # the directory
    format: CheckpointFormat  # the format of its optimizer's state
    manifest: Manifest | None  # the manifest, its hashes verified
    global_step: int | None  # optimizer steps taken
    model: StoredModel  # what the files say of the model
    saved: SavedOptimizer  # the optimizer's state
    mapping: ParameterMapping  # which parameter each of its entries belongs to
    state: OptimizerStateReport  # what the moments cover
    movement: MovementReport | None  # the check of entries of equal shape, where the weights' starting point is known
    run: TrainingRun  # the trainer's settings and log
    # the optimizer's own copy of the trained weights, where it has one that is to be taken
    masters: Mapping[str, StoredTensor]
    num_others: int  # the optimizer's entries of another model, which were set aside


def examine(request: Request, facts: dict[str, Any]) -> Examined:
    """Check everything, and stop at the first thing that would keep the checkpoint from loading or being trusted.

    ``facts`` gets the fields of a ``CheckpointReport`` as they are established, for one on a checkpoint that is
    refused.
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
    run = TrainingRun.of(path, member, global_step, request.trainer_config)
    facts |= run.facts()
    saved = member.optimizer(place)
    facts |= _facts(saved)
    check_entries(saved)
    model = _adapter(request, manifest, facts) if kind == "lora" else _full_weights(request)
    if manifest is not None:
        own = model.directory / ("adapter_config.json" if kind == "lora" else "config.json")
        settings = [] if run.settings is None or run.settings.file.parent != path else [run.settings.file]
        check_recorded(path, [saved.path, own, *model.weights.files, *settings], manifest)
    check_finite(model.weights, (model.weights.tensors if kind == "lora" else model.layout.parameters).keys())
    start = request.starting_point(manifest) if kind == "full" else None
    saved, num_others, aside = _of_policy(saved, model, manifest, request, start)
    facts |= _facts(saved)
    mapping = _map(saved, model, manifest, request, start)
    check_tied(model, mapping)
    if start is not None:
        check_related(model.weights, read_weights(start, "model"), str(start))
    saved = saved.loaded()
    check_never_trained(saved, mapping, model, start)
    saved, mapping = without_untrained(saved, mapping, start)
    masters, copy = _masters(request, member, place, model, mapping)
    mapping = replace(mapping, how=mapping.how + aside + copy)
    state, facts["num_zero_elements"] = summarize(saved, mapping, model.layout)
    facts["optimizer_state"] = state
    movement = None
    moves, reference = movements(saved, mapping.names, model, request, start, masters)
    if moves:
        movement = facts["movement"] = check_movement(saved, mapping.names, moves, reference)
    else:
        facts["movement_not_checked"] = reference
    if not request.any_trainer:
        run.refuse_other_loss()
    return Examined(
        path, member, manifest, global_step, model, saved, mapping, state, movement, run, masters, num_others
    )


def _of_policy(
    saved: SavedOptimizer, model: StoredModel, manifest: Manifest | None, request: Request, start: Path | None
) -> tuple[SavedOptimizer, int, str]:
    """The policy's entries that train, and how many of another model were set aside, as a number and for the result."""
    saved = without_frozen(saved, model.layout)
    if request.policy is None and (manifest is not None or request.mapping is not None):
        return saved, 0, ""
    moved = partial(movement_status, model=model, request=request, start=start)
    own = entries_of_policy(saved, model.layout, request.policy, moved)
    others = saved.num_parameters - own.num_parameters
    told = request.policy is not None or saved.has_names
    by = "" if told else " + movement"
    return own, others, f"{by}; {others} entries of another model are set aside" if others else ""


def _facts(saved: SavedOptimizer) -> dict[str, Any]:
    return {
        "optimizer": saved.kind.name,
        "groups": saved.group_reports(),
        "num_with_exp_avg_sq": saved.count("exp_avg_sq"),
        "num_with_step": saved.count("step"),
    }


def _kind(path: Path) -> Literal["lora", "full"]:
    whole = (path / "config.json").is_file() or has_weights(path, "model")
    if (path / "adapter_config.json").is_file() or not whole:
        return "lora"
    return "lora" if written_config(path) is not None else "full"


def stored_base(request: Request) -> str | None:
    """Where the model under an adapter is, by the adapter's own files; None for full weights."""
    check_contained(request.path)
    lora = _kind(request.path) == "lora"
    return _stored_adapter(request, read_manifest(request.path)).base if lora else None


class _StoredAdapter(NamedTuple):
    """An adapter's files, and where the model under it is."""

    name: str
    directory: Path
    config: dict[str, Any]
    weights: Weights
    base: str
    holds_base: bool  # the base model's weights are saved among the adapter's
    base_alone: bool  # and no other is asked for


def _stored_adapter(request: Request, manifest: Manifest | None) -> _StoredAdapter:
    path, directory, name = request.path, request.path, "default"
    written = None if (path / "adapter_config.json").is_file() else written_config(path)
    if written is None:
        name, directory = trained_adapter(path, request.adapter, manifest.adapter if manifest is not None else None)
        config = read_adapter_config(directory)
        weights = read_weights(directory, "adapter_model")
    else:
        weights = read_weights(path, "model")
        config = configuration(path, written, weights)
    if not weights.pretrained:
        name = name_among(weights, request.adapter)
    home = home_of(path)
    holds = not weights.pretrained and any(".base_layer." in name for name in weights.tensors)
    alone = holds and request.base_model is None and request.quantization is None and (home / "config.json").is_file()
    given = home if alone else request.base_model
    base = find_base(path, directory, given, config.get("base_model_name_or_path"))
    return _StoredAdapter(name, directory, config, weights, base, holds, alone)


def _adapter(request: Request, manifest: Manifest | None, facts: dict[str, Any]) -> StoredModel:
    stored = _stored_adapter(request, manifest)
    adapter, directory, config, weights, base = stored[:5]
    facts["base_model"] = base
    skeleton, quantization, under = _base(request, manifest, stored)
    refuse_unmentioned(directory, quantization)
    if not weights.pretrained:
        weights = as_in_file(weights, adapter)
    base_names, base_rows = set(skeleton.state_dict()), embedding_rows(skeleton)
    resized = resize_embeddings(skeleton, weights)
    check_configured(home_of(request.path) / "config.json", skeleton)
    check_vocabulary(request.tokenizer_home, base, skeleton)
    layout, expected = adapter_layout(skeleton, directory, adapter, config, weights, resized)
    of_base = read_weights(Path(base), "model") if quantization is None and has_weights(Path(base), "model") else None
    if not weights.pretrained:
        weights, frozen = split_adapter(weights, expected, base_names)
        if of_base is not None:
            check_base(frozen, of_base)
    check_shapes(weights.files[0], weights.shapes, expected)
    along = saved_along(weights, set(layout.names) - layout.parameters.keys(), base_rows, of_base)
    files = AdapterFiles(directory, adapter, config, weights, base, under, quantization)
    return StoredModel(directory, weights, layout, files, along=along)


def _base(
    request: Request, manifest: Manifest | None, stored: _StoredAdapter
) -> tuple[nn.Module, FourBit | None, Weights | None]:
    """The base model of an adapter: its skeleton and quantisation, and its weights if not those at its place.

    Those that were saved with the adapter's are taken where no others are given, and where the policy sampled with them
    is asked for.
    """
    base, among = stored.base, base_among(stored.weights)
    if not stored.base_alone:
        trained = manifest.quantization if manifest is not None else None
        skeleton, quantization = base_skeleton(base, request.quantization, trained)
        complete = stored.holds_base and {name for name, _ in skeleton.named_parameters()} <= among.tensors.keys()
        wanted = request.weights == "rounded" or not has_weights(Path(base), "model")
        if not (complete and wanted and quantization is None):
            return skeleton, quantization, None
    check_finite(among)
    return full_skeleton(base, among), None, among


def _full_weights(request: Request) -> StoredModel:
    path = request.path
    for name, given in (("adapter", request.adapter), ("quantization", request.quantization)):
        if given is not None:
            raise UnsupportedError(
                f"{path}: {name}: expected none with full weights, got {given!r:.60}; it is for adapters, leave it out"
            )
    weights = weights_of_policy(read_weights(path, "model"), request.policy)
    refuse_adapter(path, weights)
    home = _configuration(path, request.base_model)
    skeleton = full_skeleton(home, weights)
    check_vocabulary(request.tokenizer_home, request.base_model, skeleton)
    embeddings = frozenset(embedding_names(skeleton))
    rows, told = embedding_rows(skeleton), configured_rows(Path(home) / "config.json")
    along = SavedAlong(rows, told, 0) if told not in (None, rows) else None
    return StoredModel(path, weights, layout_of(skeleton), None, home, embeddings, along)


def _configuration(path: Path, base_model: str | Path | None) -> str:
    """The directory of the configuration of full weights; trainers save none with sharded ones."""
    home = home_of(path)
    if (home / "config.json").is_file():
        return str(home)
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
    moved = partial(movement_status, saved, model=model, request=request, start=start)
    recorded = manifest is not None or saved.has_names
    known = recorded or request.mapping is not None
    if known or start is None or saved.num_parameters >= len(model.layout.parameters):
        return map_parameters(saved, model.layout, manifest, request.mapping, moved)
    frozen = unchanged(model.weights, read_weights(start, "model")) & model.layout.parameters.keys()
    mapping = map_parameters(saved, model.layout.without(frozen), moved=moved)
    how = f"{mapping.how}; {len(frozen)} tensors that are as in {start} were frozen"
    return replace(mapping, how=how, others_frozen=True)


def _masters(
    request: Request, member: CheckpointFormat, place: Path, model: StoredModel, mapping: ParameterMapping
) -> tuple[Mapping[str, StoredTensor], str]:
    """The masters to take, checked, and which copy that makes."""
    masters = member.masters(place)
    rounded = None
    if masters:
        shapes, adapter = model.layout.shapes, None if model.adapter is None else model.adapter.name
        rounded = check_masters(str(place), masters, mapping.names, shapes, model.weights, adapter)
    copy = described(str(request.path), rounded, request.weights, there=bool(masters))
    return masters if request.weights == "masters" and rounded is not None else {}, copy
