"""Predict, measure and explain the entropy change of the next RL optimizer step of a language model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entropy_probe.attribution import Attribution
    from entropy_probe.checkpoints import CheckpointError, CheckpointState, load_checkpoint
    from entropy_probe.config import ProbeConfig
    from entropy_probe.probe import EntropyProbe
    from entropy_probe.results import Estimate, Prediction, ProbeResult, Realized
    from entropy_probe.sweep_results import Sweep, SweepPoint
    from entropy_probe.types import Rollouts, TokenScores
    from entropy_probe.validation_results import Validation

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "CheckpointError",
    "CheckpointState",
    "EntropyProbe",
    "Estimate",
    "Prediction",
    "ProbeConfig",
    "ProbeResult",
    "Realized",
    "Rollouts",
    "Sweep",
    "SweepPoint",
    "TokenScores",
    "Validation",
    "load_checkpoint",
]

# Names are imported when first used, so that reading a result or printing help does not wait for torch.
_HOME = {
    "Attribution": "attribution",
    "CheckpointError": "checkpoints",
    "CheckpointState": "checkpoints",
    "EntropyProbe": "probe",
    "Estimate": "results",
    "Prediction": "results",
    "ProbeConfig": "config",
    "ProbeResult": "results",
    "Realized": "results",
    "Rollouts": "types",
    "Sweep": "sweep_results",
    "SweepPoint": "sweep_results",
    "TokenScores": "types",
    "Validation": "validation_results",
    "load_checkpoint": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
