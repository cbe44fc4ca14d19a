"""Everything that is checked before a checkpoint is loaded, from cheap to dear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from entropy_probe.checkpoints.adapters import (
    FourBit,
    Quantization,
    find_base,
    read_adapter_config,
    refuse_unmentioned,
    trained_adapter,
)
from entropy_probe.checkpoints.confirm import check_never_trained, check_tied, movements, without_frozen
from entropy_probe.checkpoints.directory import check_contained, find_optimizer, read_global_step
from entropy_probe.checkpoints.errors import MissingFileError, UnsupportedError
from entropy_probe.checkpoints.evidence import check_movement
from entropy_probe.checkpoints.formats import CheckpointFormat, StoredTensor, Weights, home_of
from entropy_probe.checkpoints.inner_adapter import InnerAdapter, configuration, inner_adapter
from entropy_probe.checkpoints.manifest import Manifest, check_recorded, read_manifest, verify_files
from entropy_probe.checkpoints.masters import Copy, check_masters, described
from entropy_probe.checkpoints.models import (
    AdapterFiles,
    adapter_layout,
    base_skeleton,
    embedding_names,
    full_skeleton,
)
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer, check_entries
from entropy_probe.checkpoints.optimizer_state import summarize
from entropy_probe.checkpoints.parameters import Layout, ParameterMapping, layout_of, map_parameters
from entropy_probe.checkpoints.policy_part import entries_of_policy, weights_of_policy
from entropy_probe.checkpoints.tokenizer import check_vocabulary
from entropy_probe.checkpoints.weights import (
    check_finite,
    check_related,
    check_same_base,
    check_shapes,
    has_weights,
    read_weights,
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
        weights: which copy of the weights to take where the optimizer keeps another.
        policy: the policy's name in the module that the optimizer is over, where there is a value model beside it.
    """

    path: Path
    base_model: str | Path | None = None
    adapter: str | None = None
    quantization: Quantization | None = None
    weights: Copy = "masters"
    policy: str | None = None

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
        base_weights: the base model's weights where they are with the adapter's.
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
    base_weights: Weights | None = None

    @property
    def adapter_files(self) -> AdapterFiles | None:
        """The adapter and what it is put on; None for full weights."""
        if self.base is None or self.adapter is None:
            return None
        return AdapterFiles(
            self.directory,
            self.adapter,
            self.adapter_config,
            self.weights,
            self.base,
            self.base_weights,
            self.quantization,
        )


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
        masters: the optimizer's own copy of the trained weights, where it has one that is to be taken.
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
    masters: Mapping[str, StoredTensor]


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
    inner = inner_adapter(path)
    if inner is not None:
        kind = facts["kind"] = "lora"
    check_contained(path)
    manifest = read_manifest(path)
    if manifest is not None:
        facts["manifest"] = manifest.recorded
        verify_files(path, manifest)
    global_step = facts["global_step"] = read_global_step(path)
    member, place = find_optimizer(path)
    saved = member.optimizer(place)
    facts |= _facts(saved)
    check_entries(saved)
    if inner is not None:
        model = _inner(request, inner, facts)
    else:
        model = _adapter(request, manifest, facts) if kind == "lora" else _full_weights(request)
    if manifest is not None:
        own = model.directory / ("adapter_config.json" if kind == "lora" else "config.json")
        check_recorded(path, [saved.path, own, *model.weights.files], manifest)
    check_finite(model.weights)
    start = request.starting_point(manifest) if kind == "full" else None
    saved, aside = entries_of_policy(saved, model.layout, request.policy)
    facts |= _facts(saved)
    if saved.lists_frozen and kind == "lora":  # of the base nothing is kept, and nothing says which it is
        saved = saved.only([i for i in range(saved.num_parameters) if i in saved.state])
    mapping = _map(saved, model, manifest, start)
    check_tied(model, mapping)
    if start is not None:
        check_related(model.weights, read_weights(start, "model"), str(start))
    saved = saved.loaded()
    check_never_trained(saved, mapping, model, start)
    saved, mapping = without_frozen(saved, mapping, start)
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
    return Examined(path, member, manifest, global_step, model, saved, mapping, state, movement, masters)


