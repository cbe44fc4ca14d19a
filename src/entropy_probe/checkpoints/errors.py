"""The error of everything that reads checkpoints."""

from __future__ import annotations

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line: where, expected, got, remedy."""
