"""The tables of an attribution as Parquet files; columns and units in ``docs/attribution.md``.

Every column's meaning and unit are in the file itself, in the metadata of its field (keys ``description`` and
``unit``), so that no reader depends on this package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entropy_probe.results.record import whole_file

TOKENS_FILE, PROMPTS_FILE, LAYERS_FILE = "tokens.parquet", "prompts.parquet", "layers.parquet"

OPTIONAL = frozenset({"name"})
"""Columns that a table may be without, as one is that an earlier version wrote: null in all rows."""
MARKUP = b"special_tokens"
"""Key of the files' metadata with the texts of the tokenizer's special tokens that occur in them, in JSON."""

RUN_UNIT = "run"
"""Stands for the unit of the run's changes, nats/token or nats/sequence."""

# file -> column -> type, unit, description
TABLES: dict[str, dict[str, tuple[str, str, str]]] = {
    TOKENS_FILE: {
        "prompt_id": ("int64", "", "prompt that the response counts for; of equal prompts the smallest id"),
        "response_id": ("int64", "", "row of the update batch"),
        "position": (
            "int32",
            "",
            "place in response_token_ids of the row (the tool's tokens count too), from 0 at the first sampled token",
        ),
        "token_id": ("int64", "", "token id"),
        "text": ("string", "", "the token, decoded; its id in angle brackets if there was no tokenizer"),
        "advantage": ("float64", "reward", "advantage as given"),
        "logprob": ("float64", "nats", "log-probability under the policy before the step"),
        "entropy": ("float64", "nats", "entropy of the distribution that the token was drawn from"),
        "contribution": ("float64", RUN_UNIT, "to the first-order change; all tokens sum to its gradient part"),
        "covariance": (
            "float64",
            "reward * nats",
            "(advantage - mean) * (logprob - mean), means over all tokens (Cui et al., 2025)",
        ),
    },
    PROMPTS_FILE: {
        "prompt_id": ("int64", "", "prompt"),
        "prompt": ("string", "", "the prompt, decoded; null if there was no tokenizer"),
        "name": ("string", "", "the last user message of a conversation; null for other prompts"),
        "num_responses": ("int32", "", "responses to it in the update batch"),
        "num_tokens": ("int32", "", "response tokens"),
        "mean_reward": ("float64", "reward", "mean reward of its responses; null if the batch has no rewards"),
        "contribution": ("float64", RUN_UNIT, "sum of its tokens' contributions"),
        "standard_error": (
            "float64",
            RUN_UNIT,
            "of the contribution, from the choice of evaluation rollouts; null unless folds were asked for",
        ),
        "covariance": ("float64", "reward * nats", "sum of its tokens' covariance terms"),
    },
    LAYERS_FILE: {
        "layer": ("string", "", "layer of the model"),
        "module": ("string", "", "kind of module within it"),
        "num_parameters": ("int64", "", "trained elements"),
        "gradient": ("float64", RUN_UNIT, "to the first-order change through this batch's gradient"),
        "momentum": ("float64", RUN_UNIT, "through Adam's first moment"),
        "weight_decay": ("float64", RUN_UNIT, "through weight decay"),
        "total": ("float64", RUN_UNIT, "through all parts of the step, rounding included"),
    },
}


def write_table(path: Path, columns: Mapping[str, Any], unit: str, markup: Sequence[str] = ()) -> None:
    """Write one of :data:`TABLES`; the file appears whole or not at all.

    Args:
        path: named like the table.
        columns: its columns, as lists or one-dimensional tensors.
        unit: of the run's changes.
        markup: texts of special tokens that occur in it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields, arrays = [], []
    for name, (kind, column_unit, description) in TABLES[path.name].items():
        if name in OPTIONAL and name not in columns:
            continue
        values = columns[name]
        array = pa.array(values.tolist() if hasattr(values, "tolist") else values, type=getattr(pa, kind)())
        metadata = {"description": description, "unit": unit if column_unit == RUN_UNIT else column_unit}
        fields.append(pa.field(name, array.type, metadata=metadata))
        arrays.append(array)
    metadata = {MARKUP: json.dumps(list(markup))} if markup else None
    with whole_file(path) as temporary:
        pq.write_table(pa.table(arrays, schema=pa.schema(fields, metadata)), temporary)
