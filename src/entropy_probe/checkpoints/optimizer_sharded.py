"""The optimizer in a sharded checkpoint, as ``torch.distributed.checkpoint.state_dict`` saves it: by parameter name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from entropy_probe.checkpoints.dcp import METADATA, Entry, ShardedDirectory
from entropy_probe.checkpoints.errors import DamagedFileError, MappingError, UnsupportedError
from entropy_probe.checkpoints.messages import shown
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer, saved_optimizer

__all__ = ["read_sharded_optimizer", "with_values"]


def read_sharded_optimizer(directory: ShardedDirectory) -> SavedOptimizer:
    """The optimizer of a directory: groups and counts as they are, tensors without storage, parameters numbered.

    Every group gets ``param_names``, since its parameters are stored by name.

    Raises:
        CheckpointError: if there is none or several, a name is in two groups or in none, or the groups are not those
            of one of the optimizers that are rebuilt.
    """
    where = directory.path / METADATA
    parent = _parent(directory)
    found: dict[int, dict[str, Any]] = {}
    state: dict[str, dict[str, Any]] = {}
    for place, entry in directory.entries.items():
        if place[: len(parent)] != parent:
            continue
        match place[len(parent) :]:
            case ("param_groups", int(index), str(key)):
                found.setdefault(index, {})[key] = directory.read(entry)
            case ("state", str(name), str(key)):
                in_place = entry.dtype is None or not entry.shape
                state.setdefault(name, {})[key] = directory.read(entry) if in_place else _without_storage(entry)
            case other:
                raise UnsupportedError(f"{where}: optimizer: expected state and param_groups, got {shown(other, 80)}")
    if sorted(found) != list(range(len(found))):
        raise DamagedFileError(f"{where}: expected parameter groups numbered from 0, got {sorted(found)[:5]}")
    groups = [found[i] for i in sorted(found)]
    names = []
    for i, group in enumerate(groups):
        own = group.get("params")
        if not (isinstance(own, list) and all(isinstance(name, str) for name in own)):
            raise DamagedFileError(f"{where}: group {i}: expected a list of parameter names, got {shown(own)}")
        group["param_names"] = own
        group["params"] = list(range(len(names), len(names) + len(own)))
        names += own
    strangers = sorted(state.keys() - set(names))
    if len(set(names)) != len(names) or strangers:
        raise MappingError(
            f"{where}: expected every parameter in one group, got {len(names) - len(set(names))} in two and state for "
            f"{len(strangers)} in none {strangers[:2]}; save the optimizer again"
        )
    numbered = {i: state[name] for i, name in enumerate(names) if name in state}
    return saved_optimizer(where, {"state": numbered, "param_groups": groups}, directory.size)


def _parent(directory: ShardedDirectory) -> tuple[Any, ...]:
    """Where the one optimizer is."""
    parents = {p[: p.index("param_groups")] for p in directory.entries if "param_groups" in p}
    if len(parents) != 1:
        raise UnsupportedError(
            f"{directory.path / METADATA}: expected one optimizer with state and param_groups by parameter name, got "
            f"{len(parents)}; save it as torch.distributed.checkpoint.state_dict.get_optimizer_state_dict gives it, "
            "not flattened"
        )
    (parent,) = parents
    return parent


def _without_storage(entry: Entry) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def with_values(saved: SavedOptimizer, directory: ShardedDirectory) -> SavedOptimizer:
    """The same optimizer with its tensors read, each put together from its shards.

    Raises:
        CheckpointError: if a shard is damaged.
    """
    parent = _parent(directory)
    names = [name for group in saved.groups for name in group["param_names"]]
    state: dict[int, dict[str, Any]] = {}
    for index, entry in saved.state.items():
        state[index] = {
            key: directory.read(directory.entries[(*parent, "state", names[index], key)])
            if isinstance(value, torch.Tensor) and value.is_meta
            else value
            for key, value in entry.items()
        }
    return replace(saved, state=state)
