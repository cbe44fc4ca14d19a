"""Plain, validated data and the JSON files it lives in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = ["Record", "find_saved", "read_record", "write_atomically"]


class Record(BaseModel):
    """Plain data: frozen, every key known, no number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


RecordT = TypeVar("RecordT", bound=Record)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def find_saved(path: str | Path, file: str, what: str, command: str) -> Path:
    """The file that was saved in a directory, or that was named itself.

    Raises:
        ValueError: if there is none.
    """
    path = Path(path)
    path = path / file if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: expected a saved {what}, found no such file; run `entropy-probe {command}` first")
    return path


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
        raise ValueError(f"{path}: not {what}: {where}: {first['msg']}; {remedy}") from error
