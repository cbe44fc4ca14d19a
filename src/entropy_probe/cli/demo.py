"""``entropy-probe demo``: train a tiny policy, probe it, show the result."""

from __future__ import annotations

from pathlib import Path

import typer

__all__ = ["demo"]

CHECKPOINT_DIR = Path("examples/tiny")
OUTPUT_DIR = Path("runs/demo")


def demo() -> None:
    """Train a tiny policy on digit sums, probe its next step, and show the result.

    Trains into examples/tiny in about a minute, or finds it there, and writes the results to runs/demo.
    """
    from rich.console import Console

    from entropy_probe.cli.config import RunConfig
    from entropy_probe.cli.report import print_run
    from entropy_probe.cli.run import probe_checkpoint
    from entropy_probe.demo.train import MAX_COMPLETION_LENGTH, quiet_single_thread, train_demo
    from entropy_probe.parallel.ranks import ALONE

    with quiet_single_thread():
        checkpoint = train_demo(CHECKPOINT_DIR, on_progress=lambda line: typer.echo(line, err=True))
        config = RunConfig.model_validate(
            {
                "checkpoint": checkpoint,
                "base_model": str(CHECKPOINT_DIR / "base"),
                "output_dir": OUTPUT_DIR,
                "overwrite": True,
                "device": "cpu",
                "prompts": {"jsonl": CHECKPOINT_DIR / "prompts.jsonl"},
                "reward": "exact_match",
                "update": {"num_prompts": 16, "group_size": 8},
                "generation": {"batch_size": 512},
                "evaluation": {"total_sequences": 2048},
                "attribution": True,
                "attribution_folds": 8,
                "probe": {"max_completion_length": MAX_COMPLETION_LENGTH},
            }
        )
        print_run(OUTPUT_DIR, probe_checkpoint(config, ALONE), Console())
