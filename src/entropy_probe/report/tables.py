"""The attribution tables of a run directory, read for showing; needs neither torch nor a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entropy_probe.attribution_tables import LAYERS_FILE, PROMPTS_FILE, TABLES, TOKENS_FILE
from entropy_probe.results import ProbeResult

__all__ = ["Columns", "Tables", "check_tables", "read_tables"]

Columns = Mapping[str, Any]

TOLERANCE = 1e-4
"""Of the sum of absolute contributions; far above rounding, far below another batch's numbers."""


@dataclass(frozen=True)
class Tables:
    """``tokens.parquet``, ``prompts.parquet`` and ``layers.parquet`` as columns.

    Numbers are float64 or int64 arrays, with NaN for null; text is a list, with None for null.
    """

    tokens: Columns
    prompts: Columns
    layers: Columns


def read_tables(directory: Path) -> Tables | None:
    """The tables of a run with ``attribution: true``, or None if it was without.

    Raises:
        ValueError: if one of the three is missing, cannot be read, or lacks a column.
    """
    if not (directory / TOKENS_FILE).is_file():
        return None
    return Tables(*(_read(directory / name) for name in (TOKENS_FILE, PROMPTS_FILE, LAYERS_FILE)))


def check_tables(tables: Tables, result: ProbeResult) -> None:
    """Make sure that the tables divide this result's change, not that of another run.

    Raises:
        ValueError: if contributions do not sum to the gradient part, or the layers to the prediction.
    """
    if result.attribution is None or result.predicted is None:
        raise ValueError(
            f"{TOKENS_FILE}: expected a result with an attribution beside it, got one without; the table is of another "
            "run, so delete it or attribute again"
        )
    sums = [
        (TOKENS_FILE, tables.tokens["contribution"], result.attribution.gradient),
        (PROMPTS_FILE, tables.prompts["contribution"], result.attribution.gradient),
        (LAYERS_FILE, tables.layers["total"], result.predicted.value),
    ]
    for name, parts, whole in sums:
        if abs(parts.sum() - whole) > TOLERANCE * np.abs(parts).sum():
            raise ValueError(
                f"{name}: expected parts that sum to {whole:.6g} as in the result, got {parts.sum():.6g}; the table is "
                "of another run, so attribute again"
            )


def _read(path: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, memory_map=False)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: expected a table of an attribution, got {reason}; attribute again") from error
    columns = TABLES[path.name]
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: expected a table of an attribution, got one without {missing[0]}; attribute again")
    return {name: _column(table[name].to_pylist(), kind) for name, (kind, _, _) in columns.items()}


def _column(values: list[Any], kind: str) -> Any:
    return values if kind == "string" else np.array(values, dtype=np.float64 if kind == "float64" else np.int64)
