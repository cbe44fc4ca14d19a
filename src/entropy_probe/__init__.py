"""Predict, measure and explain the entropy change of the next RL optimizer step of a language model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entropy_probe.analyses.attribution import Attribution
    from entropy_probe.checkpoints import CheckpointError, CheckpointState, load_checkpoint
    from entropy_probe.config import ProbeConfig
    from entropy_probe.probe import EntropyProbe
    from entropy_probe.results.changes import HorizonPoint, Horizons
    from entropy_probe.results.estimate import Estimate
    from entropy_probe.results.probe import Predicted, ProbeResult, Realized
    from entropy_probe.results.step import StepVectors
    from entropy_probe.results.sweep import Sweep, SweepPoint
    from entropy_probe.results.validation import Validation
    from entropy_probe.rollouts.batch import Rollouts
    from entropy_probe.types import TokenScores

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "CheckpointError",
    "CheckpointState",
    "EntropyProbe",
    "Estimate",
    "HorizonPoint",
    "Horizons",
    "Predicted",
    "ProbeConfig",
    "ProbeResult",
    "Realized",
    "Rollouts",
    "StepVectors",
    "Sweep",
    "SweepPoint",
    "TokenScores",
    "Validation",
    "load_checkpoint",
]

# Names are imported when first used, so that reading a result or printing help does not wait for torch.
_HOME = {
    "Attribution": "analyses.attribution",
    "CheckpointError": "checkpoints",
    "CheckpointState": "checkpoints",
    "EntropyProbe": "probe",
    "Estimate": "results.estimate",
    "HorizonPoint": "results.changes",
    "Horizons": "results.changes",
    "Predicted": "results.probe",
    "ProbeConfig": "config",
    "ProbeResult": "results.probe",
    "Realized": "results.probe",
    "Rollouts": "rollouts.batch",
    "StepVectors": "results.step",
    "Sweep": "results.sweep",
    "SweepPoint": "results.sweep",
    "TokenScores": "types",
    "Validation": "results.validation",
    "load_checkpoint": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
