"""Writes the records of a live training run, each step's directory whole or not at all. Needs no trainer's library."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from entropy_probe.results.live import (
    GRADIENT_FILE,
    RECORD_FILE,
    ROLLOUTS_FILE,
    StepRecord,
    recorded_steps,
    step_directory,
)
from entropy_probe.results.record import sync
from entropy_probe.rollouts.batch import Rollouts


def write_record(
    run_directory: str | Path,
    record: StepRecord,
    rollouts: Rollouts | None = None,
    gradient: Mapping[str, Tensor] | None = None,
    *,
    keep_gradients: int = 0,
) -> Path:
    """Write one step into ``run_directory/entropy_probe/step-000123/``, in place of an earlier record of that step.

    A process that is killed at any point leaves the directory whole or absent. One process writes per run directory.

    Args:
        run_directory: the trainer's output directory.
        record: the step.
        rollouts: its batch, with everything the loss needs.
        gradient: its clipped gradient by parameter name, on any device.
        keep_gradients: of how many of the last recorded steps gradients are kept; the others are deleted.

    Returns:
        The step's directory.

    Raises:
        OSError: if it cannot be written.
    """
    from safetensors.torch import save_file

    place = step_directory(run_directory, record.step)
    temporary, replaced = (place.with_name(f".{place.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    place.parent.mkdir(parents=True, exist_ok=True)
    for left in (*place.parent.glob(".step-*.tmp"), *place.parent.glob(".step-*.old")):
        shutil.rmtree(left)
    temporary.mkdir()
    (temporary / RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if rollouts is not None:
        rollouts.to_parquet(temporary / ROLLOUTS_FILE)
    if gradient is not None and keep_gradients:
        host = {name: tensor.detach().cpu().contiguous() for name, tensor in gradient.items()}
        save_file(host, temporary / GRADIENT_FILE)
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    if place.exists():
        place.rename(replaced)
    temporary.rename(place)
    sync(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    if gradient is not None:
        held = [file for _, other in recorded_steps(run_directory) if (file := other / GRADIENT_FILE).is_file()]
        for file in held[: max(0, len(held) - keep_gradients)]:
            file.unlink()
    return place


def drop_records_after(run_directory: str | Path, step: int) -> None:
    """Delete the records of later steps, which a run that goes on from an earlier checkpoint takes anew."""
    for number, place in recorded_steps(run_directory):
        if number > step:
            aside = place.with_name(f".{place.name}.{os.getpid()}.old")
            place.rename(aside)
            shutil.rmtree(aside)


class Recorder:
    """Writes records of a run by :func:`write_record`, so that training does not wait for the disk.

    That is in a thread of its own, one record after the other.
    """

    def __init__(self, run_directory: str | Path, *, keep_gradients: int = 0) -> None:
        self._directory, self._keep = Path(run_directory), keep_gradients
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="entropy-probe-recorder")
        self._last: Future[Path] | None = None

    def write(
        self, record: StepRecord, rollouts: Rollouts | None = None, gradient: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a step as :func:`write_record`, once the one before it is written.

        Tensors are copied to host memory first, so they may change as soon as this returns.

        Raises:
            OSError: if the step before it could not be written.
        """
        self.wait()
        if rollouts is not None:
            rollouts = rollouts.cpu()
        if gradient is not None:
            gradient = {name: tensor.detach().to("cpu", copy=True) for name, tensor in gradient.items()}
        self._last = self._thread.submit(
            write_record, self._directory, record, rollouts, gradient, keep_gradients=self._keep
        )

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            OSError: if it could not be.
        """
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Wait, and end the thread.

        Raises:
            OSError: as :meth:`wait`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
