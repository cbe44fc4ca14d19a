"""Files of a checkpoint, read without running anything in them: JSON, archives of ``torch.save``, and other pickles.

Archives are checked byte by byte. Pickles are gone through before they are opened: nothing in one may take longer to
look at than its length suggests.

A few hundred bytes can describe a tuple that holds another twice, which holds another twice, and so on; to hash it, as
an unpickler does with a key, or to print it then takes for ever. And some of what torch lets a pickle call makes large
values from small ones. So the instructions are gone through first, without carrying them out.
"""

from __future__ import annotations

import io
import json
import mmap
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from entropy_probe.checkpoints.errors import (
    CheckpointError,
    DamagedFileError,
    MissingFileError,
    UnsafeFileError,
    first_line,
)

__all__ = [
    "PLAIN",
    "StandIn",
    "check_archive",
    "check_is_archive",
    "check_pickle",
    "one_line",
    "read_archive",
    "read_archived",
    "read_json",
    "read_with_stand_ins",
]

Built = TypeVar("Built")

MAX_VALUES = 1000
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
            if held >= MAX_VALUES and made_of_them:
                raise pickle.UnpicklingError(f"it has a tuple of {MAX_VALUES} values or more")
            if leaves:
                stack.append(1 + held if made_of_them else 1)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        DamagedFileError: if the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: expected JSON, got: {error}; copy the checkpoint again") from error
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path}: expected a JSON object, got {type(value).__name__}; copy the checkpoint again")
    return value


_REMEDY = "train with save_only_model=False, or copy the whole checkpoint again"
_PLAIN_ADAM = "pass a checkpoint with plain Adam state"
_LOCAL_HEADER = 30  # bytes before an entry's name; the lengths of name and extra field are its last four

_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError),
    *(AssertionError, EOFError, OSError, OverflowError, MemoryError, struct.error),
)
"""What a damaged or hostile pickle can raise inside a restricted unpickler."""


def read_archive(path: Path, instead: str = _PLAIN_ADAM) -> Any:
    """Tensors and plain values from an archive written by ``torch.save``.

    Every checksum is verified first: torch does not, so that a flipped bit would go unnoticed. Then the pickle is gone
    through, since torch would let it call more than tensors and plain values need. Tensors stay in the
    file, mapped into memory, until they are used. ``weights_only=True`` is passed explicitly, which the environment
    variable ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` does not override.

    Args:
        path: the file.
        instead: what to do about one that holds something else, for messages.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds anything but tensors and plain values.
    """
    check_is_archive(path)
    with one_line(str(path), instead):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            check_archive(str(path), file, data)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_is_archive(path: Path) -> None:
    """Check that there is a file, and that it begins and ends as an archive.

    Raises:
        CheckpointError: if not.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: expected the optimizer's state, found no such file; {_REMEDY}")
    size = path.stat().st_size
    if size == 0 or not zipfile.is_zipfile(path):
        raise DamagedFileError(
            f"{path}: expected an archive written by torch.save, got {size} bytes that are none (empty, cut "
            f"short or another format); {_REMEDY}"
        )


def read_archived(data: bytes, where: str) -> Any:
    """The same from an archive that is a part of a file.

    Args:
        data: the archive.
        where: file and part, for messages.

    Raises:
        CheckpointError: as :func:`read_archive`.
    """
    with one_line(where):
        check_archive(where, io.BytesIO(data), data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class StandIn:
    """In place of any class that a pickle may name: it holds what was stored and does nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)
        else:
            self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, stand_ins: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._stand_ins = stand_ins

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a class, if the pickle may name it."""
        if (module, name) not in self._stand_ins:
            raise pickle.UnpicklingError(f"it names {module}.{name}"[:100])
        return self._stand_ins[module, name]


def read_with_stand_ins(
    path: Path, stand_ins: Mapping[tuple[str, str], Any], what: str, build: Callable[[Any], Built]
) -> Built:
    """What is made of a bare pickle, in which every class is replaced by one that does nothing.

    Args:
        path: the file.
        stand_ins: by module and name what the pickle may name, and what takes its place.
        what: the kind of file, and of what, for messages.
        build: makes the result of what was unpickled; it may raise whatever malformed values give.

    Raises:
        CheckpointError: if the file names anything else, is damaged, or ``build`` refuses it.
    """
    kind = what.partition(" of ")[0]
    try:
        data = path.read_bytes()
        check_pickle(data)
        return build(_Unpickler(data, stand_ins).load())
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"{path}: expected an {what}, got a pickle that is none ({first_line(error, 100)}); nothing in it was run; "
            "copy the checkpoint again"
        ) from error
    except CheckpointError:
        raise
    except _UNREADABLE as error:
        raise DamagedFileError(
            f"{path}: expected an intact {kind}, got: {first_line(error)}; copy the checkpoint again"
        ) from error


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
def one_line(where: str, instead: str = _PLAIN_ADAM) -> Iterator[None]:
    """Turn what reading an archive raises into one line; ``instead`` as in :func:`read_archive`."""
    try:
        yield
    except zipfile.BadZipFile as error:
        raise DamagedFileError(f"{where}: expected an intact archive, got: {error}; {_REMEDY}") from error
    except CheckpointError:
        raise
    except _UNREADABLE as error:
        cause = _cause(error)
        maker = next((f"; this is state of {name}" for word, name in _MAKERS.items() if word in cause), "")
        raise UnsafeFileError(
            f"{where}: expected tensors and plain values, got data that weights_only=True refuses "
            f"({cause}); nothing in it was run{maker}; {instead}"
        ) from error


def _cause(error: Exception) -> str:
    """What torch objected to, without its advice to load the file the unsafe way."""
    match = re.search(r"WeightsUnpickler error: (.+)", str(error))
    return match.group(1)[:160] if match else first_line(error, 160)


def check_archive(
    where: str, file: io.BufferedIOBase, data: bytes | mmap.mmap, names: Collection[str] = frozenset(PLAIN)
) -> None:
    """Every entry is stored as it is, lies within the data, and has its checksum; the pickle names nothing else.

    Raises:
        CheckpointError: if one does not.
        pickle.UnpicklingError: if the pickle names something else.
    """
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
                    check_pickle(bytes(content), names)
