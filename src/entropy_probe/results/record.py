"""Plain, validated data and the JSON files it lives in."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator


class Record(BaseModel):
    """Plain data: frozen, every key known, no number that is not finite; errors never show a value, a key perhaps."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True
    )  # it may be a key


LARGEST_WHOLE, LARGEST = 2**63 - 1, 2.0**127
"""What int64 and float32 hold."""


class Settings(Record):
    """What a user sets: a number is one, which true and false are not, and one that tensors hold; text is in UTF-8."""

    @field_validator("*", mode="before")
    @classmethod
    def _check_texts(cls, value: Any) -> Any:
        for item in () if isinstance(value, Mapping) else _items(value):  # a section has its own fields
            if isinstance(item, str | Path):
                check_utf8(item)
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _check_numbers(cls, value: Any, info: Any) -> Any:
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        if not kinds & {int, float}:
            return value
        largest = LARGEST if float in kinds else LARGEST_WHOLE
        for item in _items(value):
            if isinstance(item, bool) and bool not in kinds:
                raise ValueError(f"expected a number, got {str(item).lower()}; write the number")
            if isinstance(item, int | float) and largest < abs(item) != float("inf"):  # pydantic refuses infinity
                raise ValueError(f"expected a number of at most {largest:.4g}, got {item!s:.60}; correct it")
        return value


def check_utf8(text: str | Path) -> None:
    """Refuse text, or a path, that cannot be saved in a result.

    Raises:
        ValueError: if it has bytes that are not UTF-8.
    """
    if any("\ud800" <= c <= "\udfff" for c in str(text)):
        raise ValueError(f"expected text in UTF-8, which results are saved in, got {str(text)!a:.200}; rename it")


def _items(value: Any) -> Iterator[Any]:
    """What lists and mappings hold, however deep, or the value itself."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
    if inner is None:
        yield value
    else:
        for item in inner:
            yield from _items(item)


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    inner = get_args(annotation)
    return {annotation} if not inner else set().union(*map(_kinds, inner))


_REMEDIES = {
    errno.ENOSPC: "make room and give the same command again",
    errno.EDQUOT: "make room and give the same command again",
    errno.EACCES: "change its permissions, or choose another path",
    errno.EROFS: "choose a path on a file system that can be written",
}
FULL = (errno.ENOSPC, errno.EDQUOT)
_SHOWN = 300
"""Characters of a path that are shown."""


def file_error(error: OSError) -> str:
    """What the system says of a file as one line, its path first, and what helps."""
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else "a file"
    path = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path[:_SHOWN])
    kept = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    return f"{path}: the system says {error.strerror}; {_REMEDIES.get(error.errno or 0, 'check the path')}{kept}"


@contextmanager
def file_errors(kind: type[ValueError] = ValueError) -> Iterator[None]:
    """What the system refuses about a path, as bad input; a disk that is full while writing stays the system's error.

    Raises:
        ValueError: of that kind, in the words of :func:`file_error`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL or error.errno is None or isinstance(error, ConnectionError):
            raise
        raise kind(file_error(error)) from error


RecordT = TypeVar("RecordT", bound=Record)
SavedT = TypeVar("SavedT", bound="SavedRecord")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` when the block ends without an error.

    It is on the disk before it has the name, so that the power may fail at any moment.

    Raises:
        ValueError: if there is something that is no file, such as a folder or a device, which is left there.
    """
    if path.exists() and not path.is_file():
        what = "a directory" if path.is_dir() else "a device or pipe"
        raise ValueError(f"{path}: expected a file to write, found {what}; choose another path")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        with suppress(OSError):  # file systems need not sync directories
            sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)  # which a full disk does not name
        raise


def sync(path: Path) -> None:
    """Wait until a file, or what a directory says of its files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@file_errors()
def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


@file_errors()
def read_record(kind: type[RecordT], path: Path, what: str, remedy: str) -> RecordT:
    """Read a record from its JSON file.

    Raises:
        ValueError: if the file does not hold one.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(
            f"{path}: not {what}: {where}: {first['msg']}, got {first['input']!r:.60}; {remedy}"
        ) from error


class Kept(NamedTuple):
    """Where a record is saved, and the words for it.

    Attributes:
        file: its name in a directory.
        what: what it is, such as ``result``.
        command: what writes it.
        remedy: what to do about a file that does not hold one.
    """

    file: str
    what: str
    command: str
    remedy: str


class SavedRecord(Record):
    """A record with a file of its own in a directory, and a ``schema_version``."""

    kept: ClassVar[Kept]
    left_out: ClassVar[Mapping[str, Any]] = {}
    """What the file does without, as pydantic's ``exclude``."""

    @file_errors()
    def save(self, directory: str | Path) -> Path:
        """Write the record into ``directory`` (made if missing) and return the file's path.

        The file appears whole or not at all.
        """
        path = Path(directory) / self.kept.file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (self.model_dump_json(indent=2, exclude=dict(self.left_out)) + "\n").encode())
        return path

    @classmethod
    @file_errors()
    def load(cls: type[SavedT], directory: str | Path) -> SavedT:
        """Read a saved record from its directory or from the file itself.

        Raises:
            ValueError: if the file is missing or does not hold one of this schema.
        """
        kept, path = cls.kept, Path(directory)
        path = path / kept.file if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"{path}: expected a saved {kept.what}, found no such file; run `entropy-probe {kept.command}` first"
            )
        schema = cls.model_fields["schema_version"].default
        return read_record(cls, path, f"a {kept.what} of schema {schema}", kept.remedy)
