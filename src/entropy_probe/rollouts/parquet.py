"""Rollouts in Parquet files with their token ids, so that a probe can be repeated without generating again.

One row per sequence, padding not stored. Columns:

* ``prompt_id`` (int64): which prompt the sequence answers; strings are numbered in the order of their first row;
* ``prompt_token_ids`` (list of int64): the tokens before the first response token, at least one;
* ``response_token_ids`` (list of int64): the tokens from the first response token to the end of the sequence;
* ``response_mask`` (list of bool): per entry of ``response_token_ids``, whether the policy sampled it; all false, or no
  entry, for a response that the trainer masks out of its loss;
* ``advantage`` (float, or list of float per entry of ``response_token_ids``), ``reward`` (float),
  ``sampled_logprobs``, ``old_logprobs``, ``reference_logprobs`` (lists of float in nats per entry of
  ``response_token_ids``), ``microbatch_id`` and ``trajectory_id`` (int64, or strings): each absent when the batch has
  none.

Per-token numbers are kept where ``response_mask`` is true and are 0 elsewhere; in a file of other origin they may be
anything there, null included. Numbers are float64 if the batch holds float64, else float32 (exact for half precisions).
Metadata of the file keep whether the tokens are those of a text that was tokenized again.

Any Parquet file with these columns is read, whoever wrote it: token ids of any integer type or as whole floats, lists
of any kind, numbers of any precision, a mask of 0 and 1. Further columns are left alone (:func:`unused_columns`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from entropy_probe.results.record import file_errors, whole_file
from entropy_probe.rollouts.batch import LOGPROBS, Rollouts

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 3
"""Version 1 had no ``trajectory_id`` and no responses without tokens, version 2 no ``old_logprobs`` and no
``microbatch_id``; both are read as before."""
_SCHEMA_KEY = b"entropy_probe.rollouts_schema"
_NOTE_KEY = b"entropy_probe.note"
_RETOKENISED_KEY = b"entropy_probe.retokenised"
_REQUIRED = ("prompt_id", "prompt_token_ids", "response_token_ids", "response_mask")
_OPTIONAL = ("advantage", "reward", *LOGPROBS)
_GROUPS = ("microbatch_id", "trajectory_id")
_KNOWN = (*_REQUIRED, *_OPTIONAL, *_GROUPS)
_EXACT = 2.0**53
"""Whole numbers below it are exact in float64."""
_READABLE = ("none", "1", "2", "3")


@file_errors()
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
    numbers = (rollouts.advantages, rollouts.rewards, *(getattr(rollouts, name) for name in LOGPROBS))
    for name, value in zip(_OPTIONAL, numbers, strict=True):
        if value is None:
            continue
        value = value if value.dtype == torch.float64 else value.float()
        if value.dim() == 2:
            columns[name] = _ragged(value.masked_fill(~rollouts.response_mask, 0.0), is_response)
        else:
            columns[name] = pa.array(_numpy(value))
    for name in _GROUPS:
        if (ids := getattr(rollouts, f"{name}s")) is not None:
            columns[name] = pa.array(_numpy(ids.long()))
    metadata = {_SCHEMA_KEY: str(SCHEMA_VERSION)} | ({} if note is None else {_NOTE_KEY: json.dumps(note)})
    metadata |= {_RETOKENISED_KEY: "true"} if rollouts.retokenised else {}
    table = pa.table(columns).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        pq.write_table(table, temporary)


def read_note(path: Path) -> dict[str, Any]:
    """The note of a file of rollouts; empty if it has none."""
    import pyarrow.parquet as pq

    return json.loads((pq.read_schema(path).metadata or {}).get(_NOTE_KEY, b"{}"))


def merge_rollouts(files: Sequence[Path], path: Path) -> None:
    """Write the batches of several files, which have the same columns, to one, a row group each, one at a time."""
    import pyarrow.parquet as pq

    schema = pq.read_schema(files[0]).with_metadata({_SCHEMA_KEY: str(SCHEMA_VERSION)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for file in files:
            writer.write_table(_read_table(file).replace_schema_metadata(schema.metadata))


@file_errors()
def read_rollouts(path: Path) -> Rollouts:
    """Read a batch written by :func:`write_rollouts`, or a plain file with its columns.

    The batch comes back on the CPU in the same order and in one canonical layout: prompt first, right-padded
    to the longest sequence with token id 0.

    Raises:
        ValueError: if the file is missing, is not Parquet, is truncated, is of a later schema, lacks a
            column, or its columns disagree.
    """
    with torch.device("cpu"):  # whatever default device the caller has set
        return _read_batch(path)


def _read_batch(path: Path) -> Rollouts:
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
        if not _is_list(table.schema.field(name).type):
            return _scalars(table, name, path)
        values, counts = _lists(table, name, path)
        absent = torch.from_numpy(table[name].is_null().to_numpy())
        _same_lengths(response_lengths, torch.where(absent, response_lengths, counts), name, path)
        there = is_response & ~absent[:, None]
        padded = torch.full(there.shape, torch.nan, dtype=values.dtype).masked_scatter_(there, values)
        return torch.where(sampled, padded, 0.0)

    sampled = at_response(mask)
    values = {
        "input_ids": at_response(response).masked_scatter_(is_prompt, prompt),
        "attention_mask": is_prompt | is_response,
        "response_mask": sampled,
        "prompt_ids": _scalars(table, "prompt_id", path),
        "advantages": optional("advantage"),
        "rewards": optional("reward"),
        **{name: optional(name) for name in LOGPROBS},
        **{f"{name}s": optional(name) for name in _GROUPS},
        "retokenised": _RETOKENISED_KEY in (table.schema.metadata or {}),
    }
    try:
        return Rollouts(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def is_rollouts(path: Path) -> bool:
    """Whether a file has some of the columns above, as no trainer's own have, or is called Parquet and is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():  # a pipe would be waited for
        return path.suffix == ".parquet"
    try:
        return bool(
            {"prompt_token_ids", "response_token_ids", "response_mask"}.intersection(pq.read_schema(path).names)
        )
    except (pa.ArrowException, OSError):
        return path.suffix == ".parquet"


