"""Archives written by ``torch.save``: checked byte by byte, then read without running anything in them.

Pickles before they are opened: nothing in one may take longer to look at than its length suggests.

A few hundred bytes can describe a tuple that holds another twice, which holds another twice, and so on; to hash it, as
an unpickler does with a key, or to print it then takes for ever. And some of what torch lets a pickle call makes large
values from small ones. So the instructions are gone through first, without carrying them out.
"""

from __future__ import annotations

import io
import mmap
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from entropy_probe.checkpoints.errors import CheckpointError, DamagedFileError, MissingFileError, UnsafeFileError
from entropy_probe.checkpoints.messages import first_line

__all__ = ["PLAIN", "UNREADABLE", "check_pickle", "read_archive", "read_archived"]

MOST_VALUES = 1000
"""Values in one tuple, at any depth."""

_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
PLAIN = {
    *(f"torch {kind}Storage" for kind in _STORAGES),
    *("torch.storage UntypedStorage", "torch Size", "torch device", "torch.serialization _get_layout"),
    *(f"torch._utils _rebuild_{what}" for what in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
    *("torch.nn.parameter Parameter", "collections OrderedDict"),
    *(f"torch {name}" for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")),
}
"""What ``torch.save`` names for dense tensors and plain values."""

_MADE_OF_OTHERS = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"}
_PUT, _GET = ("BINPUT", "LONG_BINPUT", "MEMOIZE", "PUT"), ("BINGET", "LONG_BINGET", "GET")


def _effect(opcode: pickletools.OpcodeInfo) -> tuple[int, bool, bool, bool]:
    """How many values it takes, besides those since a mark or not; whether it leaves one, and one made of them."""
    before = opcode.stack_before
    marked = pickletools.markobject in before
    count = before.index(pickletools.markobject) if marked else len(before)
    return count, marked, bool(opcode.stack_after), opcode.name in _MADE_OF_OTHERS


_EFFECTS = {opcode.name: _effect(opcode) for opcode in pickletools.opcodes}


def check_pickle(data: bytes, names: Collection[str] | None = None) -> None:
    """Go through a pickle without carrying it out.

    Args:
        data: the pickle.
        names: what it may name, as module and name with a space between; None for anything, where the unpickler looks.

    Raises:
        pickle.UnpicklingError: if it names something else, or a tuple in it holds too much.
        ValueError, LookupError: if it is malformed.
    """
    stack: list[int] = []  # of each value, how many it holds that it will always hold: 1 where they can still change
    outer: list[list[int]] = []  # the stacks below each mark
    memo: dict[Any, int] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _PUT:
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in _GET:
            stack.append(memo[argument])
        elif name == "MARK":
            outer.append(stack)
            stack = []
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "GLOBAL" and names is not None and argument not in names:
            raise pickle.UnpicklingError(f"it names {argument}"[:100])
        else:
            count, marked, leaves, made_of_them = _EFFECTS[name]
            held = sum(stack) if marked else 0
            if marked:
                stack = outer.pop()
            for _ in range(count):
                held += stack.pop()
            if held >= MOST_VALUES and made_of_them:
                raise pickle.UnpicklingError(f"it has a tuple of {MOST_VALUES} values or more")
            if leaves:
                stack.append(1 + held if made_of_them else 1)


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
