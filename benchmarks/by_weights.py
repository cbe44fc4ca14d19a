"""The command line of benchmarks that measure one figure with LoRA and with full weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from two_batch import FULL, QUICK

__all__ = ["run_by_weights"]

Figures = dict[str, Any]


def run_by_weights(about: str | None, cost: Callable[..., Figures], show: Callable[[list[Figures]], Table]) -> None:
    """Measure as asked for on the command line, print a table and, if asked for, write the figures as JSON.

    Args:
        about: what ``--help`` says.
        cost: the figures of one setup, called with ``lora`` and ``rounds``.
        show: the table.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds")
    parser.add_argument("--weights", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--prompts", type=int, help="prompts of the update batch (default: 16)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setup = QUICK if options.quick else FULL
    setup = replace(setup, num_prompts=options.prompts or setup.num_prompts)
    figures = [cost(setup, lora=weights == "lora", rounds=options.rounds) for weights in options.weights]
    Console().print(show(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
