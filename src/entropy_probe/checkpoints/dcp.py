"""Directories of ``torch.distributed.checkpoint``: tensors in shards, and an index of them, ``.metadata``.

The index is a pickle. It is read with stand-ins for the few classes it may name, so that nothing in it runs, not even
torch's own code, and then checked against the files: every tensor is covered by its shards exactly once, and no shard
claims more data than the file has. No process group is needed. Format: ``torch.distributed.checkpoint.metadata`` and
``filesystem`` of torch 2.3 and later.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.checkpoints.errors import (
    DamagedFileError,
    MissingFileError,
    UnsafeFileError,
    UnsupportedError,
    shown,
)
from entropy_probe.checkpoints.pickles import DTYPES, whole_numbers
from entropy_probe.checkpoints.safe_read import StandIn, is_file_name, read_archived, read_with_stand_ins

METADATA = ".metadata"
Place = tuple[Any, ...]
"""Where an entry is in the nested dictionary that was saved."""
_Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a part of a tensor."""

_COPY = "copy the checkpoint again"
_MAX_CORNERS = 10**7
"""Corners of all shards of one tensor."""
_CLASSES = (
    *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex"),
    *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
)
_ALLOWED: dict[tuple[str, str], Any] = {
    **{("torch.distributed.checkpoint.metadata", name): type(name, (StandIn,), {}) for name in _CLASSES},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StandIn,
    ("torch.serialization", "_get_layout"): StandIn,
    ("torch", "Size"): whole_numbers,
    **{("pathlib", name): StandIn for name in ("PosixPath", "WindowsPath", "PurePosixPath", "Path")},
    **{("pathlib._local", name): StandIn for name in ("PosixPath", "WindowsPath")},
    ("collections", "OrderedDict"): dict,
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
}


