"""Runs over their steps, with chosen numbers."""

from __future__ import annotations

import math
from typing import Any

from entropy_probe.analyses.alarms import alarms
from entropy_probe.results.estimate import Estimate
from entropy_probe.results.live import PromptShare, StepRecord, Timeline


def estimate(value: float, error: float = 1e-4) -> Estimate:
    return Estimate(value=value, standard_error=error, num_clusters=128, unit="nats/token")


def make_record(step: int, entropy: float, change: float, **changes: Any) -> StepRecord:
    """A step that was probed, with a small part of the change from its own gradient."""
    reward = 0.4 + 0.2 * (1 - math.exp(-step / 20)) + 0.05 * math.sin(7.0 * step)
    fields: dict[str, Any] = {
        "step": step,
        "log": {"reward": reward, "entropy": entropy + 0.015 * math.sin(5.0 * step),
                "completions/mean_length": 11 + math.sin(3.0 * step)},
        "entropy": estimate(entropy, 0.004),
        "predicted": estimate(change, 2e-4),
        "realized": estimate(change * 0.98, 2e-4),
        "gradient": estimate(0.15 * change + 3e-4 * math.sin(2.0 * step), 2e-4),
        "momentum": estimate(0.85 * change - 3e-4 * math.sin(2.0 * step), 1e-4),
        "weight_decay": estimate(0.0, 0.0),
        "lifetime": estimate(1.5 * change + 3e-3 * math.sin(2.0 * step), 2e-3),
        "committed": estimate(8 * change, 2e-3),
        "ess": 0.99,
        "gradient_norm": 0.3 + 0.1 * math.sin(4.0 * step),
        "clip_factor": 1.0,
        "learning_rate": 3e-4,
        "prompts": tuple(PromptShare(id=(step * 5 + k) % 12, value=change * 0.1 * math.sin(k + step), text=f"{k}+7=")
                         for k in range(4)),
    }  # fmt: skip
    return StepRecord(**(fields | changes))


def make_timeline(steps: int = 40, change: float = -0.002, name: str = "runs/a", every: int = 1) -> Timeline:
    """Entropy that changes by as much at every step; not below 0.01."""
    records = tuple(
        make_record(step, max(0.01, 0.25 + change * (step - 1)), change)
        if (step - 1) % every == 0
        else StepRecord(step=step, log={"reward": 0.4, "entropy": max(0.01, 0.25 + change * (step - 1))})
        for step in range(1, steps + 1)
    )
    return Timeline(name=name, steps=records, alarms=alarms(records))
