"""Archives of ``torch.save`` that name a trainer's own classes: tensors are mapped from the file, the rest is inert.

torch would build a ``DTensor`` while it reads one, and asks for DeepSpeed to read DeepSpeed's files. Here every name
that a format lists has a stand-in of ours and any other is refused; nothing of torch or of a trainer is called.
"""

from __future__ import annotations

import mmap
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_probe.checkpoints.archives import check_archive
from entropy_probe.checkpoints.errors import MismatchError, UnsupportedError
from entropy_probe.checkpoints.pickles import DTYPES, STORAGES, whole_numbers
from entropy_probe.checkpoints.safe_read import StandIn, Unpickler, check_is_archive, one_line, one_of

Names = Mapping[tuple[str, str], Any]
"""By module and name what a pickle may name, and what takes its place."""


class _Storage(NamedTuple):
    """Where a tensor's data are."""

    data: Tensor
    dtype: torch.dtype


class _Plain(dict[Any, Any]):
    """In place of ``OrderedDict``; what a state dict has besides its entries is dropped."""

    def __setstate__(self, state: Any) -> None:
        """Nothing."""


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of the data of a storage, in which no element is twice."""
    shape, strides = whole_numbers(size), whole_numbers(stride)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise pickle.UnpicklingError("it has a tensor without a storage of its own")
    if 0 in shape:
        return torch.empty(shape, dtype=storage.dtype)
    (offset,) = whole_numbers((offset,))
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if last >= len(storage.data):
        raise pickle.UnpicklingError("it has a tensor larger than its data")
    if any(n > 1 and step == 0 for n, step in zip(shape, strides, strict=True)):
        raise pickle.UnpicklingError("it has a tensor that repeats its data")
    return storage.data.as_strided(shape, strides, storage.data.storage_offset() + offset)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


TENSORS: Names = {
    **{("torch", f"{kind}Storage"): dtype for kind, dtype in STORAGES.items()},
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch", "Size"): whole_numbers,
    ("torch", "device"): StandIn,
    ("torch.serialization", "_get_layout"): StandIn,
    **{("torch._utils", name): _tensor for name in ("_rebuild_tensor", "_rebuild_tensor_v2")},
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.nn.parameter", "Parameter"): StandIn,
    ("collections", "OrderedDict"): _Plain,
}


class _Unpickler(Unpickler):
    def __init__(self, data: bytes, names: Names, storages: Mapping[str, Tensor]) -> None:
        super().__init__(data, one_of(names))
        self._storages = storages

    def persistent_load(self, pid: Any) -> _Storage:
        """The data of a storage, which are in an entry of their own."""
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(numel) is not int:
            raise pickle.UnpicklingError("it has a storage that is none")
        data = self._storages[key]
        if numel * dtype.itemsize != len(data):
            raise pickle.UnpicklingError("it has a storage of another size than its data")
        if data.storage_offset() % dtype.itemsize:
            data = data.clone()
        return _Storage(data.view(dtype), dtype)


def read_objects(path: Path, names: Names, instead: str) -> Any:
    """What ``torch.save`` wrote to a file, every class replaced by one that does nothing.

    Checksums are verified and the pickle is gone through as by ``read_archive``. Tensors stay in the file, mapped into
    memory, until they are used. ``names`` are those it may name besides tensors and plain values; ``instead`` is the
    remedy for one that holds something else.
    """
    check_is_archive(path)
    allowed = {**TENSORS, **names}
    with one_line(str(path), instead):
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants memory that it may write
            contents = check_archive(str(path), file, data, {" ".join(name) for name in allowed})
        (main,) = (name for name in contents if name.endswith("/data.pkl"))
        folder = main.removesuffix("data.pkl")
        order = contents.get(f"{folder}byteorder")
        if order is not None and data[order.start : order.stop] == b"big":
            raise UnsupportedError(f"{path}: not supported: numbers of a big-endian machine; save it on another")
        whole, at = torch.frombuffer(data, dtype=torch.uint8), contents[main]
        storages = {
            name.removeprefix(f"{folder}data/"): whole[place.start : place.stop]
            for name, place in contents.items()
            if name.startswith(f"{folder}data/")
        }
        _check_name(path, folder.removesuffix("/"))
        return _Unpickler(data[at.start : at.stop], allowed, storages).load()


def _check_name(path: Path, folder: str) -> None:
    """``torch.save`` calls the folder in an archive after the file it writes, so one under another name shows."""
    rank = re.compile(r"rank_\d+")
    if rank.search(folder) and folder != path.stem:
        raise MismatchError(
            f"{path}: expected what was saved under this name, got what was saved as {folder:.100}.pt; files were "
            "swapped or renamed, copy the checkpoint again"
        )
