"""The attribution tables of a run directory, read for showing; needs neither torch nor a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entropy_probe.results.attribution_tables import (
    LAYERS_FILE,
    MARKUP,
    OPTIONAL,
    PROMPTS_FILE,
    TABLES,
    TOKENS_FILE,
)
from entropy_probe.results.probe import ProbeResult

Columns = Mapping[str, Any]

EXACT = 1e-6
"""Of the sum of absolute contributions: these numbers were summed in float64 before they were written."""
ROUNDED = 0.1
"""The same for layers, whose sums differ from the parts by the rounding of the policy's precision."""


@dataclass(frozen=True)
class Tables:
    """``tokens.parquet``, ``prompts.parquet`` and ``layers.parquet`` as columns.

    Numbers are float64 or int64 arrays, with NaN for null; text is a list, with None for null. ``markup`` has the texts
    of special tokens that occur in tokens and prompts.
    """

    tokens: Columns
    prompts: Columns
    layers: Columns
    markup: frozenset[str] = frozenset()


def read_tables(directory: Path) -> Tables | None:
    """The tables of a run with ``attribution: true``, or None if it was without.

    Raises:
        ValueError: if one of the three is missing, cannot be read, or lacks a column.
    """
    names = (TOKENS_FILE, PROMPTS_FILE, LAYERS_FILE)
    there = [name for name in names if (directory / name).is_file()]
    if not there:
        return None
    for name in names:
        if name not in there:
            raise ValueError(
                f"{directory / name}: expected a table of the attribution beside {there[0]}, found no such file; put "
                "it back or run again"
            )
    read = [_read(directory / name) for name in names]
    return Tables(*(columns for columns, _ in read), markup=frozenset().union(*(markup for _, markup in read)))


def check_tables(tables: Tables, result: ProbeResult) -> None:
    """Make sure that the tables are those of this result, not of another run.

    Raises:
        ValueError: if the tokens are not as many, or do not sum by the sign of the advantage to what the result says;
            if the prompts are not the tokens' sums; if the layers do not sum to its parts.
    """
    summary, tokens, prompts = result.attribution, tables.tokens, tables.prompts
    if summary is None:
        raise ValueError(
            f"{TOKENS_FILE}: expected a result with an attribution beside it, got one without; the table is of another "
            "run, so delete it or attribute again"
        )
    contributions, advantages = tokens["contribution"], tokens["advantage"]
    signs = [contributions[chosen].sum() for chosen in (advantages > 0, advantages < 0)]
    order = np.argsort(prompts["prompt_id"])
    ids = prompts["prompt_id"][order]
    rows = np.searchsorted(ids, tokens["prompt_id"]).clip(max=len(ids) - 1)
    counts, sums = np.bincount(rows, minlength=len(ids)), np.bincount(rows, contributions, minlength=len(ids))
    size = np.abs(contributions).sum()
    layers = [(tables.layers[part], getattr(summary, part)) for part in ("gradient", "momentum", "weight_decay")]
    agrees = {
        TOKENS_FILE: len(contributions) == summary.num_tokens
        and np.allclose(signs, [summary.positive_advantages, summary.negative_advantages], 0, EXACT * size),
        PROMPTS_FILE: np.array_equal(ids[rows], tokens["prompt_id"])
        and np.array_equal(counts, prompts["num_tokens"][order])  # none where all responses are masked out
        and np.allclose(sums, prompts["contribution"][order], 0, EXACT * size),
        LAYERS_FILE: all(abs(terms.sum() - whole) <= ROUNDED * np.abs(terms).sum() for terms, whole in layers),
    }
    for name, ok in agrees.items():
        if not ok:
            raise ValueError(f"{name}: expected sums as in the result, got others; it is of another run, so run again")


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The columns of a table, and the special tokens in it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, memory_map=False)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: expected a table of an attribution, got a file that cannot be read ({reason}); put back the one "
            "that the run wrote, or run again"
        ) from error
    columns = TABLES[path.name]
    missing = [name for name in columns if name not in table.column_names and name not in OPTIONAL]
    if missing:
        raise ValueError(f"{path}: expected a table of an attribution, got one without {missing[0]}; run again")
    read = {
        name: _column(table[name].to_pylist(), kind) if name in table.column_names else [None] * len(table)
        for name, (kind, _, _) in columns.items()
    }
    return read, json.loads((table.schema.metadata or {}).get(MARKUP, b"[]"))


def _column(values: list[Any], kind: str) -> Any:
    return values if kind == "string" else np.array(values, dtype=np.float64 if kind == "float64" else np.int64)
