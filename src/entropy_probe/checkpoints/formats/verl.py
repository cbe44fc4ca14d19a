"""A file per rank: verl (FSDP1 and FSDP2), SkyRL, and AReaL's optimizer beside safetensors.

``{model,optim}_world_size_W_rank_r.pt``; the model's tensors are ``DTensor``s, by name. The optimizer's state is by the
number of the parameter: of the model's parameters in order, frozen ones too, or of FSDP1's flat ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.checkpoints.errors import (
    DamagedFileError,
    MappingError,
    MismatchError,
    MissingFileError,
    UnsupportedError,
    shown,
)
from entropy_probe.checkpoints.flat_parameters import pieces_of_parameters, unflattened, units_of
from entropy_probe.checkpoints.formats.base import CheckpointFormat, StoredTensor, Weights
from entropy_probe.checkpoints.manifest import plain_name
from entropy_probe.checkpoints.objects import read_objects
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer
from entropy_probe.checkpoints.peft_names import is_adapters
from entropy_probe.checkpoints.pieces import DTENSORS, Part, Whole, as_written_by, joined, optimizer_of_entries
from entropy_probe.checkpoints.safe_read import read_json
from entropy_probe.results.note import Note

_COPY = "copy the checkpoint again"
_OTHER = "only tensors, DTensors and plain values are read; train with plain AdamW in float32 or bfloat16"


class Verl(CheckpointFormat):
    """All files are in one folder, ``actor`` or ``policy``, with the configuration in ``huggingface`` below."""

    def optimizer_at(self, path: Path) -> Path | None:
        """The folder itself."""
        return path if any(path.glob("optim_world_size_*_rank_*.pt")) else None

    def optimizer(self, place: Path) -> SavedOptimizer:
        """Its state, by name where the model's files are there too."""
        with as_written_by("verl", place):
            return self._optimizer(place)

    def _optimizer(self, place: Path) -> SavedOptimizer:
        files = _rank_files(place, "optim")
        saved = [_optimizer_state(file) for file in files]
        first = saved[0]
        for file, other in zip(files, saved, strict=True):
            if other["param_groups"] != first["param_groups"]:
                raise MismatchError(
                    f"{file}: expected the parameter groups of rank 0, got others; files of two saves, {_COPY}"
                )
        size = sum(file.stat().st_size for file in files)
        model = _Model.read(place) if any(place.glob("model_world_size_*_rank_*.pt")) else None
        entries, groups = _by_parameter(files[0], [s["state"] for s in saved], first["param_groups"], model)
        return replace(optimizer_of_entries(files[0], groups, entries, size), lists_frozen=True)

    def weights_at(self, path: Path) -> Path | None:
        """The folder itself, where it has the model's files."""
        return path if any(path.glob("model_world_size_*_rank_*.pt")) else None

    def weights(self, place: Path) -> Weights:
        """Every tensor put together from its parts; tied ones are there under each name."""
        with as_written_by("verl", place):
            model = _Model.read(place)
        return Weights(
            model.files, {name: StoredTensor(model.files[0], x.shape, x.read) for name, x in model.tensors.items()}
        )

    def configuration_at(self, path: Path) -> Path:
        """The folder ``huggingface``; AReaL's is beside the files."""
        below = path / "huggingface"
        return below if (below / "config.json").is_file() else path

    def adapter_config(self, path: Path) -> dict[str, Any] | None:
        """Rank and scale, which verl writes down, or all of the configuration that SkyRL writes."""
        beside, own = path / "lora_adapter" / "adapter_config.json", path / "lora_train_meta.json"
        return read_json(beside) if beside.is_file() else read_json(own) if own.is_file() else None

    def doubts(self, path: Path) -> Iterator[Note]:
        """None: each rank's files are checked against the others."""
        yield from ()


FORMAT = Verl()


def _rank_files(place: Path, kind: str) -> tuple[Path, ...]:
    """The files of all ranks in order."""
    pattern = re.compile(rf"{kind}_world_size_(\d+)_rank_(\d+)\.pt")
    matches = [match for file in sorted(place.iterdir()) if (match := pattern.fullmatch(file.name))]
    sizes = {int(match[1]) for match in matches}
    config = place / "fsdp_config.json"
    said = read_json(config).get("world_size") if config.is_file() else None
    if len(sizes) > 1 or (said is not None and sizes != {said}):
        expected = "one number of ranks" if said is None else f"files of {shown(said)} ranks, as {config.name} says"
        raise MismatchError(
            f"{place}: expected {expected}, got {kind} files of {sorted(sizes)}; remove those of another save"
        )
    (size,) = sizes
    ranks = {int(match[2]) for match in matches}
    missing = next((rank for rank in range(size) if rank not in ranks), None)
    if missing is not None or len(ranks) != size:
        name = f"{kind}_world_size_{size}_rank_{missing}.pt"
        raise MissingFileError(
            f"{place / name}: expected a file of each of {size} ranks, got {len(ranks)}; every rank saves on its own "
            "machine, copy the files of all into one folder"
        )
    return tuple(place / f"{kind}_world_size_{size}_rank_{rank}.pt" for rank in range(size))


