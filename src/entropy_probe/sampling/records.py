"""Records of prompts: from a JSONL or Parquet file, a Hugging Face dataset, or a Python function."""

from __future__ import annotations

import gzip
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedIOBase
from itertools import count
from pathlib import Path
from typing import Any

from entropy_probe.sampling.foreign import call, import_function

Records = Iterator[tuple[str, Any]]
"""Each record after a description of where it is."""

_PARQUET_ROWS = 1024
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
"""How compressed files begin."""


def field_of(record: Mapping[str, Any], path: str) -> Any:
    """The value of a field, or of a field inside it for a dotted path; None where there is none."""
    if path in record:
        return record[path]
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def jsonl_records(path: Path, of: str = "prompts") -> Records:
    """The objects of a file with one to a line, or with one array of them; as it is or in gzip."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a JSONL file of {of}, found no such file; check the path")
    try:
        with _opened(path) as lines:
            first = next((line for line in lines if line.strip()), b"")
        with _opened(path) as lines:
            if first.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
                for number, record in enumerate(_parse(lines.read(), str(path), "an array of JSON objects")):
                    yield f"{path}, record {number}", record
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _parse(line, where, "one JSON object per line")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected an intact gzip file, got: {error}; copy it again") from error


def _opened(path: Path) -> BufferedIOBase:
    with path.open("rb") as file:
        head = file.read(4)
    if head == _ZSTD:
        raise ValueError(f"{path}: expected JSON or gzip, got what zstd compressed; unpack it (zstd -d {path.name})")
    return gzip.open(path) if head.startswith(_GZIP) else path.open("rb")


def _parse(text: bytes, where: str, expected: str) -> Any:
    try:
        return json.loads(text.removeprefix(BOM_UTF8).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
        raise ValueError(f"{where}: expected {expected}, got invalid JSON ({error}); correct the file") from error


def parquet_records(path: Path, of: str = "prompts") -> Records:
    """The rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet as parquet

    if not path.is_file():
        raise ValueError(f"{path}: expected a Parquet file of {of}, found no such file; check the path")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS):
                for record in batch.to_pylist():
                    yield f"{path}, row {number}", record
                    number += 1
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: expected a Parquet file of {of}, cannot read it: {reason}; write it again") from (
            error
        )


def dataset_records(name: str, hub_id: str, config: str | None, split: str | None) -> Records:
    """The rows of a split of a Hugging Face dataset."""
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as error:
        raise ValueError(
            f"dataset {name}: expected the datasets library; pip install 'entropy-probe[datasets]'"
        ) from error

    try:
        dataset: Iterable[Any] = load_dataset(hub_id, config, split=split, trust_remote_code=False)
    except (DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"dataset {name}: cannot load {hub_id} (config {config}, split {split}): {reason}") from error
    for number, record in enumerate(dataset):
        yield f"dataset {name}, record {number}", record


def callable_records(path: str) -> Records:
    """What a Python function gives."""
    what = f"callable {path}"
    records = call(what, import_function(path, "prompts.callable"))
    if not isinstance(records, Iterable) or isinstance(records, str | Mapping):
        raise ValueError(
            f"{what}: expected an iterable of mappings, got {type(records).__name__}; correct the function"
        )
    rows, end = iter(records), object()
    for number in count():
        record = call(what, next, rows, end)
        if record is end:
            return
        yield f"{what}, record {number}", record
