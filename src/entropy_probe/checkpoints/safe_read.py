"""Files of a checkpoint, read without running anything in them: JSON, archives of ``torch.save``, and other pickles.

Archives are checked byte by byte, pickles gone through before they are opened.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from entropy_probe.checkpoints.archives import MAKERS, check_archive, check_same_reading
from entropy_probe.checkpoints.errors import (
    CheckpointError,
    DamagedFileError,
    MissingFileError,
    UnsafeFileError,
    first_line,
)
from entropy_probe.checkpoints.pickles import STORAGES, check_pickle

Built = TypeVar("Built")

MAX_SETTINGS = 2**20
"""Bytes of a file of settings: a trainer's has about ten thousand."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: expected JSON, got: {error}; copy the checkpoint again") from error
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path}: expected a JSON object, got {type(value).__name__}; copy the checkpoint again")
    return value


def is_file_name(value: str) -> bool:
    """Whether a name in a file can be that of an entry beside it, and nothing else."""
    if not value.isprintable() or value in ("", ".", ".."):
        return False
    return Path(value).name == value and len(os.fsencode(value)) <= 255


_REMEDY = "train with save_only_model=False, or copy the whole checkpoint again"
_PLAIN_ADAM = "pass a checkpoint with plain Adam state"

_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError),
    *(AssertionError, EOFError, OSError, OverflowError, MemoryError, struct.error),
)
"""What a damaged or hostile pickle can raise inside a restricted unpickler."""


def read_archive(path: Path, instead: str = _PLAIN_ADAM) -> Any:
    """Tensors and plain values from an archive written by ``torch.save``.

    Every checksum is verified first: torch does not, so that a flipped bit would go unnoticed. Then the pickle is gone
    through, since torch would let it call more than tensors and plain values need, and torch's reader is asked whether
    it finds the same. Tensors stay in the file, mapped into memory, until they are used. ``weights_only=True`` is
    passed explicitly, which the environment variable ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` does not override.

    ``instead`` is the remedy for one that holds something else.
    """
    check_is_archive(path)
    with one_line(str(path), instead):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            contents = check_archive(str(path), file, data)
            check_same_reading(str(path), path, contents)
            _check_storages(data, contents)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_is_archive(path: Path) -> None:
    """Check that there is a file, and that it begins and ends as an archive."""
    if not path.is_file():
        raise MissingFileError(f"{path}: expected the optimizer's state, found no such file; {_REMEDY}")
    size = path.stat().st_size
    if size == 0 or not zipfile.is_zipfile(path):
        raise DamagedFileError(
            f"{path}: expected an archive written by torch.save, got {size} bytes that are none (empty, cut "
            f"short or another format); {_REMEDY}"
        )


def read_archived(data: bytes, where: str) -> Any:
    """The same from an archive that is a part of a file."""
    with one_line(where):
        contents = check_archive(where, io.BytesIO(data), data)
        check_same_reading(where, data, contents)
        _check_storages(data, contents)
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


class Inert:
    """In place of whatever a pickle names, and of whatever it makes of that: it holds what was stored, does nothing.

    Without a ``__dict__``, so that nothing stored can take the place of a method.

    Attributes:
        named: of the class, what the pickle named: module and name with a dot between.
        arguments: what it would have been called with.
        state: what it would have been filled with, if anything.
    """

    __slots__ = ("arguments", "state")
    named: ClassVar[str] = ""

    def __new__(cls, *arguments: Any, **more: Any) -> Inert:
        """One that holds its arguments."""
        made = super().__new__(cls)
        made.arguments, made.state = (*arguments, *more.values()), None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """What is stored item by item is not looked at."""

    def append(self, value: Any) -> None:
        """The same."""

    extend = append


