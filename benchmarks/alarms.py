"""How early a timeline's alarms come before the reward drops, and whether healthy runs are quiet.

The demo's task and policy, each run from its warm-started model with ``EntropyProbeCallback(every=1)``; in one fault
each, from the step that it begins at. The reward drops at the first step from which the mean of three logged rewards is
a standard deviation below the mean of the ten before; the deviation is that of one step's logged reward in the healthy
runs, by the differences of neighbours.

Run ``python benchmarks/alarms.py`` (minutes), or with ``--quick`` at a size that only shows that it works.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl.trainer.grpo_trainer import GRPOTrainer

from entropy_probe.cli.timeline import read_timelines
from entropy_probe.demo import train
from entropy_probe.integrations.trl import EntropyProbeCallback
from entropy_probe.results.live import Timeline

RATE = 3e-4
"""The demo's."""
BEFORE, AFTER = 10, 3
FAULTY_SEEDS = 3
"""The thresholds of the alarms were set with the first in view; the others are the test."""


@dataclass(frozen=True)
class Fault:
    """Something wrong with a run, from a step on."""

    name: str
    begins: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[GRPOTrainer, Any], None] | None = None  # of a freshly scored batch, once the fault has begun
    temperature: Callable[[int], float] | None = None  # that responses are sampled at, by the steps since then


def _negate(trainer: GRPOTrainer, batch: Any) -> None:
    batch["advantages"] = -batch["advantages"]


def faults(begins: int) -> list[Fault]:
    """The three of them."""
    return [
        Fault("rate x 30, warmed up over 30 steps", 1, {
            "learning_rate": 30 * RATE, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 30}),
        Fault("advantages with the wrong sign", begins, change=_negate),
        Fault("sampled at a temperature that drifts by 0.02 a step", begins, temperature=lambda k: 1 + 0.02 * k),
        Fault("sampled at temperature 1.5", 1, temperature=lambda k: 1.5),
    ]  # fmt: skip


@contextmanager
def injected(fault: Fault | None) -> Iterator[None]:
    """TRL's trainer with a fault."""
    scored = GRPOTrainer._generate_and_score_completions

    def faulty(self: Any, inputs: Any) -> Any:
        since = self.state.global_step + 1 - (fault.begins if fault else 0)
        wrong = fault is not None and since >= 0
        if wrong and fault.temperature is not None:
            self.generation_config.temperature = fault.temperature(since)
        batch = scored(self, inputs)
        if wrong and fault.change is not None:
            fault.change(self, batch)
        return batch

    with patch.object(GRPOTrainer, "_generate_and_score_completions", faulty):
        yield


def run(directory: Path, demo: Path, fault: Fault | None, seed: int, steps: int) -> Timeline:
    """A run from the demo's warm-started model, with a fault or without; at once if the directory has it already."""
    if (directory / f"checkpoint-{steps}").is_dir():
        return read_timelines([directory])[0]
    records = [json.loads(line) for line in (demo / "prompts.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(demo / "base", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo / "base")
    model.name_or_path = str((demo / "base").resolve())
    arguments = {"max_steps": steps, "save_steps": steps, "per_device_train_batch_size": 128, "num_generations": 8,
                 "learning_rate": RATE, "max_completion_length": train.MAX_COMPLETION_LENGTH, "seed": seed}  # fmt: skip
    if fault is not None:
        arguments |= fault.arguments
    with train.quiet_single_thread(), injected(fault):
        train.reinforce(directory, model, tokenizer, records, train._exact_match, arguments, lambda line: None, steps,
                        callbacks=[EntropyProbeCallback(every=1)])  # fmt: skip
    return read_timelines([directory])[0]


def drop(timeline: Timeline, deviation: float) -> int | None:
    """The step at which the reward drops; None if it does not."""
    rewards = [record.log["reward"] for record in timeline.steps]
    for k in range(BEFORE, len(rewards) - AFTER + 1):
        if fmean(rewards[k : k + AFTER]) < fmean(rewards[k - BEFORE : k]) - deviation:
            return timeline.steps[k].step
    return None


def deviation(timelines: Sequence[Timeline]) -> float:
    """Of one step's reward in healthy runs, by the differences of neighbours."""
    rewards = [[record.log["reward"] for record in timeline.steps] for timeline in timelines]
    return stdev(b - a for one in rewards for a, b in pairwise(one)) / 2**0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--keep", type=Path, help="a directory to keep the runs in")
    options = parser.parse_args()
    steps, seeds, begins = (6, 1, 3) if options.quick else (40, 5, 11)
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        place = options.keep or Path(temporary)
        demo = place / "demo"
        train.train_demo(demo, **({"warm_start_steps": 20, "steps": 1, "save_steps": 1} if options.quick else {}))
        wrong = [
            (fault, seed, run(place / f"fault-{k}-seed-{seed}", demo, fault, seed, steps))
            for k, fault in enumerate(faults(begins))
            for seed in range(1, 1 + min(seeds, FAULTY_SEEDS))
        ]
        healthy = [run(place / f"healthy-{seed}", demo, None, seed, steps) for seed in range(1, seeds + 1)]
        spread = deviation(healthy)
        table = Table("run", "begins", "alarm", "at step", "reward drops at", title=f"one sd: {spread:.3f}")
        for seed, timeline in enumerate(healthy, 1):
            table.add_row(f"healthy, seed {seed}", "", *alarm(timeline), str(drop(timeline, spread) or "never"))
        for fault, seed, timeline in wrong:
            dropped = drop(timeline, spread)
            table.add_row(f"{fault.name}, seed {seed}", str(fault.begins), *alarm(timeline), str(dropped or "never"))
        console.print(table)
        if options.json:
            names = [(f"healthy, seed {seed}", one) for seed, one in enumerate(healthy, 1)]
            names += [(f"{fault.name}, seed {seed}", one) for fault, seed, one in wrong]
            figures = [
                {"run": name, "alarms": {a.note.code: a.first for a in one.alarms}, "drop": drop(one, spread)}
                for name, one in names
            ]
            options.json.write_text(json.dumps(figures, indent=2))


def alarm(timeline: Timeline) -> tuple[str, str]:
    """The kinds of alarms, and when they were first given."""
    names = "\n".join(one.note.code for one in timeline.alarms)
    return names or "none", "\n".join(str(one.first) for one in timeline.alarms)


if __name__ == "__main__":
    main()