def _facts(saved: SavedOptimizer) -> dict[str, Any]:
    return {
        "optimizer": saved.kind.name,
        "groups": saved.group_reports(),
        "num_with_exp_avg_sq": saved.count("exp_avg_sq"),
        "num_with_step": saved.count("step"),
    }


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
    layout, expected = adapter_layout(skeleton, directory, adapter, config)
    check_shapes(weights.files[0], weights.shapes, expected)
    return StoredModel(
        directory, weights, layout, base=base, adapter=adapter, adapter_config=config, quantization=quantization
    )


def _inner(request: Request, inner: InnerAdapter, facts: dict[str, Any]) -> StoredModel:
    """An adapter among the weights, on the base model that is there too, or on the one that is given."""
    path, config = request.path, configuration(request.path, inner)
    recorded = config.get("base_model_name_or_path")
    if request.quantization is not None:
        raise UnsupportedError(f"{path}: not supported: quantization of a base model that is saved with the adapter")
    if request.base_model is None and inner.home is None and recorded is None:
        raise MissingFileError(
            f"{path / 'config.json'}: expected the base model's configuration, found none beside its weights; pass "
            "base_model, the model that training started from"
        )
    given = request.base_model or (inner.home if inner.home is not None and inner.base is not None else None)
    base = facts["base_model"] = find_base(path, path, given, recorded)
    under = inner.base
    if under is None:
        skeleton, _ = base_skeleton(base, None)
    else:
        skeleton = full_skeleton(base, under)
        check_finite(under)
        if has_weights(Path(base), "model"):
            check_same_base(under, read_weights(Path(base), "model"), base)
            under = under if request.weights == "rounded" else None  # which may be rounded; the given one is not
    check_vocabulary(request.tokenizer_home, base, skeleton)
    layout, expected = adapter_layout(skeleton, path, inner.name, config)
    check_shapes(inner.weights.files[0], inner.weights.shapes, expected)
    return StoredModel(
        path,
        inner.weights,
        layout,
        base=base,
        adapter=inner.name,
        adapter_config=config,
        base_weights=under,
    )


def _full_weights(request: Request) -> StoredModel:
    path = request.path
    for name, given in (("adapter", request.adapter), ("quantization", request.quantization)):
        if given is not None:
            raise UnsupportedError(
                f"{path}: {name}: expected none with full weights, got {given!r:.60}; it is for adapters, leave it out"
            )
    weights = weights_of_policy(read_weights(path, "model"), request.policy)
    home = _configuration(path, request.base_model)
    skeleton = full_skeleton(home, weights)
    check_vocabulary(request.tokenizer_home, request.base_model, skeleton)
    return StoredModel(path, weights, layout_of(skeleton), home, frozenset(embedding_names(skeleton)))


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


def _map(saved: SavedOptimizer, model: StoredModel, manifest: Manifest | None, start: Path | None) -> ParameterMapping:
    """Match entries to parameters; by recorded names, else by the rules over what was trained.

    Full weights of which a part was frozen have fewer entries than parameters. Without recorded names, those that
    are as in the model that training started from are taken as frozen.
    """
    recorded = manifest is not None or any("param_names" in group for group in saved.groups)
    if recorded or start is None or saved.num_parameters >= len(model.layout.parameters):
        return map_parameters(saved, model.layout, manifest)
    frozen = unchanged(model.weights, read_weights(start, "model")) & model.layout.parameters.keys()
    mapping = map_parameters(saved, model.layout.without(frozen))
    how = f"{mapping.how}; {len(frozen)} tensors that are as in {start} were frozen"
    return replace(mapping, how=how, others_frozen=True)


def _masters(
    request: Request, member: CheckpointFormat, place: Path, model: StoredModel, mapping: ParameterMapping
) -> tuple[Mapping[str, StoredTensor], str]:
    """The masters to take, checked, and which copy that makes."""
    masters = member.masters(place)
    rounded = None
    if masters:
        shapes = model.layout.shapes
        rounded = check_masters(str(place), masters, mapping.names, shapes, model.weights, model.adapter)
    copy = described(str(request.path), rounded, request.weights, there=bool(masters))
    return masters if request.weights == "masters" and rounded is not None else {}, copy
