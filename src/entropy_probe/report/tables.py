"""The attribution tables of a run directory, read for showing; needs neither torch nor a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Tables", "read_tables"]

Columns = Mapping[str, Any]

TOKENS = (
    "prompt_id", "response_id", "position", "token_id", "text", "advantage", "logprob", "entropy", "contribution",
    "covariance",
)  # fmt: skip
PROMPTS = (
    "prompt_id", "prompt", "num_responses", "num_tokens", "mean_reward", "contribution", "standard_error", "covariance",
)  # fmt: skip
LAYERS = ("layer", "module", "num_parameters", "gradient", "momentum", "weight_decay", "total")
_TEXT = ("text", "prompt", "layer", "module")
_OPTIONAL = ("prompt", "mean_reward", "standard_error")


@dataclass(frozen=True)
class Tables:
    """``tokens.parquet``, ``prompts.parquet`` and ``layers.parquet`` as columns.

    Numbers are float64 or int64 arrays, with NaN for null in optional columns; text is a list, with None for null.
    """

    tokens: Columns
    prompts: Columns
    layers: Columns


def read_tables(directory: Path) -> Tables | None:
    """The tables of a run with ``attribution: true``, or None if it was without.

    Raises:
        ValueError: if one of the three is missing, cannot be read, lacks a column or has nulls where it must not.
    """
    if not (directory / "tokens.parquet").is_file():
        return None
    wanted = {"tokens": TOKENS, "prompts": PROMPTS, "layers": LAYERS}
    return Tables(**{name: _read(directory / f"{name}.parquet", columns) for name, columns in wanted.items()})


def _read(path: Path, columns: tuple[str, ...]) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    remedy = "run again with attribution: true"
    if not path.is_file():
        raise ValueError(f"{path}: expected a table of the attribution, found no such file; {remedy}")
    try:
        table = pq.read_table(path, memory_map=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: expected a Parquet file, got one that cannot be read ({str(error).splitlines()[0]}); {remedy}"
        ) from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: expected columns {', '.join(columns)}, got no {', '.join(missing)}; {remedy}")
    for name in columns:
        if table[name].null_count and name not in _OPTIONAL:
            raise ValueError(f"{path}: column {name}: expected a value in every row, got nulls; {remedy}")
    return {name: _column(table[name], name) for name in columns}


def _column(column: pa.ChunkedArray, name: str) -> Any:
    if name in _TEXT:
        return column.to_pylist()
    kind = np.int64 if name.endswith("_id") or name.startswith("num_") or name == "position" else np.float64
    return np.array(column.to_numpy(), dtype=kind)