class Unpickler(pickle.Unpickler):
    """In place of every class that a pickle names it takes what ``stand_in`` gives for module and name."""

    def __init__(self, data: bytes, stand_in: Callable[[str, str], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._stand_in = stand_in

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a class, if the pickle may name it."""
        return self._stand_in(module, name)


class _Sizes(Unpickler):
    """Of what a checked pickle has, only how long it takes each storage to be."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, _inert)
        self.sizes: set[tuple[str, int]] = set()

    def persistent_load(self, pid: Any) -> None:
        """The key of a storage, and its bytes."""
        _, kind, key, _, numel = pid
        element = kind.named.removeprefix("torch.").removesuffix("Storage")
        self.sizes.add((key, numel * STORAGES.get(element, torch.uint8).itemsize))


def _check_storages(data: bytes | mmap.mmap, contents: Mapping[str, range]) -> None:
    """Every storage is as long as its entry: torch would go on into the next one.

    Raises:
        pickle.UnpicklingError: if one is not.
    """
    by_name = {name.partition("/")[2]: place for name, place in contents.items()}
    place = by_name["data.pkl"]
    reader = _Sizes(data[place.start : place.stop])
    reader.load()
    lengths = {name.removeprefix("data/"): len(place) for name, place in by_name.items()}
    wrong = next((key for key, size in reader.sizes if lengths.get(key) != size), None)
    if wrong is not None:
        raise pickle.UnpicklingError(f"it has a storage {wrong!r:.40} of another size than its data")


@cache
def _inert(module: str, name: str) -> type[Inert]:
    return type("Inert", (Inert,), {"__slots__": (), "named": f"{module}.{name}"})


def read_with_stand_ins(
    path: Path, stand_ins: Mapping[tuple[str, str], Any], what: str, build: Callable[[Any], Built]
) -> Built:
    """What is made of a bare pickle, in which every class is replaced by its stand-in, which does nothing.

    ``build`` makes the result of what was unpickled; it may raise whatever malformed values give.
    """
    return _unpickled(path, Path.read_bytes, one_of(stand_ins), what, build, "copy the checkpoint again")


def one_of(stand_ins: Mapping[tuple[str, str], Any]) -> Callable[[str, str], Any]:
    """For an unpickler that takes names which are listed with their stand-ins, and no others."""

    def stand_in(module: str, name: str) -> Any:
        if (module, name) not in stand_ins:
            raise pickle.UnpicklingError(f"it names {module}.{name}"[:100])
        return stand_ins[module, name]

    return stand_in


def read_inert(path: Path, what: str, build: Callable[[Any], Built], remedy: str) -> Built:
    """The same of the pickle in an archive of ``torch.save``, with :class:`Inert` for whatever it names."""
    return _unpickled(path, _archived_pickle, _inert, what, build, remedy)


def _archived_pickle(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_SETTINGS:
        raise UnsafeFileError(
            f"{path}: expected settings of at most {MAX_SETTINGS:,} bytes, got {size:,}; it was not opened"
        )
    data = path.read_bytes()
    contents = check_archive(str(path), io.BytesIO(data), data, None)
    (place,) = (place for name, place in contents.items() if name.lower().endswith("data.pkl"))
    return data[place.start : place.stop]


def _unpickled(
    path: Path,
    read: Callable[[Path], bytes],
    stand_in: Callable[[str, str], Any],
    what: str,
    build: Callable[[Any], Built],
    remedy: str,
) -> Built:
    kind = what.partition(" of ")[0]
    try:
        data = read(path)
        check_pickle(data)
        return build(Unpickler(data, stand_in).load())
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"{path}: expected an {what}, got a pickle that is none ({first_line(error, 100)}); nothing in it was run; "
            f"{remedy}"
        ) from error
    except CheckpointError:
        raise
    except (*_UNREADABLE, zipfile.BadZipFile) as error:
        raise DamagedFileError(f"{path}: expected an intact {kind}, got: {first_line(error)}; {remedy}") from error


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
        maker = next((f"; this is state of {name}" for word, name in MAKERS.items() if word in cause), "")
        raise UnsafeFileError(
            f"{where}: expected tensors and plain values, got data that weights_only=True refuses "
            f"({cause}); nothing in it was run{maker}; {instead}"
        ) from error


def _cause(error: Exception) -> str:
    """What torch objected to, without its advice to load the file the unsafe way."""
    match = re.search(r"WeightsUnpickler error: (.+)", str(error))
    return match.group(1)[:160] if match else first_line(error, 160)
