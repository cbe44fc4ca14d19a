"""Folders of ``torch.distributed.checkpoint``: FSDP under accelerate, Miles, slime, NeMo-RL, prime-rl and others.

Model and optimizer are in folders of their own or in one, nested under any keys or not, with parameters by name as
``torch.distributed.checkpoint.state_dict`` gives them.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.checkpoints.dcp import METADATA, Entry, Place, ShardedDirectory
from entropy_probe.checkpoints.eight_bit import WRAPPED
from entropy_probe.checkpoints.errors import DamagedFileError, MappingError, UnsupportedError, shown
from entropy_probe.checkpoints.formats.base import CheckpointFormat, StoredTensor, Weights, named_weights
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer, saved_optimizer


class Sharded(CheckpointFormat):
    """Model and optimizer in one folder or in two, of any names, with or without a schedule's in a third."""

    def optimizer_at(self, path: Path) -> Path | None:
        """The folder of the optimizer, or of all."""
        return _folder(path, "an optimizer", ("optimizer_0", "optimizer", "optim", "optimizer/optim"))

    def optimizer(self, place: Path) -> SavedOptimizer:
        """Its state by name; tensors are without storage until they are loaded."""
        _refuse_several(place)
        return read_sharded_optimizer(ShardedDirectory.open(place))

    def weights_at(self, path: Path) -> Path | None:
        """The folder of the model, or of all."""
        return _folder(path, "a model", ("pytorch_model_fsdp_0", "model", "weights", "weights/model"))

    def weights(self, place: Path) -> Weights:
        """The model's or adapter's tensors, each put together from its shards when it is read."""
        _refuse_several(place)
        return read_sharded_weights(ShardedDirectory.open(place))


FORMAT = Sharded()


def _folder(path: Path, what: str, names: tuple[str, ...]) -> Path | None:
    """The folder of a usual name, or the directory itself, or the one folder in it that holds this and nothing else."""
    usual = next((place for place in (*(path / name for name in names), path) if _is_sharded(place)), None)
    if usual is not None or not path.is_dir():
        return usual
    inside = [place for place in sorted(path.iterdir()) if place.name not in _USUAL and _is_sharded(place)]
    if len(inside) > _MOST_FOLDERS:
        return None
    fitting = [place for place in inside if _holds(ShardedDirectory.open(place)) == {what}]
    if len(fitting) > 1:
        raise UnsupportedError(
            f"{path}: expected {what} in one folder, got {len(fitting)} ({', '.join(p.name for p in fitting[:3])}); "
            "move those of other models elsewhere"
        )
    return fitting[0] if fitting else None


_MOST_FOLDERS = 6
"""Of more, a directory is of checkpoints, not one; their indices may take long to read."""
_USUAL = ("optimizer_0", "optimizer", "optim", "pytorch_model_fsdp_0", "model", "weights")


def _is_sharded(place: Path) -> bool:
    """Whether there is an index; beside ``common.pt`` it is Megatron's, of names and shapes of its own."""
    return (place / METADATA).is_file() and not (place / "common.pt").is_file()


def _holds(directory: ShardedDirectory) -> set[str]:
    optimizer = {"an optimizer"} if _optimizers(directory) else set()
    return optimizer | ({"a model"} if _models(directory) else set())


_FLAT = re.compile(r"(state|param_groups)\.(.+)\.(\w+)")
"""A key of an optimizer's state that was flattened."""


def _optimizers(directory: ShardedDirectory) -> set[Place]:
    """Where optimizers are: what is above ``param_groups``."""
    nested = {place[: place.index("param_groups")] for place in directory.entries if "param_groups" in place}
    return nested | _flattened(directory)


def _flattened(directory: ShardedDirectory) -> set[Place]:
    """Where flattened ones are."""
    return {place[:-1] for place in directory.entries if str(place[-1]).startswith("param_groups.")}


def _models(directory: ShardedDirectory) -> set[Place]:
    """Where models are: what is above tensors by the names of parameters, outside optimizers."""
    states = [(*parent, "state") for parent in _optimizers(directory)]
    parents = {
        place[:-1]
        for place, entry in directory.entries.items()
        if entry.dtype is not None and _is_parameter(place) and all(place[: len(s)] != s for s in states)
    }
    called = {parent for parent in parents if parent[-1:] in ((), ("model",))}
    return called or parents


def _is_parameter(place: Place) -> bool:
    return "." in str(place[-1]) and not _FLAT.fullmatch(str(place[-1]))


def _refuse_several(place: Path) -> None:
    second = place.with_name(place.name.removesuffix("_0") + "_1")
    if place.name.endswith("_0") and (second / METADATA).is_file():
        raise UnsupportedError(f"{second}: not supported: several models or optimizers; save one")


