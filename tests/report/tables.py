"""Attribution tables to show, made up: prompts with a few planted causes, tokens of every awkward kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entropy_probe.report.tables import Tables, read_tables

WORDS = ("Let", " me", " think", ".", " The", " sum", " of", " 3", " and", " 4", " is", " 7", ",", " so", "\n", " ans")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def write_tables(
    directory: Path,
    *,
    prompts: int = 4,
    group: int = 4,
    tokens: int = 12,
    layers: int = 3,
    texts: dict[tuple[int, int], str] | None = None,
    prompt_texts: dict[int, str | None] | None = None,
    seed: int = 0,
) -> Tables:
    """Write the three tables; ``texts`` sets the text of single tokens, by response and position."""
    random = np.random.default_rng(seed)
    rows: dict[str, list] = {name: [] for name in (
        "prompt_id", "response_id", "position", "token_id", "text", "advantage", "logprob", "entropy", "contribution",
        "covariance",
    )}  # fmt: skip
    strength = np.exp(-np.arange(prompts) / 2) * np.where(np.arange(prompts) % 3 == 2, -0.5, 1.0)
    for response in range(prompts * group):
        prompt = response // group
        advantage = 0.0 if prompt == prompts - 1 else 1.0 if response % 2 else -1.0
        for position in range(tokens):
            logprob = -float(random.exponential(0.6))
            word = int(random.integers(len(WORDS)))
            made = {
                "prompt_id": 100 + prompt,
                "response_id": response,
                "position": position,
                "token_id": word,
                "text": (texts or {}).get((response, position), WORDS[word]),
                "advantage": advantage,
                "logprob": logprob,
                "entropy": float(random.exponential(0.5)),
                "contribution": advantage * strength[prompt] * 1e-5 * (logprob + 0.3) * float(random.exponential(1.0)),
                "covariance": advantage * (logprob + 0.6),
            }
            for name, value in made.items():
                rows[name].append(value)
    by_prompt = {prompt: np.array([p == 100 + prompt for p in rows["prompt_id"]]) for prompt in range(prompts)}
    sums = {name: np.array(rows[name]) for name in ("contribution", "covariance")}
    texts_of_prompts = [(prompt_texts or {}).get(p, f"What is {p} + {p + 1}?") for p in range(prompts)]
    write(directory / "tokens.parquet", rows, position=pa.int32())
    write(
        directory / "prompts.parquet",
        {
            "prompt_id": [100 + p for p in range(prompts)],
            "prompt": pa.array(texts_of_prompts, pa.string()),
            "num_responses": [group] * prompts,
            "num_tokens": [group * tokens] * prompts,
            "mean_reward": [p / prompts for p in range(prompts)],
            "contribution": [float(sums["contribution"][by_prompt[p]].sum()) for p in range(prompts)],
            "standard_error": pa.array([None] * prompts, pa.float64()),
            "covariance": [float(sums["covariance"][by_prompt[p]].sum()) for p in range(prompts)],
        },
        num_responses=pa.int32(),
        num_tokens=pa.int32(),
    )
    names = [(f"model.layers.{k}", module) for k in range(layers) for module in MODULES] + [("lm_head", "lm_head")]
    parts = random.normal(size=(len(names), 3)) * [1e-5, 4e-5, 1e-7]
    write(
        directory / "layers.parquet",
        {
            "layer": [layer for layer, _ in names],
            "module": [module for _, module in names],
            "num_parameters": [1000] * len(names),
            **{name: parts[:, k] for k, name in enumerate(("gradient", "momentum", "weight_decay"))},
            "total": parts.sum(1),
        },
    )
    found = read_tables(directory)
    assert found is not None
    return found


def write(path: Path, columns: dict, **types: pa.DataType) -> None:
    """One Parquet file, some columns of another type than Arrow would choose."""
    arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path)
