"""The directory a sweep writes and resumes from: every file appears whole, and nothing is mixed with other inputs.

``inputs.json`` comes first and says what the sweep is computed from, by content. Then come the rollouts, each recorded
in ``inputs.json`` once it is there, one file per finished point, the figures and, last of all, ``sweep.json``. The
process that writes holds the directory locked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from entropy_probe.cli.lock import LOCK_FILE
from entropy_probe.cli.run_directory import CONFIG_FILE, EVALUATION_FILE, UPDATE_FILE
from entropy_probe.report.wording import REPORT_FILE
from entropy_probe.results.note import Note
from entropy_probe.results.record import Record, read_record, write_atomically
from entropy_probe.results.sweep import SWEEP_FILE, Sweep, SweepPoint

__all__ = ["Inputs", "SweepDirectory", "hash_directory", "hash_file", "load_sweeps", "open_index", "unfinished"]

INPUTS_FILE, INDEX_FILE, POINTS = "inputs.json", "sweeps.json", "points"
SHOWN_FILES = ("sweep.png", "sweep.svg", "sweeps.png", "sweeps.svg", REPORT_FILE)
Batch = Literal["update", "evaluation"]
UNREADABLE = ("written by this version of entropy-probe", "choose another output_dir")
ROLLOUT_FILES: dict[Batch, str] = {"update": UPDATE_FILE, "evaluation": EVALUATION_FILE}


class _Saved(Record):
    def save(self, path: Path) -> None:
        write_atomically(path, (self.model_dump_json(indent=2) + "\n").encode())


class Recorded(_Saved):
    """A batch on disk: the SHA-256 of its file, and notes on how it was sampled."""

    sha256: str
    notes: tuple[Note, ...] = ()


class Inputs(_Saved):
    """What a sweep is computed from.

    Attributes:
        config: the resolved settings, without paths.
        checkpoint: SHA-256 over the checkpoint's files.
        base_model: the same for the base model's directory, or its name on the hub; null for full weights.
        given: SHA-256 of saved rollouts that the config names.
        versions: of the libraries whose code the numbers depend on.
        rollouts: the batches that are on disk.
    """

    schema_version: Literal[2] = 2
    config: dict[str, Any]
    checkpoint: str
    base_model: str | None
    given: dict[Batch, str]
    versions: dict[str, str]
    rollouts: dict[Batch, Recorded] = Field(default_factory=dict)

    def difference(self, other: Inputs) -> str | None:
        """What the two do not share, in words; None if they agree."""
        for name, label in (("checkpoint", "checkpoint files"), ("base_model", "base model"), ("versions", "versions")):
            if getattr(self, name) != getattr(other, name):
                return f"other {label}"
        for batch in ROLLOUT_FILES:
            if self.given.get(batch) != other.given.get(batch):
                return f"other {batch} rollouts"
        changed = next(_changed(self.config, other.config), None)
        return None if changed is None else f"another {changed}"


class SweepIndex(_Saved):
    """``sweeps.json``: the checkpoints of a run that were swept, each in the subdirectory of its name."""

    schema_version: Literal[1] = 1
    checkpoints: tuple[str, ...]


def _changed(a: Any, b: Any, prefix: str = "") -> Any:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(a.keys() | b.keys()):
            yield from _changed(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
    elif a != b:
        yield prefix


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_directory(directory: Path) -> str:
    """SHA-256 over names and contents of the files in a directory and its folders of adapters and shards, no others."""
    from entropy_probe.checkpoints.directory import adapters_of
    from entropy_probe.checkpoints.formats import folders

    places = {directory, *adapters_of(directory).values(), *folders(directory)}
    files = sorted(path for place in places for path in place.iterdir() if path.is_file())
    found = [(path.relative_to(directory).as_posix(), hash_file(path)) for path in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


class SweepDirectory:
    """One sweep on disk.

    Args:
        path: where; a directory, which is locked.
        rates: its learning rates, in increasing order.
    """

    def __init__(self, path: Path, rates: Sequence[float]) -> None:
        self.path = path
        names = (f"{k:03d}-{rate:.2e}.json" for k, rate in enumerate(rates, 1))
        self.point_files = {rate: path / POINTS / name for rate, name in zip(rates, names, strict=True)}

    def resume(self, inputs: Inputs, overwrite: bool) -> Inputs:
        """Compare with what is there, and return the inputs with the rollouts recorded so far.

        Nothing is written, but with ``overwrite`` an earlier sweep is deleted.

        Raises:
            ValueError: if the directory holds something else, or a sweep of other inputs.
        """
        if not _occupied(self.path):
            return inputs
        if not (self.path / INPUTS_FILE).is_file():
            raise ValueError(
                f"output_dir: expected a new or empty directory or an earlier sweep, {self.path} holds files of "
                "something else; choose another one"
            )
        if overwrite:
            self._clear()
            return inputs
        saved = read_record(Inputs, self.path / INPUTS_FILE, *UNREADABLE)
        difference = saved.difference(inputs)
        if difference is not None:
            raise _refusal(self.path, f"holds a sweep of {difference}")
        for batch, record in saved.rollouts.items():
            file = self.path / ROLLOUT_FILES[batch]
            if not file.is_file() or hash_file(file) != record.sha256:
                raise _refusal(self.path, f"holds a sweep of other {batch} rollouts than {file.name}")
        return saved

    def start(self, inputs: Inputs, config: str) -> None:
        """Make the directory and say what is computed in it.

        Raises:
            ValueError: if the directory cannot be made or written into.
        """
        try:
            (self.path / POINTS).mkdir(exist_ok=True)
            for left in (*self.path.glob(".*.tmp"), *(self.path / POINTS).glob(".*.tmp")):
                left.unlink()  # of a sweep that was killed while writing
            inputs.save(self.path / INPUTS_FILE)
        except OSError as error:
            raise ValueError(
                f"output_dir: cannot write into {self.path}: {error.strerror}; choose another one"
            ) from error
        write_atomically(self.path / CONFIG_FILE, config.encode())

    def record(self, inputs: Inputs, batch: Batch, notes: Sequence[Note]) -> Inputs:
        """Take note of a batch whose file is there."""
        record = Recorded(sha256=hash_file(self.path / ROLLOUT_FILES[batch]), notes=tuple(notes))
        inputs = inputs.model_copy(update={"rollouts": {**inputs.rollouts, batch: record}})
        inputs.save(self.path / INPUTS_FILE)
        return inputs

    def finished(self) -> list[SweepPoint]:
        """The points that are there.

        Raises:
            ValueError: if a file is not what it should be.
        """
        points = []
        for rate, file in self.point_files.items():
            if file.is_file():
                points.append(SweepPoint.load(file))
                if points[-1].learning_rate != rate:
                    raise _refusal(self.path, f"holds another rate than {rate:g} in {POINTS}/{file.name}")
        return points

    def save_point(self, point: SweepPoint) -> None:
        """Write one point."""
        point.save(self.point_files[point.learning_rate])

    def _clear(self) -> None:
        """Delete what sweeps write; ``inputs.json`` last, so that the directory stays recognisable."""
        (self.path / SWEEP_FILE).unlink(missing_ok=True)
        for file in (self.path / POINTS).glob("*.json"):
            file.unlink()
        for name in (*SHOWN_FILES, *ROLLOUT_FILES.values(), CONFIG_FILE, INPUTS_FILE):
            (self.path / name).unlink(missing_ok=True)


def open_index(directory: Path, checkpoints: Sequence[str], overwrite: bool) -> None:
    """Write ``sweeps.json`` into a directory, which is locked, that is empty or holds the same.

    Raises:
        ValueError: if it holds something else.
    """
    index = SweepIndex(checkpoints=tuple(checkpoints))
    file = directory / INDEX_FILE
    if _occupied(directory):
        if not file.is_file():
            raise ValueError(
                f"output_dir: expected a new or empty directory or earlier sweeps, {directory} holds files of "
                "something else; choose another one"
            )
        if read_record(SweepIndex, file, *UNREADABLE) != index and not overwrite:
            raise _refusal(directory, "holds sweeps of other checkpoints")
    index.save(file)


def load_sweeps(directory: Path) -> dict[str, Sweep]:
    """The sweep saved in a directory, or those of several checkpoints, by the checkpoint's name; empty if none.

    Raises:
        ValueError: if one of several is not finished, or a file is not what it should be.
    """
    if directory.name == SWEEP_FILE or (directory / SWEEP_FILE).is_file():
        return {"": Sweep.load(directory)}
    if not (directory / INDEX_FILE).is_file():
        return {}
    names = read_record(SweepIndex, directory / INDEX_FILE, *UNREADABLE).checkpoints
    for name in names:
        if not (directory / name / SWEEP_FILE).is_file():
            raise ValueError(f"{directory / name}: the sweep is not finished; give the same command again to resume it")
    return {name: Sweep.load(directory / name) for name in names}


def unfinished(directory: Path) -> str | None:
    """What to say about a directory whose sweep has not finished; None if it is not one."""
    if not (directory / INPUTS_FILE).is_file():
        return None
    points = len(list((directory / POINTS).glob("*.json")))
    return f"{directory}: the sweep is not finished ({points} points); give the same command again to resume it"


def _occupied(directory: Path) -> bool:
    return any(entry.name != LOCK_FILE for entry in directory.iterdir())


def _refusal(directory: Path, what: str) -> ValueError:
    return ValueError(f"output_dir: {directory} {what}; choose another one, or pass --overwrite to sweep again")