def read_sharded_weights(directory: ShardedDirectory) -> Weights:
    """The model's tensors by name: those under ``model``, or the only ones by names of parameters."""
    expected = "one 'model' with tensors by name"
    remedy = "save model and optimizer as torch.distributed.checkpoint.state_dict gives them"
    parent = _only(_models(directory), directory.path, expected, remedy)
    file = directory.path / METADATA
    inside = {
        str(place[-1]): StoredTensor(file, entry.shape, partial(directory.read, entry))
        for place, entry in directory.entries.items()
        if place[:-1] == parent and entry.dtype is not None and not _FLAT.fullmatch(str(place[-1]))
    }
    return named_weights(file, inside)


def read_sharded_optimizer(directory: ShardedDirectory) -> SavedOptimizer:
    """The optimizer of a directory: groups and counts as they are, tensors without storage."""
    where = directory.path / METADATA
    expected = "one optimizer with state and param_groups by parameter name"
    remedy = "save it as torch.distributed.checkpoint.state_dict.get_optimizer_state_dict gives it"
    parent = _only(_optimizers(directory), where, expected, remedy)
    flat = parent in _flattened(directory)
    groups, entries = (_from_flat if flat else _from_nested)(directory, parent)
    names = _names(where, groups, entries)
    if any(kept.keys() & {WRAPPED, "state1"} for kept in entries.values()):
        raise UnsupportedError(
            f"{where}: not supported: state of bitsandbytes in shards, which each rank quantised by itself; train with "
            "optim: adamw_torch, or save from one GPU or DDP, where 8-bit state is read"
        )
    state = {
        name: {
            key: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            if entry.dtype is not None and entry.shape
            else directory.read(entry)
            for key, entry in kept.items()
        }
        for name, kept in entries.items()
    }

    def read(index: int, key: str) -> Tensor:
        return directory.read(entries[names[index]][key])

    return saved_optimizer(where, {"state": state, "param_groups": groups}, directory.size, read)


Kept = dict[str, dict[str, Entry]]
"""What is kept for each parameter, by its name."""


def _from_nested(directory: ShardedDirectory, parent: Place) -> tuple[list[dict[str, Any]], Kept]:
    """Groups by number, with the names of their parameters."""
    where = directory.path / METADATA
    groups: dict[int, dict[str, Any]] = {}
    entries: Kept = {}
    for place, entry in directory.entries.items():
        if place[: len(parent)] != parent:
            continue
        match place[len(parent) :]:
            case ("param_groups", int(index), str(key)):
                groups.setdefault(index, {})[key] = directory.read(entry)
            case ("state", str(name), str(key), *below) if not below or key == WRAPPED:
                entries.setdefault(name, {})[key] = entry
            case other:
                raise UnsupportedError(f"{where}: optimizer: expected state and param_groups, got {shown(other, 80)}")
    if sorted(groups) != list(range(len(groups))):
        raise DamagedFileError(f"{where}: expected parameter groups numbered from 0, got {sorted(groups)[:5]}")
    return [groups[i] for i in sorted(groups)], entries


def _from_flat(directory: ShardedDirectory, parent: Place) -> tuple[list[dict[str, Any]], Kept]:
    """As ``flatten_optimizer_state_dict`` has it: settings by parameter, those with the same ones in one group."""
    settings: dict[str, dict[str, Any]] = {}
    entries: Kept = {}
    for place, entry in directory.entries.items():
        match = _FLAT.fullmatch(str(place[-1]))
        if match and place[:-1] == parent:
            what, name, key = match.groups()
            if what == "state":
                entries.setdefault(name, {})[key] = entry
            else:
                settings.setdefault(name, {})[key] = directory.read(entry)
    groups: dict[str, dict[str, Any]] = {}
    for name, own in settings.items():
        own.pop("params", None)
        groups.setdefault(repr(sorted(own.items())), own | {"params": []})["params"].append(name)
    return list(groups.values()), entries


def _names(where: Path, groups: list[dict[str, Any]], state: Kept) -> list[str]:
    """The parameters of all groups, each in one of them."""
    names: list[str] = []
    for i, group in enumerate(groups):
        own = group.get("params")
        if not (isinstance(own, list) and all(isinstance(name, str) for name in own)):
            raise DamagedFileError(f"{where}: group {i}: expected a list of parameter names, got {shown(own)}")
        names += own
    strangers = sorted(state.keys() - set(names))
    if len(set(names)) != len(names) or strangers:
        raise MappingError(
            f"{where}: expected every parameter in one group, got {len(names) - len(set(names))} in two and state for "
            f"{len(strangers)} in none {strangers[:2]}; save the optimizer again"
        )
    return names


def _only(parents: set[Place], where: Path, expected: str, remedy: str) -> Place:
    """Where the one model or optimizer is."""
    if len(parents) != 1:
        got = ", ".join(sorted(".".join(map(str, parent)) or "the top" for parent in parents)[:5])
        raise UnsupportedError(
            f"{where}: expected {expected}, got {len(parents)}{f' ({got})' if got else ''}; {remedy}"
        )
    return next(iter(parents))
