"""What an attribution costs on top of a two-batch probe, against one training gradient on the update batch.

All run in the same process, in interleaved rounds; figures are ratios of CPU time. Generation is excluded. The cost is
the difference between a probe with and one without attribution.

Run ``python benchmarks/attribution.py`` (minutes), or with ``--quick`` at sizes that only show that it works.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from entropy_probe import EntropyProbe
from two_batch import FULL, QUICK, Setup, training_gradient

FOLDS = 8
TARGET = 2.5


def cost(setup: Setup, *, lora: bool, rounds: int) -> dict[str, Any]:
    """Time of an attribution, without and with folds, over that of one training gradient over U."""
    model, optimizer = setup.policy(lora=lora)
    update, evaluation = setup.batches()
    both: dict[str, Any] = {"update": update, "evaluation": evaluation}

    def probe() -> EntropyProbe:
        # a probe of its own each time: it would remember the scores of the evaluation batch
        return EntropyProbe(model, optimizer, setup.config)

    tasks = {
        "training": lambda: training_gradient(model, update, setup.max_tokens_per_microbatch),
        "probe": lambda: probe().run(**both),
        "attributed": lambda: probe().attribute(**both, measure=True),
        "folds": lambda: probe().attribute(**both, measure=True, folds=FOLDS),
    }
    found = tasks["attributed"]()  # warm-up
    tasks["training"]()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_ in range(rounds):
        for name in list(tasks)[:: 1 if round_ % 2 else -1]:
            gc.collect()
            start = time.process_time()
            tasks[name]()
            seconds[name].append(time.process_time() - start)
    training = median(seconds["training"])
    paired = [(a - p) / t for a, p, t in zip(seconds["attributed"], seconds["probe"], seconds["training"], strict=True)]
    return {
        "weights": "LoRA" if lora else "full",
        "method": found.summary.method,
        "num_sequences": len(update),
        "rounds": rounds,
        "probe": median(seconds["probe"]) / training,
        "attribution": (median(seconds["attributed"]) - median(seconds["probe"])) / training,
        "attribution_min": min(paired),
        "attribution_max": max(paired),
        "folds": (median(seconds["folds"]) - median(seconds["attributed"])) / training,
        "sum_error": abs(found.tokens.sum().item() / found.summary.gradient - 1),
        "target": TARGET,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds")
    parser.add_argument("--weights", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--prompts", type=int, help="prompts of the update batch (default: 16)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    setup = QUICK if options.quick else FULL
    setup = replace(setup, num_prompts=options.prompts or setup.num_prompts)
    figures = [cost(setup, lora=weights == "lora", rounds=options.rounds) for weights in options.weights]
    title = f"Attribution on top of a two-batch probe / one training gradient (target: at most {TARGET:.1f})"
    table = Table("weights", "attribution", "rounds", f"{FOLDS} folds", "probe", "method", title=title)
    for f in figures:
        spread = f"{f['attribution_min']:.2f} to {f['attribution_max']:.2f}"
        numbers = (f"{f['attribution']:.2f}", spread, f"{f['folds']:.2f}", f"{f['probe']:.2f}")
        table.add_row(f["weights"], *numbers, f["method"])
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
