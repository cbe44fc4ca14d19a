"""Tensors that ranks hold in parts, put together in one process: ``DTensor``s, and pieces of flat buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_probe.checkpoints.errors import (
    CheckpointError,
    DamagedFileError,
    MismatchError,
    UnsupportedError,
    first_line,
    shown,
)
from entropy_probe.checkpoints.objects import Names
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer, saved_optimizer
from entropy_probe.checkpoints.safe_read import StandIn

COPY = "copy the checkpoint again"


_MALFORMED = (LookupError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError, MemoryError)


@contextmanager
def as_written_by(maker: str, place: Path) -> Iterator[None]:
    """Turn what malformed values raise into one line, for files of several ranks that can each be read."""
    try:
        yield
    except CheckpointError:
        raise
    except _MALFORMED as error:
        raise DamagedFileError(
            f"{place}: expected files as {maker} writes them, got others: {type(error).__name__}: "
            f"{first_line(error, 100)}; {COPY}"
        ) from error


class Whole(NamedTuple):
    """A tensor that is put together when it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


Entries = Mapping[Any, Mapping[str, Any]]
"""What is kept for each parameter: tensors as :class:`Whole`, and numbers."""


def optimizer_of_entries(path: Path, groups: list[dict[str, Any]], entries: Entries, size: int) -> SavedOptimizer:
    """An optimizer whose state was worked out, parameters by name or by number, as in ``params`` of the groups."""
    order = [parameter for group in groups for parameter in group["params"]]
    state = {
        parameter: {
            key: torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Whole) else value
            for key, value in entry.items()
        }
        for parameter, entry in entries.items()
    }
    return saved_optimizer(
        path, {"state": state, "param_groups": groups}, size, lambda index, key: entries[order[index]][key].read()
    )


# ---- DTensors


class _Shard(StandIn):
    """``Shard(dim)``."""

    @property
    def dimension(self) -> Any:
        return vars(self).get("dim", next(iter(vars(self).get("values", ())), None))


class _Replicate(StandIn):
    """``Replicate()``."""


class _DTensor(StandIn):
    """The class itself, which is only named."""


@dataclass(frozen=True)
class Part:
    """What one rank has of a ``DTensor``."""

    local: Tensor  # its part
    shape: tuple[int, ...]  # of the whole
    # for each dimension of the mesh of ranks the dimension of the tensor that is divided over it; None where each rank
    # has a copy
    dimensions: tuple[int | None, ...]
    coordinate: tuple[int, ...] | None  # where in the mesh the rank is; None where the file does not say


class _ShardedTensor(StandIn):
    """The class itself, of FSDP1 without a mesh of ranks, which is only named."""


def _stored(value: Any) -> dict[str, Any]:
    """What an object's fields were, whether or not it had slots."""
    state = vars(value).get("state")
    return state[1] if isinstance(state, tuple) else vars(value)


