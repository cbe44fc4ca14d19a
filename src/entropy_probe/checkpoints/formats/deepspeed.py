"""DeepSpeed ZeRO 1, 2 and 3: OpenRLHF, and the Hugging Face Trainer with DeepSpeed (TRL, ms-swift, Axolotl).

A folder ``global_stepN`` with a file of the optimizer per rank, each with its piece of flat buffers: float32 masters of
the weights, and what is kept for them. The model's own files have names, shapes, and the rounded weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from entropy_probe.checkpoints.errors import DamagedFileError, MismatchError, MissingFileError, UnsupportedError, shown
from entropy_probe.checkpoints.foreign_settings import settings_of_deepspeed
from entropy_probe.checkpoints.formats.base import NO_TRAINER_STATE, CheckpointFormat, StoredTensor, Weights
from entropy_probe.checkpoints.manifest import plain_name
from entropy_probe.checkpoints.objects import Names, read_objects
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer
from entropy_probe.checkpoints.pieces import DTENSORS, Whole, as_written_by, optimizer_of_entries
from entropy_probe.checkpoints.safe_read import StandIn, is_file_name, read_json
from entropy_probe.checkpoints.trainer_settings import TrainerSettings
from entropy_probe.checkpoints.zero import (
    Buffers,
    Shapes,
    by_mappings,
    by_parameters,
    check_steps,
    frozen_tensors,
    settings_of_group,
)
from entropy_probe.results.note import Note

_COPY = "copy the checkpoint again"
_OTHER = "only DeepSpeed's own state of ZeRO is read; train with its Adam"
_NAMES: Names = {
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"): StandIn,
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"): StandIn,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): StandIn,
    ("deepspeed.utils.tensor_fragment", "fragment_address"): StandIn,
    **{name: DTENSORS[name] for name in (("torch._tensor", "_rebuild_from_type_v2"), ("torch", "Tensor"))},
}
_RANK_FILE = re.compile(r"(?:bf16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(model|optim)_states\.pt")


class DeepSpeed(CheckpointFormat):
    """The folder that ``latest`` names, or the directory itself."""

    def optimizer_at(self, path: Path) -> Path | None:
        """The folder of the last save."""
        return _folder(path)

    def optimizer(self, place: Path) -> SavedOptimizer:
        """Its state by name: each parameter put together from its pieces."""
        with as_written_by("DeepSpeed", place):
            return self._optimizer(place)

    def _optimizer(self, place: Path) -> SavedOptimizer:
        saved = _Saved.of(place)
        keys = sorted({key for own in saved.buffers for key in own.kept})
        kept = {key: saved.parameters(key) for key in keys}
        numbers = [own.numbers for own in saved.buffers]
        entries = {
            name: {key: whole[name] for key, whole in kept.items()} | numbers[group]
            for group, shapes in enumerate(saved.shapes)
            for name in shapes
        }
        names = [group | {"params": list(own)} for group, own in zip(saved.groups, saved.shapes, strict=True)]
        return optimizer_of_entries(saved.files[0], names, entries, saved.size)

    def engine_settings(self, path: Path) -> TrainerSettings | None:
        """Its configuration, which is in each of its files; ZeRO 1 and 2 also say where they clip."""
        folder = _folder(path)
        files = sorted(folder.glob("*_optim_states.pt"), key=lambda file: file.stat().st_size) if folder else []
        if not files:
            return None
        with as_written_by("DeepSpeed", path):
            part = _part(files[0], "optimizer_state_dict")
        config, saved = part.get("ds_config"), part["optimizer_state_dict"]
        told = dict(config) if isinstance(config, dict) else {}
        if isinstance(saved, dict) and "clip_grad" in saved:
            told["gradient_clipping"] = saved["clip_grad"]
        return settings_of_deepspeed(files[0], told)

    def masters(self, place: Path) -> dict[str, StoredTensor]:
        """The float32 masters, one for each trained parameter."""
        with as_written_by("DeepSpeed", place):
            saved = _Saved.of(place)
        return {name: _stored(saved.files[0], whole) for name, whole in saved.parameters("master").items()}

    def weights_at(self, path: Path) -> Path | None:
        """The same folder."""
        return _folder(path)

    def weights(self, place: Path) -> Weights:
        """The rounded weights that the model computes with, and what was frozen."""
        with as_written_by("DeepSpeed", place):
            saved = _Saved.of(place)
        file, tensors = saved.model_files[0], dict(saved.frozen)
        for name, whole in saved.parameters("master").items():
            tensors[name] = Whole(whole.shape, saved.dtype, partial(_rounded, whole, saved.dtype))
        tensors |= {name: tensors[first] for name, first in saved.tied.items() if first in tensors}
        return Weights((file,), {name: _stored(file, whole) for name, whole in tensors.items()})

    def configuration_at(self, path: Path) -> Path:
        """The directory with ``latest``, where the trainer puts what is not DeepSpeed's."""
        return path.parent if _folder(path) == path else path

    def adapter_config(self, path: Path) -> dict[str, Any] | None:
        """That beside ``latest``, of a folder below it."""
        file = self.configuration_at(path) / "adapter_config.json"
        return read_json(file) if file.is_file() else None

    def doubts(self, path: Path) -> Iterator[Note]:
        """The Trainer's log is written last; the schedule is in DeepSpeed's own files."""
        if re.fullmatch(r"checkpoint-\d+", path.name) and not (path / "trainer_state.json").is_file():
            yield NO_TRAINER_STATE()


