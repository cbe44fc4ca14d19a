"""Rollouts in Parquet files with their token ids, so that a probe can be repeated without generating again.

One row per sequence, padding not stored. Columns:

* ``prompt_id`` (int64): which prompt the sequence answers;
* ``prompt_token_ids`` (list of int64): the tokens before the first response token, at least one;
* ``response_token_ids`` (list of int64): the tokens from the first response token to the end of the sequence;
* ``response_mask`` (list of bool): per entry of ``response_token_ids``, whether the policy sampled it;
* ``advantage`` (float, or list of float per entry of ``response_token_ids``), ``reward`` (float) and
  ``sampled_logprobs`` (list of float in nats per entry of ``response_token_ids``): each absent when the batch
  has none.

Per-token numbers are kept where ``response_mask`` is true and are 0 elsewhere. Numbers are float64 if the
batch holds float64, else float32 (exact for half precisions).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from entropy_probe.types import Rollouts

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["SCHEMA_VERSION", "merge_rollouts", "read_note", "read_rollouts", "write_rollouts"]

SCHEMA_VERSION = 1
_SCHEMA_KEY = b"entropy_probe.rollouts_schema"
_NOTE_KEY = b"entropy_probe.note"
_REQUIRED = ("prompt_id", "prompt_token_ids", "response_token_ids", "response_mask")
_OPTIONAL = ("advantage", "reward", "sampled_logprobs")


def write_rollouts(rollouts: Rollouts, path: Path, *, note: dict[str, Any] | None = None) -> None:
    """Write a batch, one sequence per row; the file appears whole or not at all.

    Args:
        rollouts: the batch, on any device, padded on either side.
        path: the file to write; its directory is made if missing, and an existing file is replaced.
        note: anything in JSON to keep beside the batch; see :func:`read_note`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    attention = rollouts.attention_mask
    is_response = attention & (rollouts.response_mask.cumsum(1) > 0)
    columns = {
        "prompt_id": pa.array(_numpy(rollouts.prompt_ids.long())),
        "prompt_token_ids": _ragged(rollouts.input_ids.long(), attention & ~is_response),
        "response_token_ids": _ragged(rollouts.input_ids.long(), is_response),
        "response_mask": _ragged(rollouts.response_mask, is_response),
    }
    numbers = (rollouts.advantages, rollouts.rewards, rollouts.sampled_logprobs)
    for name, value in zip(_OPTIONAL, numbers, strict=True):
        if value is None:
            continue
        value = value if value.dtype == torch.float64 else value.float()
        if value.dim() == 2:
            columns[name] = _ragged(value.masked_fill(~rollouts.response_mask, 0.0), is_response)
        else:
            columns[name] = pa.array(_numpy(value))
    metadata = {_SCHEMA_KEY: str(SCHEMA_VERSION)} | ({} if note is None else {_NOTE_KEY: json.dumps(note)})
    table = pa.table(columns).replace_schema_metadata(metadata)
    with _whole(path) as temporary:
        pq.write_table(table, temporary)


def read_note(path: Path) -> dict[str, Any]:
    """The note of a file of rollouts; empty if it has none."""
    import pyarrow.parquet as pq

    return json.loads((pq.read_schema(path).metadata or {}).get(_NOTE_KEY, b"{}"))


