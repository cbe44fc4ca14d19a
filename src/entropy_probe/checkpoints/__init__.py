"""Training checkpoints: policy, tokenizer and optimizer state, read without running anything they contain."""

from __future__ import annotations

from entropy_probe.checkpoints.errors import CheckpointError
from entropy_probe.checkpoints.hf_trainer import CheckpointState, inspect_checkpoint, load_checkpoint
from entropy_probe.results import CheckpointReport, GroupReport

__all__ = [
    "CheckpointError",
    "CheckpointReport",
    "CheckpointState",
    "GroupReport",
    "inspect_checkpoint",
    "load_checkpoint",
]