@dataclass(frozen=True)
class _Model:
    """The model's files."""

    files: tuple[Path, ...]  # by rank
    tensors: dict[str, Whole]  # in the model's own order
    tied: frozenset[str]  # those of another name before
    copies: int  # how many ranks have the same part

    @classmethod
    def read(cls, place: Path) -> _Model:
        files = _rank_files(place, "model")
        states = [read_objects(file, DTENSORS, _OTHER) for file in files]
        names = list(states[0]) if isinstance(states[0], dict) else []
        for file, state in zip(files, states, strict=True):
            if not (isinstance(state, dict) and names and all(isinstance(name, str) for name in state)):
                raise UnsupportedError(f"{file}: expected the model's tensors by name, got {shown(state)}; {_COPY}")
            if list(state) != names:
                raise MismatchError(f"{file}: expected the tensors of rank 0, got others; files of two models, {_COPY}")
        tensors, tied, places = {}, set(), {}
        for name in names:
            values = [state[name] for state in states]
            tensors[plain_name(name)] = joined(f"{files[0]}: {name}", values)
            at = tuple((x.local if isinstance(x, Part) else x).data_ptr() for x in values)
            if any(at) and places.setdefault(at, name) != name:
                tied.add(plain_name(name))
        return cls(files, tensors, frozenset(tied), _copies([state[names[0]] for state in states]))

    def parameter_lists(self) -> Iterator[list[str]]:
        """The parameters' names without those of tied tensors: by shared data; else also by equal values."""
        names = [name for name in self.tensors if name not in self.tied]
        yield names
        first = self.tensors[names[0]]
        alike = [name for name in names[1:] if self.tensors[name].shape == first.shape]
        equal = {name for name in alike if torch.equal(self.tensors[name].read(), first.read())}
        if equal:
            yield [name for name in names if name not in equal]


def _copies(values: Sequence[Any]) -> int:
    parts = [x for x in values if isinstance(x, Part) and x.coordinate is not None]
    own = {tuple(at for at, d in zip(x.coordinate or (), x.dimensions, strict=True) if d is not None) for x in parts}
    return len(values) // len(own) if len(parts) == len(values) else 1


def _optimizer_state(file: Path) -> dict[str, Any]:
    saved = read_objects(file, DTENSORS, _OTHER)
    if not (isinstance(saved, dict) and isinstance(saved.get("state"), dict) and "param_groups" in saved):
        raise UnsupportedError(f"{file}: expected 'state' and 'param_groups', got {shown(saved)}; {_COPY}")
    groups, state = saved["param_groups"], saved["state"]
    if not (isinstance(groups, list) and groups and all(isinstance(g, dict) for g in groups)):
        raise DamagedFileError(f"{file}: expected a list of parameter groups, got {shown(groups)}; {_COPY}")
    if not all(type(index) is int and isinstance(entry, dict) for index, entry in state.items()):
        raise DamagedFileError(f"{file}: expected state by the number of the parameter, got {shown(state)}; {_COPY}")
    return saved


Entries = dict[Any, dict[str, Any]]


def _by_parameter(
    where: Path, states: Sequence[Mapping[int, Any]], groups: list[dict[str, Any]], model: _Model | None
) -> tuple[Entries, list[dict[str, Any]]]:
    """State and groups by the parameters' names, or where no names are known, or do not fit, by their numbers."""
    order = [index for group in groups for index in group["params"]]
    count = len(order)
    if order != list(range(count)):
        raise MappingError(f"{where}: expected the groups to number parameters 0, 1, 2 …, got {shown(order)}; {_COPY}")
    values: dict[int, dict[str, list[Any]]] = {}
    for state in states:
        for index, entry in state.items():
            for key, value in entry.items():
                values.setdefault(index, {}).setdefault(key, []).append(value)
    for index, entry in values.items():
        own = [state[index].keys() for state in states if index in state]
        if any(keys != entry.keys() for keys in own):
            raise MismatchError(f"{where}: parameter {index}: expected {sorted(entry)} on all ranks, got less; {_COPY}")
    numbers = {
        index: {key: _number(f"{where}: parameter {index}: {key}", x) for key, x in entry.items() if _is_number(x[0])}
        for index, entry in values.items()
    }
    tensors = {
        index: {key: x for key, x in entry.items() if key not in numbers[index]} for index, entry in values.items()
    }
    if tensors and all(
        type(x) is Tensor and x.dim() == 1 for entry in tensors.values() for own in entry.values() for x in own
    ):
        return _by_flat_parameter(where, tensors, numbers, groups, count, model)
    for index, entry in values.items():
        if any(len(x) != len(states) for x in entry.values()):
            raise MissingFileError(
                f"{where}: parameter {index}: expected an entry on each of {len(states)} ranks, got one on "
                f"{min(map(len, entry.values()))}; files of two saves, {_COPY}"
            )
    entries: Entries = {
        index: {key: joined(f"{where}: parameter {index}: {key}", x) for key, x in entry.items()} | numbers[index]
        for index, entry in tensors.items()
    }
    names = None if model is None or len(groups) > 1 else _fitting_names(entries, model, count)
    if names is None:
        return entries, groups
    return _named({names[index]: entry for index, entry in entries.items()}, names, groups)


