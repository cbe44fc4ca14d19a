"""Archives of ``torch.save``, checked byte by byte before anything in them is used.

A zip archive can be made so that two readers find different things in it: two directories, of which one looks for the
last and the other goes by an offset; entries over each other; data before the first. So what is accepted is only what
``torch.save`` writes, in which all readers find the same, and torch's own reader is asked where it finds it.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from entropy_probe.checkpoints.errors import DamagedFileError, UnsafeFileError
from entropy_probe.checkpoints.pickles import PLAIN, check_pickle

MAX_DIRECTORY = 2**26
"""Bytes of an archive's directory, which has about a hundred for each tensor."""
MAX_PICKLE = 2**27
"""Bytes of the pickle in an archive, which has about a hundred for each tensor."""
MAKERS = {
    "galore_torch": "GaLore",
    "apollo_torch": "APOLLO",
    "torchao": (
        "an optimizer of torchao; in an environment with torchao: import torch, torchao.optim; "
        "s = torch.load('optimizer.pt', weights_only=True); [e.update({k: x.dequantize() for k, x in e.items() if k != "
        "'step'}) for e in s['state'].values()]; torch.save(s, 'optimizer.pt')"
    ),
    "bitsandbytes": "bitsandbytes",
    "deepspeed": "DeepSpeed",
    "torch.distributed": "an optimizer sharded over ranks, saved as DTensors",
    "megatron": "Megatron",
}
"""Libraries whose objects an optimizer's file may hold, by a part of their name, and how to convert them."""

_LOCAL_HEADER = 30  # bytes before an entry's name; the lengths of name and extra field are its last four
_END, _END64, _LOCATOR64 = 22, 56, 20  # bytes of the records after the directory, as torch.save writes them


def check_archive(
    where: str, file: io.BufferedIOBase, data: bytes | mmap.mmap, names: Collection[str] | None = frozenset(PLAIN)
) -> dict[str, range]:
    """By name the place of each entry's content: stored as it is, apart from the others, with the right checksum.

    ``names`` are what its pickle may name, as in ``check_pickle``.

    Raises:
        CheckpointError: if it is none of that.
        zipfile.BadZipFile: if it is no archive at all.
        pickle.UnpicklingError: if the pickle names something else.
    """
    if not zipfile.is_zipfile(file):
        raise zipfile.BadZipFile("File is not a zip file")
    with memoryview(data) as view:
        directory = _directory(where, view)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        contents = _contents(where, view, entries, directory)
        for entry in entries:
            content = contents[entry.filename]
            with view[content.start : content.stop] as content:
                if zlib.crc32(content) != entry.CRC:
                    raise DamagedFileError(
                        f"{where}: expected intact data, got a wrong checksum in {entry.filename}; copy the whole "
                        "checkpoint again"
                    )
                if entry.filename.lower().endswith("data.pkl"):  # torch does not look at the case
                    if len(content) > MAX_PICKLE:
                        raise _crafted(where, f"a pickle of {len(content):,} bytes")
                    _check_plain(bytes(content), names)
    return contents


def check_same_reading(where: str, source: Path | bytes, contents: Mapping[str, range]) -> None:
    """That torch finds the entries that were checked, all of them, at the same places."""
    reader: Any = torch._C.PyTorchFileReader(str(source) if isinstance(source, Path) else io.BytesIO(source))
    folder = next(iter(contents), "").partition("/")[0]
    places = {f"{folder}/{name}": reader.get_record_offset(name) for name in reader.get_all_records()}
    if places != {name: content.start for name, content in contents.items()}:
        raise _crafted(where, "entries that torch finds elsewhere")
    if reader.has_record("data.pkl") and len(reader.get_record("data.pkl")) != len(contents[f"{folder}/data.pkl"]):
        raise _crafted(where, "a pickle that torch finds another length of")


def _crafted(where: str, what: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{where}: expected an archive as torch.save writes it, got {what}; it was not opened, save it again with "
        "torch.save"
    )


def _directory(where: str, view: memoryview) -> int:
    """Where the directory begins, which ends where the records at the archive's end begin."""
    end = len(view) - _END
    if bytes(view[:4]) != b"PK\3\4" or end < 0 or bytes(view[end : end + 4]) != b"PK\5\6":
        raise _crafted(where, "something before or behind one")
    size, start = struct.unpack("<2L", view[end + 12 : end + 20])
    locator = max(end - _LOCATOR64, 0)
    if bytes(view[locator : locator + 4]) == b"PK\6\7":
        end = locator - _END64
        (place,) = struct.unpack("<Q", view[locator + 8 : locator + 16])
        if place != end or bytes(view[end : end + 4]) != b"PK\6\6":
            raise _crafted(where, "a second directory")
        size, start = struct.unpack("<2Q", view[end + 40 : end + 56])
    if start + size != end:
        raise _crafted(where, "a second directory")
    if size > MAX_DIRECTORY:
        raise _crafted(where, f"a directory of {size:,} bytes")
    return start


def _contents(where: str, view: memoryview, entries: Collection[zipfile.ZipInfo], directory: int) -> dict[str, range]:
    """By name the place of each content, none of which reaches into another entry or the directory."""
    if len({entry.filename.lower() for entry in entries}) < len(entries):  # torch does not look at the case
        raise _crafted(where, "two entries of one name")
    contents, free = {}, 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise UnsafeFileError(
                f"{where}: {entry.filename}: expected data as torch.save stores it, got a compressed or encrypted "
                "entry, which can unpack to any size; save it again with torch.save"
            )
        start = entry.header_offset + _LOCAL_HEADER
        if entry.header_offset < free or start > directory or bytes(view[start - 30 : start - 26]) != b"PK\3\4":
            raise _crafted(where, f"an entry {entry.filename} over another")
        start += sum(struct.unpack("<2H", view[start - 4 : start]))
        free = start + entry.file_size
        if free > directory:
            raise _crafted(where, f"an entry {entry.filename} over the directory")
        contents[entry.filename] = range(start, free)
    return contents


def _check_plain(data: bytes, names: Collection[str] | None) -> None:
    """Check a pickle of an archive, and name the library whose objects it holds where it may not."""
    try:
        check_pickle(data, names)
    except pickle.UnpicklingError as error:
        maker = next((word for word in MAKERS if names is not None and word.encode() in data), None)
        raise pickle.UnpicklingError(f"{error}{f', of {maker}' if maker else ''}") from error
