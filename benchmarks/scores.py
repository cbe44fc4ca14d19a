"""How contributions, and published scores that need no gradient, rank a demo's steps on fresh responses.

Contributions and scores are of one update batch. Steps on halves of its prompts are taken for real and measured on
evaluation rollouts that the contributions do not come from (``steps``), or forecast from these to first order, which is
cheap enough for SmolLM2 and goes down to tokens. Every figure is a rank correlation.

Run ``python benchmarks/scores.py`` for the tiny demo's checkpoints 10, 15 and 20 (minutes); ``benchmarks/real.py`` has
the first-order figures of SmolLM2.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts, load_checkpoint
from entropy_probe.analyses.attribution import Attribution
from entropy_probe.analyses.validate import distinct_halves
from entropy_probe.cli.demo import DEMOS, Model
from entropy_probe.cli.quiet import quiet_libraries
from entropy_probe.demo.train import quiet
from entropy_probe.estimators.attribution import rank_correlation
from entropy_probe.estimators.published import PUBLISHED
from entropy_probe.report.sections.validation import FORECASTS
from entropy_probe.sampling import (
    EvaluationSettings,
    HFGenerator,
    PromptSource,
    SamplingParameters,
    UpdateSettings,
    load_prompts,
    load_rewards,
    sample_evaluation,
    sample_update,
)
from entropy_probe.scoring.forward import Scorer
from gpu import update_section

TITLE = "## Published scores beside contributions, on the demo"


def sampled(state: Any, settings: Mapping[str, Any], directory: Path, sequences: int) -> dict[str, Rollouts]:
    """An update batch and two evaluation batches of so many sequences; from their files where these are there."""
    prompts, batch_size = load_prompts(PromptSource(**settings["prompts"])), settings.get("generation", {})
    subject = (HFGenerator(state.model, state.tokenizer, **batch_size), state.tokenizer, prompts)
    parameters = SamplingParameters(1.0, settings["probe"]["max_completion_length"])
    reward, update = load_rewards(settings["reward"]), UpdateSettings(**settings["update"])
    draw = {
        "update": lambda: sample_update(*subject, reward, update, parameters),
        **{
            name: lambda seed=seed: sample_evaluation(
                *subject, EvaluationSettings(total_sequences=sequences, seed=seed), parameters
            )
            for name, seed in (("own", 1), ("fresh", 2))
        },
    }
    batches = {}
    for name, make in draw.items():
        file = directory / f"{name}.parquet"
        if not file.is_file():
            directory.mkdir(parents=True, exist_ok=True)
            make()[0].to_parquet(file)
        batches[name] = Rollouts.from_parquet(file)
    return batches


def forecasts(model: torch.nn.Module, own: Attribution) -> dict[str, Tensor]:
    """What is forecast of each update token, ``[N, L]``, by name."""
    update, scorer = own.update, Scorer(model, 1.0, ProbeConfig().max_tokens_per_microbatch)
    scorer.prepare(update)
    scores, advantages = scorer.score(update), update.token_advantages.double()
    return {
        "contributions": own.tokens,
        **{name: forecast(advantages, scores) for name, forecast in PUBLISHED.items()},
        "advantages": advantages,
    }


def first_order(model: torch.nn.Module, own: Attribution, fresh: Attribution, halves: int = 400) -> dict[str, Any]:
    """Rank correlations with first-order contributions from fresh rollouts, over halves of the prompts and over tokens.

    That of the contributions is also the reliability of what is ranked, where both are from as many rollouts.
    """
    update, mask = own.update, own.update.response_mask
    groups = (own.prompt_of_sequence[:, None] == own.prompt_ids).double()
    moving = (update.token_advantages.double().abs().sum(1) @ groups) > 0
    kept = distinct_halves(moving, halves, seed=0)
    chosen = torch.stack([torch.isin(torch.arange(len(moving)), rows) for rows in kept]).double()
    truth = chosen @ fresh.prompts
    by_token = forecasts(model, own)
    generator = torch.Generator().manual_seed(0)
    sums = {name: values.sum(1) @ groups for name, values in by_token.items()}
    sums["random"] = torch.randn(len(moving), generator=generator, dtype=torch.float64)
    return {
        "halves": len(kept),
        "prompts": {name: rank_correlation(chosen @ x, truth) for name, x in sums.items()},
        "tokens": {name: rank_correlation(x[mask], fresh.tokens[mask]) for name, x in by_token.items()},
    }


def table(columns: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Rows of forecasts under columns of rank correlations."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = ["| forecast | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = ("" if (value := column.get(name)) is None else f"{value:.2f}" for column in columns.values())
        lines.append(f"| {FORECASTS.get(name, name)} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[10, 15, 20])
    parser.add_argument("--prompts", type=int, default=32, help="of the update batch")
    parser.add_argument("--sequences", type=int, default=2048, help="of each of the two evaluation batches")
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-scores"))
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("RESULTS.md"))
    options = parser.parse_args()
    quiet_libraries()
    demo, columns, reliabilities, began = DEMOS[Model.tiny](), {}, [], time.monotonic()
    settings = demo.settings | {"update": demo.settings["update"] | {"num_prompts": options.prompts}}
    with quiet(1):
        for step in options.checkpoints:
            state = load_checkpoint(demo.directory / f"checkpoint-{step}", str(demo.directory / "base"), device="cpu")
            batches = sampled(state, settings, options.output / f"checkpoint-{step}", options.sequences)
            probe = EntropyProbe(state.model, state.optimizer, ProbeConfig())
            own, fresh = (
                probe.attribute(update=batches["update"], evaluation=batches[name]) for name in ("own", "fresh")
            )
            found = first_order(state.model, own, fresh)
            real = probe.validate(own, evaluation=batches["fresh"], subsets=options.subsets)
            columns |= {
                f"{step}: steps": {name: x and x.value for name, x in real.correlations.items()},
                f"{step}: first order": found["prompts"],
                f"{step}: tokens": found["tokens"],
            }
            reliabilities.append(f"{real.reliability or 0:.3f} at step {step}")
    lines = [
        TITLE,
        "",
        f"`python benchmarks/scores.py` · {options.prompts} update prompts × 8 responses, contributions from "
        f"{options.sequences:,} sequences, judged on as many fresh ones: {options.subsets} real steps on halves of the "
        "prompts, the same to first order on up to 400 halves, and for single tokens. Rank correlations, of 40 "
        "steps with a 95% interval of up to ±0.3; reliability of the measured changes "
        f"{', '.join(reliabilities)}. Wall time {timedelta(seconds=round(time.monotonic() - began))}.",
        "",
        *table(columns),
    ]
    update_section(options.results, "\n".join(lines))


if __name__ == "__main__":
    main()