def merge_rollouts(files: Sequence[Path], path: Path) -> None:
    """Write the batches of several files, which have the same columns, to one, a row group each, one at a time."""
    import pyarrow.parquet as pq

    schema = pq.read_schema(files[0]).with_metadata({_SCHEMA_KEY: str(SCHEMA_VERSION)})
    with _whole(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for file in files:
            writer.write_table(_read_table(file).replace_schema_metadata(schema.metadata))


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_rollouts(path: Path) -> Rollouts:
    """Read a batch written by :func:`write_rollouts`.

    The batch comes back on the CPU in the same order and in one canonical layout: prompt first, right-padded
    to the longest sequence with token id 0.

    Raises:
        ValueError: if the file is missing, is not Parquet, is truncated, is of another schema, lacks a
            column, or its columns disagree.
    """
    table = _read_table(path)
    prompt, prompt_lengths = _lists(table, "prompt_token_ids", path)
    response, response_lengths = _lists(table, "response_token_ids", path)
    mask, mask_lengths = _lists(table, "response_mask", path)
    _same_lengths(response_lengths, mask_lengths, "response_mask", path)

    lengths = prompt_lengths + response_lengths
    position = torch.arange(int(lengths.max()))
    is_prompt = position < prompt_lengths[:, None]
    is_response = ~is_prompt & (position < lengths[:, None])

    def at_response(values: Tensor) -> Tensor:
        return torch.zeros(is_response.shape, dtype=values.dtype).masked_scatter_(is_response, values)

    def optional(name: str) -> Tensor | None:
        if name not in table.column_names:
            return None
        if not _is_list(table, name):
            return _scalars(table, name, path)
        values, counts = _lists(table, name, path)
        _same_lengths(response_lengths, counts, name, path)
        return at_response(values)

    values = {
        "input_ids": at_response(response).masked_scatter_(is_prompt, prompt),
        "attention_mask": is_prompt | is_response,
        "response_mask": at_response(mask),
        "prompt_ids": _scalars(table, "prompt_id", path),
        "advantages": optional("advantage"),
        "rewards": optional("reward"),
        "sampled_logprobs": optional("sampled_logprobs"),
    }
    try:
        return Rollouts(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _ragged(values: Tensor, keep: Tensor) -> pa.ListArray:
    """The kept entries of each row of ``values [N, L]`` as a list column."""
    import pyarrow as pa

    offsets = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
    return pa.ListArray.from_arrays(pa.array(_numpy(offsets.int())), pa.array(_numpy(values[keep])))


def _read_table(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ValueError(f"{path}: expected a Parquet file of rollouts, found no such file; check the path")
    try:
        table = pq.read_table(path, memory_map=False)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: expected a Parquet file of rollouts, got one that cannot be read ({reason}); it is not "
            "Parquet or is truncated, so write it again with Rollouts.to_parquet"
        ) from error
    found = (table.schema.metadata or {}).get(_SCHEMA_KEY, b"none").decode()
    if found != str(SCHEMA_VERSION):
        raise ValueError(
            f"{path}: expected rollouts of schema {SCHEMA_VERSION}, got {found}; write the file with "
            "Rollouts.to_parquet of this version"
        )
    missing = [name for name in _REQUIRED if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: expected columns {', '.join(_REQUIRED)}, got a file without {', '.join(missing)}")
    unknown = sorted(set(table.column_names) - {*_REQUIRED, *_OPTIONAL})
    if unknown:
        raise ValueError(f"{path}: expected columns {', '.join(_REQUIRED + _OPTIONAL)}, got also {', '.join(unknown)}")
    if table.num_rows == 0:
        raise ValueError(f"{path}: expected at least one sequence, got an empty file; sample again")
    for name in table.column_names:
        if table[name].null_count:
            raise ValueError(
                f"{path}: column {name}: expected a value in every row, got {table[name].null_count} nulls"
            )
    return table


def _is_list(table: pa.Table, name: str) -> bool:
    import pyarrow as pa

    return pa.types.is_list(table.schema.field(name).type)


def _scalars(table: pa.Table, name: str, path: Path) -> Tensor:
    return _tensor(table[name].combine_chunks(), name, path)


def _lists(table: pa.Table, name: str, path: Path) -> tuple[Tensor, Tensor]:
    """All entries of a list column one after the other, and the length of each row's list ``[N]``."""
    if not _is_list(table, name):
        raise ValueError(f"{path}: column {name}: expected lists, got {table.schema.field(name).type}")
    column = table[name].combine_chunks()
    lengths = torch.from_numpy(column.value_lengths().to_numpy().astype(np.int64))
    return _tensor(column.flatten(), name, path), lengths


def _tensor(array: pa.Array, name: str, path: Path) -> Tensor:
    import pyarrow as pa

    kinds = {
        "response_mask": (pa.bool_(),),
        **dict.fromkeys(("prompt_id", "prompt_token_ids", "response_token_ids"), (pa.int64(),)),
    }.get(name, (pa.float32(), pa.float64()))
    if array.null_count or array.type not in kinds:
        raise ValueError(
            f"{path}: column {name}: expected {' or '.join(map(str, kinds))} without nulls, got {array.type} "
            f"with {array.null_count} nulls"
        )
    return torch.from_numpy(array.to_numpy(zero_copy_only=False).copy())


def _same_lengths(expected: Tensor, got: Tensor, name: str, path: Path) -> None:
    if not torch.equal(expected, got):
        row = int((expected != got).nonzero()[0, 0])
        raise ValueError(
            f"{path}: column {name}: expected {int(expected[row])} entries in row {row} to match "
            f"response_token_ids, got {int(got[row])}"
        )
