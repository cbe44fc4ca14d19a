"""Gradients that a live run recorded of the steps before a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def recorded_gradients(checkpoint: Path, names: Sequence[str]) -> list[dict[str, Tensor | None]]:
    """The gradients of the steps up to a checkpoint, the last one first, as far back as none is missing.

    Args:
        checkpoint: ``checkpoint-123`` of a run with records beside it.
        names: of the trained parameters.

    Raises:
        ValueError: if the last step's is not there.
    """
    from safetensors.torch import load_file

    from entropy_probe.results.live import GRADIENT_FILE, step_directory

    number, gradients = checkpoint.resolve().name.rpartition("-")[2], []
    step = int(number) if number.isdecimal() else 0
    while (file := step_directory(checkpoint.resolve().parent, step - len(gradients)) / GRADIENT_FILE).is_file():
        held = load_file(file)
        gradients.append({**dict.fromkeys(names), **held})
    if not gradients:
        raise ValueError(
            f"origins: expected the recorded gradient of step {number} beside {checkpoint}, got none; train with "
            "EntropyProbeCallback(record='all', keep_gradients=N), which keeps those of the last N steps, or set "
            "origins to false"
        )
    return gradients