def _by_flat_parameter(
    where: Path,
    tensors: Mapping[int, Mapping[str, Sequence[Tensor]]],
    numbers: Mapping[int, Mapping[str, Any]],
    groups: list[dict[str, Any]],
    count: int,
    model: _Model | None,
) -> tuple[Entries, list[dict[str, Any]]]:
    """The same for FSDP1: the first way to divide the flat tensors that every size confirms."""
    if model is None or len(groups) > 1:
        raise UnsupportedError(
            f"{where}: not supported: flat parameters of FSDP1 without model_world_size_W_rank_R.pt, whose names they "
            "need, or in several groups; save the model too (save_contents: [model, optimizer]), in one group"
        )
    shapes = {name: x.shape for name, x in model.tensors.items()}
    keys = sorted({key for entry in tensors.values() for key in entry})
    if all(map(is_adapters, shapes)):  # saved alone; the units of the base have no state
        names, kept = list(shapes), sorted(tensors)
        tensors, numbers = ({i: own[k] for i, k in enumerate(kept)} for own in (tensors, numbers))
        count = len(names)
    for names in model.parameter_lists():
        alone = all(map(is_adapters, names))
        units = (
            [[n] for n in names] if alone else units_of(names, [n.rpartition(".")[0] for n in names if is_adapters(n)])
        )
        ways = {
            key: {i: _one_copy(f"{where}: {key} {i}", entry[key], model.copies) for i, entry in tensors.items()}
            for key in keys
        }
        flat = {key: unflattened(f"{where}: {key}", own, units, shapes, count) for key, own in ways.items()}
        whose = {name: i for i, unit in enumerate(units) for name in unit}
        if any(part is None for part in flat.values()):
            flat = {key: pieces_of_parameters(own, names, shapes, count) for key, own in ways.items()}
            whose = {name: i for i, name in enumerate(names)}
        parts = {key: part for key, part in flat.items() if part is not None}
        if len(parts) == len(keys):
            entries: Entries = {
                name: {key: part[name] for key, part in parts.items() if name in part} | dict(numbers[whose[name]])
                for name in names
                if whose[name] in tensors
            }
            return _named(entries, names, groups)
    raise MappingError(
        f"{where}: expected the {count} flat parameters of FSDP1 to be the model's layers and what is around them, got "
        f"other numbers or sizes for its {len(shapes)} tensors; wrap by layer class as verl does by itself (no "
        "min_num_params), or train with strategy: fsdp2"
    )


def _one_copy(where: str, pieces: Sequence[Tensor], copies: int) -> Sequence[Tensor]:
    """The pieces of the first ranks that have all, where others have the same."""
    count = len(pieces) // copies
    if any(not torch.equal(piece, pieces[i % count]) for i, piece in enumerate(pieces[count:])):
        raise MismatchError(f"{where}: expected equal pieces on ranks that have copies, got others; {_COPY}")
    return pieces[:count]


def _fitting_names(entries: Entries, model: _Model, count: int) -> list[str] | None:
    """The names whose number and shapes are those of the entries, if any."""
    for names in model.parameter_lists():
        shape = {name: x.shape for name, x in model.tensors.items()}
        if len(names) == count and all(
            index < count and value.shape == shape[names[index]]
            for index, entry in entries.items()
            for value in entry.values()
            if isinstance(value, Whole)
        ):
            return names
    return None


def _named(entries: Entries, names: Sequence[str], groups: list[dict[str, Any]]) -> tuple[Entries, list[Any]]:
    """Without the frozen base of an adapter, which is among the parameters too."""
    adapter = any(is_adapters(name) for name in names)
    own = [name for name in names if name in entries or not adapter or is_adapters(name)]
    return entries, [groups[0] | {"params": own}]


def _is_number(value: Any) -> bool:
    return not isinstance(value, Part) and not (isinstance(value, Tensor) and value.dim())


def _number(where: str, values: Sequence[Any]) -> Any:
    """A number that all ranks have alike."""
    plain = [x.item() if isinstance(x, Tensor) else x for x in values]
    if any(x != plain[0] for x in plain):
        raise MismatchError(
            f"{where}: expected one number on all ranks, got {shown(plain)}; files of two saves, {_COPY}"
        )
    return values[0]
