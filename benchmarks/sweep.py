"""What a sweep over twelve learning rates costs, against one training gradient on the evaluation batch.

Both run in the same process, in interleaved rounds; figures are ratios of CPU time. Generation is excluded.

Run ``python benchmarks/sweep.py`` (minutes), or with ``--quick`` at sizes that only show that it works.
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

NUM_RATES = 12
TARGET = 2.6 + NUM_RATES * 0.6


def cost(setup: Setup, *, lora: bool, rounds: int) -> dict[str, Any]:
    """Time of a sweep, without and with the direct curvature, over that of one training gradient over E."""
    model, optimizer = setup.policy(lora=lora)
    update, evaluation = setup.batches(model)
    rates = [10 ** (-7 + k / 3) for k in range(NUM_RATES)]
    seconds: dict[str, list[float]] = {"training": [], "sweep": [], "direct": []}
    training_gradient(model, evaluation, setup.max_tokens_per_microbatch)  # warm-up
    for round_ in range(rounds):
        tasks = ["training", "sweep"][:: 1 if round_ % 2 else -1]
        for task in [*tasks, "direct"] if round_ == 0 else tasks:
            gc.collect()
            start = time.process_time()
            if task == "training":
                training_gradient(model, evaluation, setup.max_tokens_per_microbatch)
            else:
                # a probe of its own each time: it would remember the scores of the evaluation batch
                probe = EntropyProbe(model, optimizer, setup.config)
                sweep = probe.sweep(
                    update=update, evaluation=evaluation, learning_rates=rates, direct_curvature=task == "direct"
                )
                if task == "direct" and sweep.curvature.direct is None:
                    raise RuntimeError(f"no direct curvature: {sweep.notes}")
            seconds[task].append(time.process_time() - start)
    paired = [s / t for s, t in zip(seconds["sweep"], seconds["training"], strict=True)]
    return {
        "weights": "LoRA" if lora else "full",
        "num_rates": NUM_RATES,
        "num_sequences": len(evaluation),
        "rounds": rounds,
        "ratio": median(seconds["sweep"]) / median(seconds["training"]),
        "ratio_min": min(paired),
        "ratio_max": max(paired),
        "ratio_with_direct_curvature": median(seconds["direct"]) / median(seconds["training"]),
        "target": TARGET,
    }


def table(figures: list[dict[str, Any]]) -> Table:
    title = f"Sweep over {NUM_RATES} rates / one training gradient (target: at most {TARGET:.1f})"
    found = Table("weights", "sweep", "rounds", "with direct curvature", title=title, title_justify="left")
    for f in figures:
        spread = f"{f['ratio_min']:.2f} to {f['ratio_max']:.2f}"
        found.add_row(f["weights"], f"{f['ratio']:.2f}", spread, f"{f['ratio_with_direct_curvature']:.2f}")
    return found


if __name__ == "__main__":
    run_by_weights(__doc__, cost, table)