FORMAT = DeepSpeed()


def _stored(file: Path, whole: Whole) -> StoredTensor:
    return StoredTensor(file, whole.shape, whole.read)


def _rounded(whole: Whole, dtype: torch.dtype) -> Tensor:
    return whole.read().to(dtype)


def _folder(path: Path) -> Path | None:
    if any(path.glob("*_optim_states.pt")):
        return path
    latest = path / "latest"
    if not latest.is_file():
        folders = sorted(
            (place for place in path.glob("global_step*") if any(place.glob("*_optim_states.pt"))),
            key=lambda place: (len(place.name), place.name),
        )
        return folders[-1] if folders else None
    name = latest.read_bytes()[:300].decode("utf-8", "replace").strip()
    return path / name if is_file_name(name) and any((path / name).glob("*_states.pt")) else None


@dataclass(frozen=True)
class _Saved:
    """All files of one save."""

    files: tuple[Path, ...]  # of the optimizer, by rank
    model_files: tuple[Path, ...]  # of the model, by rank where there are several
    size: int  # bytes of all
    groups: list[dict[str, Any]]  # the optimizer's groups, without parameters
    shapes: list[Shapes]  # the trained parameters of each group, in order
    buffers: list[Buffers]  # for each group what the ranks hold for it
    by_slices: bool  # whether the ranks say which part of each parameter they have (ZeRO 1 and 2)
    dtype: torch.dtype  # of the weights that the model computes with
    frozen: dict[str, Whole]  # the tensors that were not trained, as far as they were saved
    tied: dict[str, str]  # by their second name the first of tensors that have two

    @classmethod
    def of(cls, place: Path) -> _Saved:
        """All files of a folder, not opened again while something still reads from them and they are unchanged."""
        told = ((file.name, file.stat()) for file in sorted(place.glob("*.pt")))
        key = (place.absolute(), *((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in told))
        saved = _OPEN.get(key)
        if saved is None:
            saved = _OPEN[key] = cls.read(place)
        return saved

    @classmethod
    def read(cls, place: Path) -> _Saved:
        model_files, files = _files(place)
        models = [_part(file, "module", "param_shapes", "dp_world_size") for file in model_files]
        parts = [_part(file, "optimizer_state_dict") for file in files]
        _check_ranks(place, models, model_files, files)
        states = [
            _zero_state(file, part["optimizer_state_dict"], part.get("ds_config"))
            for file, part in zip(files, parts, strict=True)
        ]
        first, shapes = models[0], _shapes(model_files[0], models[0]["param_shapes"])
        for file, model in zip(model_files, models, strict=True):
            if _shapes(file, model["param_shapes"]) != shapes or model.get("global_steps") != first.get("global_steps"):
                raise MismatchError(f"{file}: expected the parameters and step of rank 0, got others; {_COPY}")
        groups = [dict(group) for group in states[0].groups]
        for file, state in zip(files, states, strict=True):
            if (
                state.groups != states[0].groups
                or len(state.partitions) != len(states[0].partitions)
                or state.by_slices != states[0].by_slices
            ):
                raise MismatchError(f"{file}: expected the parameter groups of rank 0, got others; {_COPY}")
        by_slices = states[0].by_slices
        members = [group.pop("params") for group in groups]
        shapes = _shapes_of_groups(files[0], members, shapes)
        buffers = [
            Buffers.of_ranks(files, [[state.partitions[i] for i in inside] for state in states]) for inside in members
        ]
        if by_slices:
            buffers = [own.in_order(inside) for own, inside in zip(buffers, shapes, strict=True)]
        check_steps(files[0], first, buffers)
        dtype = next((x.dtype for x in first["module"].values() if x.is_floating_point()), torch.float32)
        frozen = frozen_tensors(model_files[0], models, {name for own in shapes for name in own})
        tied = {plain_name(name): plain_name(other) for name, other in (first.get("shared_params") or {}).items()}
        size = sum(file.stat().st_size for file in (*files, *model_files))
        saved = cls(files, model_files, size, groups, shapes, buffers, by_slices, dtype, frozen, tied)
        if by_slices:
            saved._check_rounding(first["module"])
        return saved

    def parameters(self, key: str) -> dict[str, Whole]:
        """What is kept under a key for every trained parameter."""
        arrange = by_mappings if self.by_slices else by_parameters
        return {
            name: whole._replace(read=partial(_read_of, self, whole.read))
            for own, shapes in zip(self.buffers, self.shapes, strict=True)
            for name, whole in arrange(self.files[0], own, key, shapes).items()
        }

    def _check_rounding(self, module: Mapping[str, Tensor]) -> None:
        """The model's weights are the masters rounded: else files are of two saves, or parts in another order."""
        rounded = {plain_name(name): tensor for name, tensor in module.items()}
        for name, whole in self.parameters("master").items():
            tensor, master = rounded.get(name), whole.read()
            if tensor is None or not torch.equal(tensor, master.to(tensor.dtype)):
                if tensor is not None and not torch.isfinite(master).all():
                    continue  # which is said where the weights are checked
                raise MismatchError(
                    f"{self.model_files[0]}: {name}: expected the optimizer's float32 weights rounded, got others; "
                    f"files of ranks were swapped, or are of two saves; {_COPY}"
                )


_OPEN: WeakValueDictionary[tuple[Any, ...], _Saved] = WeakValueDictionary()
"""Saves that tensors are still to be read from: optimizer, weights and masters of one are in the same files."""


def _read_of(saved: _Saved, read: Callable[[], Tensor]) -> Tensor:
    """A tensor of a save, which stays open as long as this may be called."""
    return read()


def _files(place: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files of model and optimizer, by rank."""
    found: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
    for file in sorted(place.glob("*.pt")):
        match = _RANK_FILE.fullmatch(file.name)
        if match is None and re.match(r"layer_\d+|.*expp?_rank|.*expert_\d+", file.name):
            raise UnsupportedError(f"{file}: not supported: pipeline or expert parallelism; train without")
        if match is not None:
            rank, tensor_rank, kind = int(match[1] or 0), int(match[2]), match[3]
            if tensor_rank:
                raise UnsupportedError(f"{file}: not supported: tensor parallelism (mp_rank_{match[2]}); train without")
            if rank in found[kind]:
                raise MismatchError(f"{file}: expected one file of rank {rank}, got two; remove that of another save")
            found[kind][rank] = file
    for kind, files in found.items():
        if not files:
            raise MissingFileError(
                f"{place}: expected *_{kind}_states.pt of DeepSpeed, found none; every rank saves on its own machine, "
                "copy the files of all into one folder (ZeRO stage 1, 2 or 3 is needed)"
            )
    return tuple(file for _, file in sorted(found["model"].items())), tuple(
        file for _, file in sorted(found["optim"].items())
    )


def _part(file: Path, *keys: str) -> dict[str, Any]:
    content = read_objects(file, _NAMES, _OTHER)
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise UnsupportedError(
            f"{file}: expected DeepSpeed's {', '.join(keys)}, got {shown(list(content), 100)}; {_COPY}"
        )
    return content


def _check_ranks(
    place: Path, models: Sequence[Mapping[str, Any]], model_files: Sequence[Path], files: Sequence[Path]
) -> None:
    """Every rank's file is there, and no other's."""
    size = models[0]["dp_world_size"]
    if type(size) is not int or not 0 < size < 2**20:
        raise DamagedFileError(
            f"{model_files[0]}: dp_world_size: expected a number of ranks, got {shown(size)}; {_COPY}"
        )
    several = model_files[0].name.startswith(("zero_pp_rank", "bf16_zero"))
    for kind, own in (("optim", files), *((("model", model_files),) if several else ())):
        ranks = {int(re.search(r"pp_rank_(\d+)", file.name)[1]) for file in own}  # type: ignore[index]
        missing = sorted(set(range(size)) - ranks)
        if missing:
            raise MissingFileError(
                f"{place}: expected *_{kind}_states.pt of each of {size} ranks, found none of rank {missing[0]}; every "
                "rank saves on its own machine, copy the files of all into one folder"
            )
        if len(ranks) != size:
            raise MismatchError(f"{place}: expected {kind} files of {size} ranks, got {len(ranks)}; remove the others")
    for file, model in zip(model_files, models, strict=True):
        if model["dp_world_size"] != size:
            raise MismatchError(f"{file}: dp_world_size: expected {size}, got {shown(model['dp_world_size'])}; {_COPY}")


def _shapes(file: Path, groups: Any) -> list[Shapes]:
    """The trained parameters of each group."""
    if not (isinstance(groups, list) and groups and all(isinstance(own, dict) for own in groups)):
        raise DamagedFileError(f"{file}: param_shapes: expected one dictionary for each group, got {shown(groups)}")
    shapes = [{plain_name(name): tuple(size) for name, size in own.items()} for own in groups]
    if len({name for own in shapes for name in own}) != sum(map(len, groups)):
        raise DamagedFileError(f"{file}: param_shapes: expected each parameter once; {_COPY}")
    return shapes


def _shapes_of_groups(file: Path, members: Sequence[Any], shapes: Sequence[Shapes]) -> list[Shapes]:
    """The parameters of each group, from those of each flat buffer (with ZeRO 3 several in a group) or group."""
    numbers = [index for own in members for index in own]
    if numbers != list(range(len(numbers))) or not all(members) or len(shapes) not in (len(numbers), len(members)):
        raise MismatchError(
            f"{file}: expected groups of flat buffers for param_shapes of {len(shapes)}, got {shown(members)}; {_COPY}"
        )
    if len(shapes) < len(numbers):
        return list(shapes)
    return [{name: shape for index in own for name, shape in shapes[index].items()} for own in members]


@dataclass(frozen=True)
class _ZeroState:
    """A rank's part of the optimizer: its groups, and what it holds of each (ZeRO 1, 2) or each sub-group (ZeRO 3)."""

    groups: list[dict[str, Any]]
    partitions: list[dict[str, Any]]
    by_slices: bool


def _zero_state(file: Path, saved: Any, config: Any) -> _ZeroState:
    if isinstance(saved, dict) and "fp32_flat_groups" in saved:
        state, masters, slices = saved.get("optimizer_state_dict"), saved["fp32_flat_groups"], None
    elif isinstance(saved, dict) and {"base_optimizer_state", "single_partition_of_fp32_groups"} <= saved.keys():
        state, masters = saved["base_optimizer_state"], saved["single_partition_of_fp32_groups"]
        slices = saved.get("param_slice_mappings")
    else:
        raise UnsupportedError(
            f"{file}: not supported: expected the state of ZeRO 1, 2 or 3, got {shown(saved, 100)}; train with one"
        )
    if isinstance(state, list):
        raise UnsupportedError(
            f"{file}: not supported: elastic_checkpoint, which leaves the groups' settings out; train without it"
        )
    if not (isinstance(state, dict) and {"state", "param_groups"} <= state.keys() and isinstance(masters, list)):
        raise DamagedFileError(f"{file}: expected 'state' and 'param_groups', got {shown(state, 100)}; {_COPY}")
    if slices is None and "fp32_flat_groups" not in saved:
        raise UnsupportedError(
            f"{file}: not supported: no param_slice_mappings, as DeepSpeed before 0.10 saved; train with a newer one"
        )
    entries = [state["state"].get(i) for i in range(len(masters))]
    if len(state["state"]) != len(masters) or not all(isinstance(entry, dict) for entry in entries):
        raise DamagedFileError(
            f"{file}: expected state for each of {len(masters)} flat buffers, got {shown(list(state['state']))}; save "
            "after the first step"
        )
    if slices is not None and len(slices) != len(masters):
        raise DamagedFileError(f"{file}: expected param_slice_mappings of {len(masters)} groups, got {len(slices)}")
    partitions = [
        {**entry, "master": master, "slices": None if slices is None else slices[i]}
        for i, (entry, master) in enumerate(zip(entries, masters, strict=True))
    ]
    return _ZeroState(
        [settings_of_group(file, group, config) for group in state["param_groups"]], partitions, slices is not None
    )
