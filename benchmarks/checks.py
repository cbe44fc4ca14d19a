"""What a two-batch probe spends on its checks and on the length's part of its error, against one training gradient.

Timed inside whole probes: the trials of ways to call the model, the choice of how to read gradients of single
sequences, and all that concerns the mean length. What the scores of the update batch add to its gradient is the
difference between probes with and without them. All run in the same process, in interleaved rounds; figures are ratios
of CPU time.

Run ``python benchmarks/checks.py`` (minutes), or with ``--quick`` at sizes that only show that it works.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import torch
from rich.table import Table

from by_weights import run_by_weights
from entropy_probe import EntropyProbe
from entropy_probe.analyses import plan, predict
from entropy_probe.analyses.before import LengthSample
from entropy_probe.analyses.gradient import update_gradient
from entropy_probe.analyses.policy import Policy
from two_batch import Setup, training_gradient

Seconds = defaultdict[str, float]
PARTS = {
    "layout": [(Policy, "prepare"), (Policy, "choose_hooks")],
    "length": [(LengthSample, "of"), (predict, "length_changes"), (LengthSample, "beyond")],
    "update gradient": [(plan, "update_gradient")],
}
"""Where each part of the work is done."""


@contextmanager
def timed(model: Any) -> Iterator[Seconds]:
    """CPU seconds of each part, and how often and on how many tokens the model is called in the trials."""
    found: Seconds = defaultdict(float)
    running: list[str] = []

    def wrap(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **rest: Any) -> Any:
            running.append(part)
            start = time.process_time()
            try:
                return work(*args, **rest)
            finally:
                found[part] += time.process_time() - start
                running.pop()

        return call

    def count(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if running == ["layout"]:
            found["calls"] += 1
            found["tokens"] += args[0].numel()

    handle = model.get_input_embeddings().register_forward_hook(count)
    try:
        with ExitStack() as stack:
            for part, places in PARTS.items():
                for owner, name in places:
                    stack.enter_context(mock.patch.object(owner, name, wrap(part, getattr(owner, name))))
            yield found
    finally:
        handle.remove()


def cost(setup: Setup, *, lora: bool, rounds: int) -> dict[str, Any]:
    """Time of each part over that of one training gradient over U."""
    model, optimizer = setup.policy(lora=lora)
    update, evaluation = setup.batches(model)

    def probe() -> Seconds:
        start = time.process_time()
        with timed(model) as found:
            # a probe of its own each time: it would remember the scores of the evaluation batch
            EntropyProbe(model, optimizer, setup.config).run(update=update, evaluation=evaluation)
        found["whole"] = time.process_time() - start
        return found

    def without_scores() -> Seconds:
        unread = partial(update_gradient, scored=True)
        with mock.patch.object(plan, "update_gradient", lambda *args, scored, **rest: unread(*args, **rest)):
            return probe()

    def training() -> Seconds:
        start = time.process_time()
        training_gradient(model, update, setup.max_tokens_per_microbatch)
        return defaultdict(float, whole=time.process_time() - start)

    tasks = {"training": training, "probe": probe, "without scores": without_scores}
    for task in tasks.values():  # warm-up
        task()
    seen: dict[str, list[Seconds]] = {name: [] for name in tasks}
    for round_ in range(rounds):
        for name in list(tasks)[:: 1 if round_ % 2 else -1]:
            gc.collect()
            seen[name].append(tasks[name]())
    own, bare = seen["probe"], seen["without scores"]
    gradients = [row["whole"] for row in seen["training"]]
    parts = {part: [row[part] for row in own] for part in ("layout", "length", "whole")}
    parts["update scores"] = [a["update gradient"] - b["update gradient"] for a, b in zip(own, bare, strict=True)]
    return {
        "weights": "LoRA" if lora else "full",
        "rounds": rounds,
        "ratio": {part: median(seconds) / median(gradients) for part, seconds in parts.items()},
        "range": {
            part: [extreme(a / t for a, t in zip(seconds, gradients, strict=True)) for extreme in (min, max)]
            for part, seconds in parts.items()
        },
        "calls": int(own[0]["calls"]),
        "tokens": int(own[0]["tokens"]),
        "tokens_of_both_batches": int(update.attention_mask.sum() + evaluation.attention_mask.sum()),
    }


def table(figures: list[dict[str, Any]]) -> Table:
    parts = list(figures[0]["ratio"])
    found = Table("weights", *parts, "calls", "tokens", "of", title="Parts of a probe / one training gradient")
    for f in figures:
        ratios = (f"{f['ratio'][part]:.3f} ({f['range'][part][0]:.3f} to {f['range'][part][1]:.3f})" for part in parts)
        counts = (str(f[name]) for name in ("calls", "tokens", "tokens_of_both_batches"))
        found.add_row(f["weights"], *ratios, *counts)
    return found


if __name__ == "__main__":
    run_by_weights(__doc__, cost, table)
