"""Attribution tables to show, made up: prompts with a few planted causes, tokens of every awkward kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from entropy_probe.report.tables import Tables, read_tables
from entropy_probe.results.attribution import AttributionSummary
from entropy_probe.results.attribution_tables import LAYERS_FILE, PROMPTS_FILE, TOKENS_FILE, write_table
from entropy_probe.results.note import Note
from entropy_probe.results.probe import Estimate, ProbeResult
from tests.report.results import COMMON, make_result

UNIT = "nats/token"

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
    write_table(directory / TOKENS_FILE, rows, UNIT)
    write_table(
        directory / PROMPTS_FILE,
        {
            "prompt_id": [100 + p for p in range(prompts)],
            "prompt": [(prompt_texts or {}).get(p, f"What is {p} + {p + 1}?") for p in range(prompts)],
            "num_responses": [group] * prompts,
            "num_tokens": [group * tokens] * prompts,
            "mean_reward": [p / prompts for p in range(prompts)],
            "contribution": [float(sums["contribution"][by_prompt[p]].sum()) for p in range(prompts)],
            "standard_error": [None] * prompts,
            "covariance": [float(sums["covariance"][by_prompt[p]].sum()) for p in range(prompts)],
        },
        UNIT,
    )
    names = [(f"model.layers.{k}", module) for k in range(layers) for module in MODULES] + [("lm_head", "lm_head")]
    parts = random.normal(size=(len(names), 3)) * [1e-5, 4e-5, 1e-7]
    parts[-1, 0] += sums["contribution"].sum() - parts[:, 0].sum()
    columns = dict(zip(("gradient", "momentum", "weight_decay"), parts.T, strict=True))
    write_table(
        directory / LAYERS_FILE,
        {
            "layer": [layer for layer, _ in names],
            "module": [module for _, module in names],
            "num_parameters": [1000] * len(names),
            **columns,
            "total": parts.sum(1),
        },
        UNIT,
    )
    found = read_tables(directory)
    assert found is not None
    return found


def result_of(tables: Tables, notes: tuple[Note, ...] = ()) -> ProbeResult:
    """A result whose numbers are the tables' sums."""
    parts = {name: float(tables.layers[name].sum()) for name in ("gradient", "momentum", "weight_decay")}
    whole, size = sum(parts.values()), 0.05 * abs(sum(parts.values()))
    result = make_result((whole, size), (1.02 * whole, size), (0.02 * whole, 0.1 * size), notes=notes)
    components = {name: Estimate(value=value, standard_error=size, **COMMON) for name, value in parts.items()}
    advantages, contributions = tables.tokens["advantage"], tables.tokens["contribution"]
    summary = AttributionSummary(
        unit=UNIT,
        method="forward-mode",
        num_tokens=len(advantages),
        **parts,
        positive_advantages=float(contributions[advantages > 0].sum()),
        negative_advantages=float(contributions[advantages < 0].sum()),
        rank_correlation_with_covariance=-0.43,
        seconds=0.1,
    )
    return result.model_copy(update={"components": components, "attribution": summary})
