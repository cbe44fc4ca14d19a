"""Archives written by ``torch.save``: checked byte by byte, then read without running anything in them."""

from __future__ import annotations

import io
import mmap
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from entropy_probe.checkpoints.errors import CheckpointError, DamagedFileError, MissingFileError, UnsafeFileError
from entropy_probe.checkpoints.messages import first_line
from entropy_probe.checkpoints.pickles import PLAIN, check_pickle

__all__ = ["UNREADABLE", "read_archive", "read_archived"]

_REMEDY = "train with save_only_model=False, or copy the whole checkpoint again"
_LOCAL_HEADER = 30  # bytes before an entry's name; the lengths of name and extra field are its last four

UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError),
    *(AssertionError, EOFError, OSError, OverflowError, MemoryError, struct.error),
)
"""What a damaged or hostile pickle can raise inside a restricted unpickler."""


def read_archive(path: Path) -> Any:
    """Tensors and plain values from an archive written by ``torch.save``.

    Every checksum is verified first: torch does not, so that a flipped bit would go unnoticed. Then the pickle is gone
    through, since torch would let it call more than tensors and plain values need. Tensors stay in the
    file, mapped into memory, until they are used. ``weights_only=True`` is passed explicitly, which the environment
    variable ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` does not override.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds anything but tensors and plain values.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: expected the optimizer's state, found no such file; {_REMEDY}")
    size = path.stat().st_size
    if size == 0 or not zipfile.is_zipfile(path):
        raise DamagedFileError(
            f"{path}: expected an archive written by torch.save, got {size} bytes that are none (empty, cut "
            f"short or another format); {_REMEDY}"
        )
    with _one_line(str(path)):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check_entries(str(path), file, data)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def read_archived(data: bytes, where: str) -> Any:
    """The same from an archive that is a part of a file.

    Args:
        data: the archive.
        where: file and part, for messages.

    Raises:
        CheckpointError: as :func:`read_archive`.
    """
    with _one_line(where):
        _check_entries(where, io.BytesIO(data), data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


_MAKERS = {
    "galore_torch": "GaLore",
    "apollo_torch": "APOLLO",
    "torchao": "an optimizer of torchao",
    "bitsandbytes": "bitsandbytes",
    "deepspeed": "DeepSpeed",
    "torch.distributed": "an optimizer sharded over ranks, saved as DTensors",
    "megatron": "Megatron",
}
"""Libraries whose objects an optimizer's file may hold, by a part of their name."""


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    try:
        yield
    except zipfile.BadZipFile as error:
        raise DamagedFileError(f"{where}: expected an intact archive, got: {error}; {_REMEDY}") from error
    except CheckpointError:
        raise
    except UNREADABLE as error:
        cause = _cause(error)
        maker = next((f"; this is state of {name}" for word, name in _MAKERS.items() if word in cause), "")
        raise UnsafeFileError(
            f"{where}: expected tensors and plain values, got data that weights_only=True refuses "
            f"({cause}); nothing in it was run{maker}; pass a checkpoint with plain Adam state"
        ) from error


def _cause(error: Exception) -> str:
    """What torch objected to, without its advice to load the file the unsafe way."""
    found = re.search(r"WeightsUnpickler error: (.+)", str(error))
    return found.group(1)[:160] if found else first_line(error, 160)


def _check_entries(where: str, file: io.BufferedIOBase, data: bytes | mmap.mmap) -> None:
    """Every entry is stored as it is, lies within the data, and has its checksum; the pickle is plain."""
    with zipfile.ZipFile(file) as archive, memoryview(data) as view:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise UnsafeFileError(
                    f"{where}: {entry.filename}: expected data as torch.save stores it, got a compressed or encrypted "
                    "entry, which can unpack to any size; save it again with torch.save"
                )
            start = entry.header_offset + _LOCAL_HEADER
            lengths = bytes(view[start - 4 : start])
            start += int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            with view[start : start + entry.file_size] as content:
                if len(content) != entry.file_size or zlib.crc32(content) != entry.CRC:
                    raise DamagedFileError(
                        f"{where}: expected intact data, got a wrong checksum in {entry.filename}; {_REMEDY}"
                    )
                if entry.filename.lower().endswith("data.pkl"):  # torch does not look at the case
                    check_pickle(bytes(content), PLAIN)
