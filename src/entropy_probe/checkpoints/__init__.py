"""Training checkpoints: policy, tokenizer and optimizer state, read without running anything they contain."""

from __future__ import annotations

from entropy_probe.checkpoints.errors import (
    CheckpointError,
    DamagedFileError,
    InvalidValueError,
    MappingError,
    MismatchError,
    MissingFileError,
    UnsafeFileError,
    UnsupportedError,
)
from entropy_probe.checkpoints.load import CheckpointState, inspect_checkpoint, load_checkpoint, load_reference
from entropy_probe.results.checkpoint import CheckpointReport, GroupReport

__all__ = [
    "CheckpointError",
    "CheckpointReport",
    "CheckpointState",
    "DamagedFileError",
    "GroupReport",
    "InvalidValueError",
    "MappingError",
    "MismatchError",
    "MissingFileError",
    "UnsafeFileError",
    "UnsupportedError",
    "inspect_checkpoint",
    "load_checkpoint",
    "load_reference",
]