def _of_sharded_tensor(state: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Part:
    """The one shard that a rank has, or none of few rows."""
    local = state[0]
    if len(local) > 1:
        raise ValueError("a ShardedTensor with several shards on a rank")
    if not local:
        return Part(torch.empty((0, *shape[1:]), dtype=dtype), shape, (0,), None)
    shard = _stored(local[0])
    return Part(shard["tensor"], shape, (0,), (_stored(_stored(shard["metadata"])["placement"])["_rank"],))


def _rebuilt(function: Callable[..., Tensor], kind: Any, arguments: Any, state: Any) -> Tensor | Part:
    """In place of ``_rebuild_from_type_v2``: a ``DTensor``'s part, or a tensor without the attributes it had."""
    if kind is _ShardedTensor:
        return _of_sharded_tensor(state, arguments[2], arguments[1])
    if kind is not _DTensor:
        return function(*arguments)
    own = state[1] if isinstance(state, tuple) else state
    spec, local = vars(own["_spec"]), own["_local_tensor"]
    placements, coordinate = spec["placements"], vars(spec["mesh"]).get("_coordinate_on_dim")
    if not (isinstance(local, Tensor) and all(isinstance(x, _Shard | _Replicate) for x in placements)):
        raise ValueError("a DTensor that is neither divided nor copied")
    dimensions = tuple(x.dimension if isinstance(x, _Shard) else None for x in placements)
    return Part(local, arguments[2], dimensions, None if coordinate is None else tuple(coordinate))


def _class_inside(*_: Any) -> type[StandIn]:
    """In place of ``getattr``, with which a pickle names a class inside another."""
    return StandIn


def _is_named_only(*_: Any) -> Tensor:
    raise ValueError("a tensor of another class")


_MODULES = ("torch.distributed.tensor", "torch.distributed._tensor.api", "torch.distributed._tensor")
_SPECS = ("torch.distributed.tensor._dtensor_spec", "torch.distributed._tensor.placement_types")
_PLACEMENTS = ("torch.distributed.tensor.placement_types", "torch.distributed._tensor.placement_types")
_METADATA = "torch.distributed._shard.sharded_tensor.metadata"
DTENSORS: Names = {
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuilt,
    ("torch._utils", "_rebuild_wrapper_subclass"): _is_named_only,
    ("torch", "Tensor"): StandIn,
    **{(module, "DTensor"): _DTensor for module in _MODULES},
    **{(module, name): StandIn for module in _SPECS for name in ("DTensorSpec", "TensorMeta", "ShardOrderEntry")},
    **{(module, "Shard"): _Shard for module in _PLACEMENTS},
    **{(module, "Replicate"): _Replicate for module in _PLACEMENTS},
    ("torch.distributed.device_mesh", "DeviceMesh"): StandIn,
    **{("torch.distributed._mesh_layout", name): StandIn for name in ("_MeshLayout", "_FlatLayout")},
    ("torch.distributed._shard.sharded_tensor.api", "ShardedTensor"): _ShardedTensor,
    ("torch.distributed._shard.sharded_tensor.shard", "Shard"): StandIn,
    ("torch.distributed._shard.metadata", "ShardMetadata"): StandIn,
    ("torch.distributed.remote_device", "_remote_device"): StandIn,
    **{(_METADATA, x): StandIn for x in ("ShardedTensorMetadata", "TensorProperties", "MEM_FORMAT_ENCODING")},
    ("torch.distributed._shard.sharding_spec.chunk_sharding_spec", "ChunkShardingSpec"): StandIn,
    **{(module, "getattr"): _class_inside for module in ("builtins", "__builtin__")},
}
"""What a file with ``DTensor``s or ``ShardedTensor``s names."""


def joined(where: str, values: Sequence[Any]) -> Whole:
    """A tensor from what each rank has of it, in the order of ranks: parts of a ``DTensor``, or copies."""
    if all(type(x) is Tensor for x in values):
        return _copies(where, values)
    if (
        not all(isinstance(x, Part) for x in values)
        or len({(x.shape, x.dimensions, x.local.dtype) for x in values}) > 1
    ):
        raise DamagedFileError(
            f"{where}: expected parts of one tensor, got {shown([type(x).__name__ for x in values])}"
        )
    first = values[0]
    divided = [i for i, dimension in enumerate(first.dimensions) if dimension is not None]
    if len(divided) > 1:
        raise UnsupportedError(
            f"{where}: not supported: a tensor divided twice, as by tensor parallelism; train without"
        )
    _check_places(where, values)
    if not divided:
        return _copies(where, [x.local for x in values])
    (over,) = divided
    (dimension,) = (first.dimensions[over],)
    by_place: dict[int, list[Tensor]] = {}
    for rank, part in enumerate(values):
        by_place.setdefault(rank if part.coordinate is None else part.coordinate[over], []).append(part.local)
    parts = [by_place.get(i, []) for i in range(len(by_place))]
    sizes = [tuple(copies[0].shape) for copies in parts if copies]
    rest = (*first.shape[:dimension], *first.shape[dimension + 1 :])
    fitting = all((*size[:dimension], *size[dimension + 1 :]) == rest for size in sizes)
    if len(sizes) != len(parts) or not fitting or sum(size[dimension] for size in sizes) != first.shape[dimension]:
        raise DamagedFileError(f"{where}: expected parts of {list(first.shape)}, got {shown(sizes, 120)}; {COPY}")
    copies = [_copies(where, x) for x in parts]
    return Whole(first.shape, first.local.dtype, lambda: torch.cat([part.read() for part in copies], dimension))


def _check_places(where: str, parts: Sequence[Part]) -> None:
    """Each rank is in the mesh where its number says."""
    places = [part.coordinate for part in parts]
    if len(parts[0].dimensions) == 1 and all(x in (None, (rank,)) for rank, x in enumerate(places)):
        return  # None where an older torch does not say, or a rank has nothing
    known = [place for place in places if place is not None and len(place) == len(parts[0].dimensions)]
    if len(known) != len(places):
        raise DamagedFileError(f"{where}: expected every rank's place in the mesh, got {shown(places)}; {COPY}")
    sizes = [max(axis) + 1 for axis in zip(*known, strict=True)]
    for rank, place in enumerate(known):
        index = 0
        for size, at in zip(sizes, place, strict=True):
            index = index * size + at
        if index != rank or prod(sizes) != len(known):
            raise MismatchError(
                f"{where}: expected the part of rank {rank} in the file of rank {rank}, got that of place "
                f"{list(place)} in a mesh of {sizes}; files were swapped, or are of several saves; {COPY}"
            )


def _copies(where: str, values: Sequence[Tensor]) -> Whole:
    """One of several copies, which have to be equal."""
    if len({(tuple(x.shape), x.dtype) for x in values}) > 1:
        raise DamagedFileError(
            f"{where}: expected copies of one tensor on the ranks, got {shown([list(x.shape) for x in values])}; {COPY}"
        )

    def read() -> Tensor:
        if any(not torch.equal(values[0], x) for x in values[1:]) and torch.isfinite(values[0]).all():
            raise MismatchError(f"{where}: expected equal copies on the ranks, got others; {COPY}")
        return values[0]

    return Whole(tuple(values[0].shape), values[0].dtype, read)


# ---- flat buffers


def span(pieces: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Elements of a flat buffer that is in pieces, one after the other."""
    inside, at = [], 0
    for piece in pieces:
        low, high = max(start - at, 0), min(stop - at, len(piece))
        if low < high:
            inside.append(piece[low:high])
        at += len(piece)
    return inside[0] if len(inside) == 1 else torch.cat(inside) if inside else pieces[0][:0]


def shaped(pieces: Sequence[Tensor], start: int, shape: tuple[int, ...]) -> Whole:
    """A tensor whose elements are in a flat buffer from ``start`` on."""
    return Whole(shape, pieces[0].dtype, lambda: span(pieces, start, start + prod(shape)).reshape(shape))


def check_padding(where: str, padding: Tensor) -> None:
    """Check that what fills a buffer up is 0, as it always is: else parameters or ranks are in another order."""
    if padding.count_nonzero():
        raise DamagedFileError(
            f"{where}: expected {len(padding)} zeros behind the parameters, got other numbers; files of ranks were "
            f"swapped, or are of another model; {COPY}"
        )
