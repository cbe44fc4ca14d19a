"""What an attribution costs on top of a two-batch probe, against one training gradient on the update batch.

All run in the same process, in interleaved rounds; figures are ratios of CPU time. Generation is excluded. The cost is
the difference between a probe with and one without attribution.

Run ``python benchmarks/attribution.py`` (minutes), or with ``--quick`` at sizes that only show that it works.
"""

from __future__ import annotations

import gc
import time
from statistics import median
from typing import Any

from rich.table import Table

from by_weights import run_by_weights
from entropy_probe import EntropyProbe
from two_batch import Setup, training_gradient

FOLDS = 8
TARGET = 2.5


def cost(setup: Setup, *, lora: bool, rounds: int) -> dict[str, Any]:
    """Time of an attribution, without and with folds, over that of one training gradient over U."""
    model, optimizer = setup.policy(lora=lora)
    update, evaluation = setup.batches(model)
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


def table(figures: list[dict[str, Any]]) -> Table:
    title = f"Attribution on top of a two-batch probe / one training gradient (target: at most {TARGET:.1f})"
    found = Table("weights", "attribution", "rounds", f"{FOLDS} folds", "probe", "method", title=title)
    for f in figures:
        spread = f"{f['attribution_min']:.2f} to {f['attribution_max']:.2f}"
        numbers = (f"{f['attribution']:.2f}", spread, f"{f['folds']:.2f}", f"{f['probe']:.2f}")
        found.add_row(f["weights"], *numbers, f["method"])
    return found


if __name__ == "__main__":
    run_by_weights(__doc__, cost, table)