def unused_columns(path: Path) -> tuple[str, ...]:
    """The columns of a file of rollouts that are not read, but for the index that pandas writes."""
    import pyarrow.parquet as pq

    names = pq.read_schema(path).names
    return tuple(name for name in names if name not in _KNOWN and not name.startswith("__index_level_"))


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
    schema = (table.schema.metadata or {}).get(_SCHEMA_KEY, b"none").decode()
    if schema not in _READABLE:
        raise ValueError(
            f"{path}: expected rollouts of schema {SCHEMA_VERSION} at most, got {schema}; write the file with "
            "Rollouts.to_parquet of this version"
        )
    _check_columns(table.column_names, path)
    if table.num_rows == 0:
        raise ValueError(f"{path}: expected at least one sequence, got an empty file; sample again")
    for name in (*_REQUIRED, "reward", *_GROUPS):
        if name in table.column_names and table[name].null_count:
            raise ValueError(
                f"{path}: column {name}: expected a value in every row, got {table[name].null_count} nulls; fill them "
                "in (an empty list where the trainer masks a response out), or leave out an optional column"
            )
    return table


def _check_columns(names: Sequence[str], path: Path) -> None:
    missing = [name for name in _REQUIRED if name not in names]
    if missing and {"prompt", "completion"} <= set(names):
        raise ValueError(
            f"{path}: expected token ids (columns {', '.join(_REQUIRED)}), got texts, as in the completions that TRL "
            "logs; entropy-probe rollouts shows what they hold and converts them, and rollouts.update of a config "
            "takes them as they are"
        )
    if missing:
        raise ValueError(
            f"{path}: expected columns {', '.join(_REQUIRED)}, got {', '.join(names)} and no {', '.join(missing)}; "
            "rename or add them"
        )
    absent = [name for name in _KNOWN if name not in names]
    for name in sorted(set(names) - set(_KNOWN)):
        meant = difflib.get_close_matches(name, absent, n=1, cutoff=0.85)
        if meant:
            raise ValueError(
                f"{path}: expected columns {', '.join(_KNOWN)}, got also {name} and no {meant[0]}; rename it if it is "
                "that, or leave it out"
            )


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _scalars(table: pa.Table, name: str, path: Path) -> Tensor:
    return _tensor(table[name].combine_chunks(), name, path)


def _lists(table: pa.Table, name: str, path: Path) -> tuple[Tensor, Tensor]:
    """All entries of a list column one after the other, and the length of each row's list ``[N]``, 0 for null."""
    import pyarrow.compute as pc

    if not _is_list(table.schema.field(name).type):
        raise ValueError(f"{path}: column {name}: expected lists, got {table.schema.field(name).type}")
    column = table[name].combine_chunks()
    counts = pc.call_function("list_value_length", [column])
    lengths = torch.from_numpy(pc.fill_null(counts, 0).to_numpy(zero_copy_only=False).astype(np.int64))
    return _tensor(pc.call_function("list_flatten", [column]), name, path), lengths


def _tensor(array: pa.Array, name: str, path: Path) -> Tensor:
    """A column's entries: ids as int64, the mask as bool, numbers as they are or as float32, null as NaN."""
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind, is_id = array.type, name in ("prompt_id", *_GROUPS)
    is_number = name in _OPTIONAL
    fits = pa.types.is_integer(kind)
    if not is_number and pa.types.is_floating(kind) and not array.null_count:
        whole = array.to_numpy(zero_copy_only=False).astype(np.float64)  # pandas makes floats of integers
        if (np.abs(whole) < _EXACT).all() and (whole == np.trunc(whole)).all():
            array, fits = pa.array(whole.astype(np.int64)), True
    if is_number:
        fits |= pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    elif array.null_count:
        fits = False
    elif name == "response_mask":
        fits |= pa.types.is_boolean(kind)
    if is_id and not array.null_count and str(kind) in ("string", "large_string", "string_view"):
        array = array.dictionary_encode().indices
    elif not fits:
        expected = "numbers" if is_number else "true or false" if name == "response_mask" else "integers"
        also = " or strings" if is_id else ""
        nulls = f" with {array.null_count} nulls" if array.null_count else ""
        raise ValueError(
            f"{path}: column {name}: expected {expected}{also} without nulls, got {kind}{nulls}; cast the column"
        )
    if is_number:
        wide = array.cast(pa.float64())
        values = torch.from_numpy(wide.to_numpy(zero_copy_only=False).copy())
        return values.float() if pa.types.is_floating(kind) and kind != pa.float64() else values
    values = torch.from_numpy(array.cast(pa.int64(), safe=False).to_numpy(zero_copy_only=False).copy())
    if name != "response_mask":
        return values
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) <= 1:
        raise ValueError(f"{path}: column {name}: expected 0 and 1, got numbers up to {int(values.abs().max())}")
    return values.bool()


def _same_lengths(expected: Tensor, got: Tensor, name: str, path: Path) -> None:
    if not torch.equal(expected, got):
        row = int((expected != got).nonzero()[0, 0])
        raise ValueError(
            f"{path}: column {name}: expected {int(expected[row])} entries in row {row} to match "
            f"response_token_ids, got {int(got[row])}"
        )
