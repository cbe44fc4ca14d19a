"""What a sweep has in its directory beside what a run has: a file for each point, or a list of several sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from entropy_probe.cli.output import POINTS, check_new
from entropy_probe.results.record import Kept, SavedRecord
from entropy_probe.results.sweep import SWEEP_FILE, Sweep, SweepPoint

__all__ = ["SweepPoints", "load_sweeps", "open_index"]

INDEX_FILE = "sweeps.json"
_ELSEWHERE = "choose another one, or pass --overwrite to sweep again"


class SweepPoints:
    """The finished points of a sweep, each in a file of its own.

    Args:
        directory: of the sweep.
        rates: its learning rates, in increasing order.
    """

    def __init__(self, directory: Path, rates: Sequence[float]) -> None:
        self._directory = directory
        self._files = {rate: f"{POINTS}/{k:03d}-{rate:.2e}.json" for k, rate in enumerate(rates, 1)}

    def load(self) -> list[SweepPoint]:
        """The points that are there.

        Raises:
            ValueError: if a file is not what it should be.
        """
        points = []
        for rate, name in self._files.items():
            if (self._directory / name).is_file():
                points.append(SweepPoint.load(self._directory / name))
                if points[-1].learning_rate != rate:
                    raise ValueError(
                        f"output_dir: {self._directory} holds another rate than {rate:g} in {name}; {_ELSEWHERE}"
                    )
        return points

    def save(self, point: SweepPoint) -> None:
        """Write one point."""
        file = self._directory / self._files[point.learning_rate]
        file.parent.mkdir(exist_ok=True)
        point.save(file)


class SweepIndex(SavedRecord):
    """``sweeps.json``: the checkpoints of a run that were swept, each in the subdirectory of its name."""

    kept: ClassVar = Kept(INDEX_FILE, "list of sweeps", "sweep", "choose another output_dir")
    schema_version: Literal[1] = 1
    checkpoints: tuple[str, ...]


def open_index(directory: Path, checkpoints: Sequence[str], overwrite: bool) -> None:
    """Write ``sweeps.json`` into a directory, which is locked, that is empty or holds the same.

    Raises:
        ValueError: if it holds something else.
    """
    index = SweepIndex(checkpoints=tuple(checkpoints))
    if not (directory / INDEX_FILE).is_file():
        check_new(directory, overwrite, "no sweeps of several checkpoints")
    elif not overwrite and SweepIndex.load(directory) != index:
        raise ValueError(f"output_dir: {directory} holds sweeps of other checkpoints; {_ELSEWHERE}")
    index.save(directory)


def load_sweeps(directory: Path) -> dict[str, Sweep]:
    """The sweep saved in a directory, or those of several checkpoints, by the checkpoint's name; empty if none.

    Raises:
        ValueError: if one of several is not finished, or a file is not what it should be.
    """
    if directory.name == SWEEP_FILE or (directory / SWEEP_FILE).is_file():
        return {"": Sweep.load(directory)}
    if not (directory / INDEX_FILE).is_file():
        return {}
    names = SweepIndex.load(directory).checkpoints
    for name in names:
        if not (directory / name / SWEEP_FILE).is_file():
            raise ValueError(f"{directory / name}: the sweep is not finished; give the same command again to resume it")
    return {name: Sweep.load(directory / name) for name in names}