@dataclass(frozen=True)
class _Shard:
    """A box of a tensor, or a whole value, in a part of a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    """A tensor, or with ``dtype`` None any other value, and where it is stored."""

    name: str
    place: Place
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    shards: tuple[_Shard, ...]


@dataclass(frozen=True)
class ShardedDirectory:
    """A directory whose index was read and checked; ``entries`` by their place in what was saved."""

    path: Path
    entries: dict[Place, Entry]

    @classmethod
    def open(cls, path: Path) -> ShardedDirectory:
        """Read and check the index; of the files with data only their sizes are looked at."""
        file = path / METADATA
        if not file.is_file():
            raise MissingFileError(f"{file}: expected the index of a sharded checkpoint, found none; {_COPY}")
        entries = read_with_stand_ins(
            file, _ALLOWED, "index of tensors and values", lambda index: {e.place: e for e in _entries(file, index)}
        )
        directory = cls(path, entries)
        directory._check_files()
        return directory

    @property
    def size(self) -> int:
        """Bytes of the files with data."""
        return sum(self._file_sizes.values())

    def _check_files(self) -> None:
        where, sizes, declared = self.path / METADATA, self._file_sizes, 0
        for entry in self.entries.values():
            for shard in entry.shards:
                claimed = 0 if entry.dtype is None else math.prod(shard.sizes) * entry.dtype.itemsize
                declared += claimed
                if not claimed <= shard.length <= sizes[shard.file] - shard.start:
                    raise DamagedFileError(
                        f"{where}: {entry.name}: expected {claimed:,} bytes within the {sizes[shard.file]:,} of "
                        f"{shard.file}, got {shard.length:,} from {shard.start:,}; {_COPY}"
                    )
        if declared > self.size:
            raise DamagedFileError(
                f"{where}: expected tensors of at most the files' {self.size:,} bytes, got {declared:,} "
                f"declared by tensors that share their data; {_COPY}"
            )
        for entry in self.entries.values():
            _check_cover(f"{where}: {entry.name}", entry)

    @cached_property
    def _file_sizes(self) -> dict[str, int]:
        """Bytes of each file that the index names, all of them files beside it."""
        sizes: dict[str, int] = {}
        for shard in (shard for entry in self.entries.values() for shard in entry.shards):
            if not is_file_name(shard.file):
                raise UnsafeFileError(
                    f"{self.path / METADATA}: expected files beside it, got {shown(shard.file, 100)}; it was not read"
                )
            if shard.file not in sizes:
                file = self.path / shard.file
                if not file.is_file():
                    raise MissingFileError(f"{file}: expected the shard that {METADATA} names; {_COPY}")
                sizes[shard.file] = file.stat().st_size
        return sizes

    def read(self, entry: Entry) -> Any:
        """A tensor put together from its shards, or a plain value."""
        if entry.dtype is None:
            return self._stored(entry, entry.shards[0])
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for shard in entry.shards:
            part = self._stored(entry, shard)
            if not (type(part) is Tensor and part.dtype == entry.dtype and tuple(part.shape) == shard.sizes):
                got = f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
                raise DamagedFileError(
                    f"{self.path / shard.file}: {entry.name}: expected {entry.dtype} {list(shard.sizes)}, got {got}; "
                    f"{_COPY}"
                )
            box = tuple(slice(at, at + n) for at, n in zip(shard.offsets, shard.sizes, strict=True))
            whole[box] = part
        return whole

    def _stored(self, entry: Entry, shard: _Shard) -> Any:
        file = self.path / shard.file
        with file.open("rb") as stream:
            stream.seek(shard.start)
            return read_archived(stream.read(shard.length), f"{file}: {entry.name}")


def _entries(file: Path, index: Any) -> Iterator[Entry]:
    """The entries of an index as it was unpickled, with any error that malformed ones give."""
    stored: dict[tuple[str, tuple[int, ...] | None], Any] = {}
    for key, info in index.storage_data.items():
        name, offset = _name(key.fqn), getattr(key, "offset", None)  # a value has none
        at = None if offset is None else whole_numbers(offset)
        if (name, at) in stored:
            raise ValueError(f"two places for {name}")
        if getattr(info, "transform_descriptors", None):
            raise UnsupportedError(
                f"{file}: {name}: not supported: transformed (compressed) shards; save without extensions"
            )
        stored[name, at] = info
    for name, meta in index.state_dict_metadata.items():
        place = (index.planner_data or {})[_name(name)]
        if not (type(place) is tuple and place and all(type(part) in (str, int) for part in place)):
            raise TypeError(f"place {shown(place)} of {name}")
        if ".".join(map(str, place)) != name:
            raise ValueError(f"place {shown(place)} of {name}")
        if type(meta).__name__ == "BytesStorageMetadata":
            yield Entry(name, place, None, (), (_shard((), (), stored[name, None]),))
            continue
        dtype, shape = meta.properties.state[0], whole_numbers(meta.size)
        if not isinstance(dtype, torch.dtype) or math.prod(max(n, 1) for n in shape) >= 2**60:
            raise TypeError(f"dtype or size of {name}")
        chunks = [(whole_numbers(c.offsets), whole_numbers(c.sizes)) for c in meta.chunks]
        shards = tuple(_shard(offsets, sizes, stored[name, offsets]) for offsets, sizes in chunks)
        yield Entry(name, place, dtype, shape, shards)


def _name(value: Any) -> str:
    if not (type(value) is str and value.isprintable()):
        raise TypeError(f"the name {shown(value)}")
    return value


def _shard(offsets: tuple[int, ...], sizes: tuple[int, ...], info: Any) -> _Shard:
    start, length = whole_numbers((info.offset, info.length))
    if type(info.relative_path) is not str:
        raise TypeError(f"the file {shown(info.relative_path)}")
    return _Shard(offsets, sizes, info.relative_path, start, length)


def _check_cover(where: str, entry: Entry) -> None:
    """The shards of a tensor make it up, each element once."""
    if entry.dtype is None:
        return
    boxes = [(shard.offsets, shard.sizes) for shard in entry.shards]
    dims = len(entry.shape)
    if len(boxes) << dims > _MAX_CORNERS:
        raise UnsupportedError(
            f"{where}: not supported: {len(boxes):,} shards of {dims} dimensions; save it from fewer ranks"
        )
    inside = all(
        len(offsets) == len(sizes) == dims
        and all(at + n <= whole for at, n, whole in zip(offsets, sizes, entry.shape, strict=True))
        for offsets, sizes in boxes
    )
    if not inside or not make_up(entry.shape, boxes):
        covered = sum(math.prod(sizes) for _, sizes in boxes)
        raise DamagedFileError(
            f"{where}: expected shards that make up {list(entry.shape)}, got {len(boxes)} with {covered:,} elements; "
            f"{_COPY}"
        )


def make_up(shape: tuple[int, ...], boxes: Iterable[_Box]) -> bool:
    """Whether boxes make up a tensor: all of it, and no element twice.

    What is 1 inside a box and 0 outside is a product over dimensions of a step up and a step down, so it is known by
    the box's corners, each with the sign of its number of upper ends. Boxes make up the whole exactly if these add up
    to those of the whole; the time is in proportion to their number.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for weight, (offsets, sizes) in ((1, ((0,) * len(shape), shape)), *((-1, box) for box in boxes)):
        for ends in product((0, 1), repeat=len(shape)):
            corner = tuple(at + n * end for at, n, end in zip(offsets, sizes, ends, strict=True))
            corners[corner] += weight * (-1) ** sum(ends)
    return not any(corners.values())
