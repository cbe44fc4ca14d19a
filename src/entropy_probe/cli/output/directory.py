"""One output directory: what may be done in it, and what is done at the start, at the end and after an error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from entropy_probe.cli.output.inputs import INPUTS_FILE, Batch, Command, Inputs, Pilot, Recorded, hash_file, inputs_of
from entropy_probe.cli.output.lock import LOCK_FILE, cannot_write
from entropy_probe.report.text import printable
from entropy_probe.report.wording import REPORT_FILE, RESULT_FIGURES
from entropy_probe.results.attribution_tables import TABLES
from entropy_probe.results.probe import RESULTS_FILE, ProbeResult
from entropy_probe.results.record import write_atomically
from entropy_probe.results.sweep import SWEEP_FILE
from entropy_probe.results.validation import VALIDATION_FILE

if TYPE_CHECKING:
    from entropy_probe.cli.batches import Sources
    from entropy_probe.cli.config import RunConfig
    from entropy_probe.parallel.ranks import Ranks
    from entropy_probe.results.note import Note

CONFIG_FILE = "config.yaml"
FIGURES, POINTS, SHARDS, ANSWERS, HALVES = "figures", "points", "evaluation", "answers", "halves"
FOLDERS = (FIGURES, POINTS, SHARDS, ANSWERS, HALVES)
ROLLOUT_FILES: dict[Batch, str] = {"update": "update.parquet", "evaluation": "evaluation.parquet"}
LAST_FILES = {"run": RESULTS_FILE, "validate": VALIDATION_FILE, "sweep": SWEEP_FILE}
NOUNS = {"run": "run", "validate": "validation", "sweep": "sweep"}
# as patterns, in the order in which they are deleted: what says that the rest is there goes first
OWN_FILES = (
    *(REPORT_FILE, VALIDATION_FILE, RESULTS_FILE, SWEEP_FILE),
    *(f"{FIGURES}/{name}.{kind}" for name in RESULT_FIGURES for kind in ("png", "svg")),
    *("sweep.png", "sweep.svg", "sweeps.png", "sweeps.svg", "sweeps.json", *TABLES, f"{POINTS}/[0-9]*.json"),
    *(f"{ANSWERS}/*.json", f"{HALVES}/[0-9]*.json"),
    *(*ROLLOUT_FILES.values(), f"{SHARDS}/shard-*.parquet", CONFIG_FILE, INPUTS_FILE),
)


@dataclass(frozen=True)
class Output:
    """A directory that a command may write, which is locked.

    Attributes:
        config: the command's resolved settings.
        inputs: what it computes from; of a directory that is resumed, with what was sampled.
        resumes: whether the directory holds work of the same inputs.
        finished: whether that is complete.
        writes: whether this process writes: rank 0 does.
    """

    config: RunConfig
    inputs: Inputs
    resumes: bool = False
    finished: bool = False
    writes: bool = True

    @property
    def path(self) -> Path:
        """The directory."""
        return self.config.output_dir

    @property
    def shards(self) -> Path:
        """Where an evaluation batch is collected."""
        return self.path / SHARDS

    def batch_file(self, batch: Batch) -> Path:
        """Where a batch goes."""
        return self.path / ROLLOUT_FILES[batch]

    @contextmanager
    def writing(self, ranks: Ranks) -> Iterator[None]:
        """Write what the block computes; after an error keep what took long, or leave nothing.

        Raises:
            ValueError: if the directory cannot be written into.
        """
        with ranks.agreeing():
            if self.writes:
                self._start()
        try:
            yield
        except BaseException as error:
            kept = self._what_is_kept() if self.writes else ""
            if kept is None:
                clear(self.path, self.given)
            elif kept:
                error.add_note(kept)
            raise

    def record(self, batch: Batch, notes: Sequence[Note]) -> Output:
        """Take note of a sampled batch whose file is there."""
        recorded = Recorded(sha256=hash_file(self.batch_file(batch)), notes=tuple(notes))
        inputs = self.inputs.model_copy(update={"rollouts": {**self.inputs.rollouts, batch: recorded}})
        inputs.save(self.path)
        if batch == "evaluation":
            _delete(self.shards.glob("shard-*"))
            _delete_empty(self.path)
        return replace(self, inputs=inputs)

    def record_pilot(self, pilot: Pilot) -> Output:
        """Take note of what a pilot said, so that a command that resumes goes by it."""
        inputs = self.inputs.model_copy(update={"pilot": pilot})
        if self.writes:
            inputs.save(self.path)
        return replace(self, inputs=inputs)

    def add_given(self, sources: Sources) -> None:
        """Put given batches beside the result, as configured, unless they lie there."""
        for batch, file in ((batch, self.batch_file(batch)) for batch in ROLLOUT_FILES):
            rollouts = getattr(sources, batch)
            if self.config.save_rollouts and rollouts is not None and file.resolve() not in self.given:
                rollouts.to_parquet(file)

    def finish(self, draw: Callable[[], None]) -> None:
        """Delete what a finished directory does without, and draw what is shown of the rest, last the report."""
        if not self.writes:
            return
        unsaved = [] if self.config.save_rollouts else map(self.batch_file, ROLLOUT_FILES)
        halves = (self.path / HALVES).glob("[0-9]*.json")
        _delete([*_temporary_files(self.path), *self.shards.glob("shard-*"), *halves])
        _delete(file for file in unsaved if file.resolve() not in self.given)
        _delete_empty(self.path)
        if not (self.path / REPORT_FILE).is_file():
            draw()

    @property
    def given(self) -> set[Path]:
        """Files of rollouts that the config names, which are the user's wherever they lie."""
        return {path.resolve() for _, path in self.config.rollouts if path is not None}

    def _start(self) -> None:
        try:
            if self.resumes:
                _delete([*_temporary_files(self.path), self.path / REPORT_FILE])
            else:
                clear(self.path, self.given)
            self.inputs.save(self.path)
            write_atomically(self.path / CONFIG_FILE, self.config.to_yaml().encode())
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _what_is_kept(self) -> str | None:
        saved = Inputs.load(self.path)
        if self.inputs.command == "validate" and (self.path / RESULTS_FILE).exists():
            return f"the run itself is complete in {self.path}, the same command goes on with its validation"
        if not saved.rollouts:
            what = _what_took_long(self.path, saved)
            return what and f"the {what} are kept, the same command goes on with them"
        settings = _settings(self.path, saved)
        return f"the rollouts are kept, the same command goes on with them, another one with {settings} --overwrite"


def open_output(
    config: RunConfig, command: Command, sources: Sources, ranks: Ranks, options: Mapping[str, Any] = {}
) -> Output:
    """The output directory of a command, locked by rank 0, which compares what it holds with what is to be computed.

    ``options`` are settings of the command that are not in the config.

    Raises:
        ValueError: if the directory holds something else, or work of other inputs, unless it may be overwritten.
    """
    opened = []
    with ranks.agreeing():
        if ranks.rank == 0:
            opened.append(resume(config, inputs_of(config, command, sources, options)))
    (output,) = ranks.broadcast(opened)
    return replace(output, writes=ranks.rank == 0)


def resume(config: RunConfig, inputs: Inputs) -> Output:
    """Compare what a directory holds with what is to be computed. Nothing is written or deleted."""
    path, new = config.output_dir, Output(config, inputs)
    if config.overwrite and is_ours(path):
        return new
    if config.overwrite or not (path / INPUTS_FILE).is_file():
        check_new(path, config.overwrite, "no result of an earlier run", new.given)
        return new
    saved = Inputs.load(path)
    kept, noun = _what_took_long(path, saved), NOUNS[saved.command]
    if kept is None:  # interrupted before there was anything to go on with
        return new
    if saved.command != inputs.command:
        raise ValueError(f"output_dir: {path} holds a {noun}; choose another one, or pass --overwrite to replace it")
    finished = (path / LAST_FILES[saved.command]).is_file()
    difference = saved.difference(inputs) or _other_rollouts(path, saved, finished)
    if difference is not None:
        keeping = f", with {_settings(path, saved)} to keep what was sampled" if saved.rollouts and not finished else ""
        raise ValueError(
            f"output_dir: {path} holds a {noun} of {difference}; choose another one, or pass --overwrite to "
            f"{saved.command} again{keeping}"
        )
    note = f"this {noun}, shown as it is" if finished else f"{kept} of this {noun}, which goes on with them"
    say(f"{path} holds {note}; --overwrite starts afresh")
    return Output(config, saved, resumes=True, finished=finished)


def clear(directory: Path, given: Collection[Path] = ()) -> None:
    """Delete all but given rollouts; last what the directory is recognised by, should this be interrupted."""
    mark = directory / (INPUTS_FILE if (directory / INPUTS_FILE).exists() else RESULTS_FILE)
    files = [file for file in _own_files(directory) if file != mark and file.resolve() not in given]
    _delete([*_temporary_files(directory), *files])
    _delete_empty(directory)
    _delete([mark])


def check_new(directory: Path, overwrite: bool, lacks: str, given: Collection[Path] = ()) -> None:
    """Refuse a locked directory that is not one of the command's and holds files.

    Args:
        directory: the directory; what a killed process leaves before it has written anything does not count.
        overwrite: whether there may be files, but none with names that the commands give.
        lacks: what it would hold if it were the command's, in words.
        given: files that it may hold, whatever they are called, where there may be files.
    """
    own = [file for file in _own_files(directory) if file.resolve() not in given]
    if overwrite and own:
        raise ValueError(
            f"output_dir: {directory} holds {own[0].relative_to(directory)} but {lacks}, so it is not overwritten; "
            "choose another one"
        )
    passing = {directory / LOCK_FILE, *_temporary_files(directory)}
    if not overwrite and not passing.issuperset(directory.iterdir()):
        raise ValueError(
            f"output_dir: expected a new or empty directory, {directory} holds files; choose another one or pass "
            "--overwrite"
        )


def unfinished(directory: Path) -> str | None:
    """What to say about a directory whose command has not finished; None if it is not one."""
    if not (directory / INPUTS_FILE).is_file() or any((directory / file).is_file() for file in LAST_FILES.values()):
        return None
    command = Inputs.load(directory).command
    done = len(list((directory / POINTS).glob("*.json")))
    points = f" ({done} point{'' if done == 1 else 's'})" if command == "sweep" else ""
    return f"{directory}: the {NOUNS[command]} is not finished{points}; give the same command again to resume it"


def is_ours(directory: Path) -> bool:
    """Whether one of the commands wrote into a directory, be it a run of before there were inputs."""
    for record in (Inputs, ProbeResult):
        with suppress(ValueError):
            return bool(record.load(directory))
    return False


def _settings(directory: Path, inputs: Inputs) -> str:
    """What to add to a command to give it the batches that were sampled."""
    return " ".join(f"rollouts.{batch}={directory / ROLLOUT_FILES[batch]}" for batch in inputs.rollouts)


def _other_rollouts(directory: Path, inputs: Inputs, finished: bool) -> str | None:
    """Which sampled batch is not what was recorded, in words; a finished directory may do without."""
    for batch, recorded in inputs.rollouts.items():
        file = directory / ROLLOUT_FILES[batch]
        if hash_file(file) != recorded.sha256 if file.is_file() else not finished:
            return f"other {batch} rollouts than {file.name}"
    return None


def _what_took_long(directory: Path, inputs: Inputs) -> str | None:
    """What a directory holds that is not thrown away, if anything."""
    if inputs.rollouts:
        return "rollouts"
    patterns = {f"{SHARDS}/shard-*.parquet": "evaluation shards", f"{POINTS}/[0-9]*.json": "points"}
    patterns |= dict.fromkeys(LAST_FILES.values(), "results")
    return next((what for pattern, what in patterns.items() if any(directory.glob(pattern))), None)


def _own_files(directory: Path) -> list[Path]:
    return [file for pattern in OWN_FILES for file in sorted(directory.glob(pattern))]


def _temporary_files(directory: Path) -> list[Path]:
    """Files that a killed process was writing."""
    patterns = [str(PurePath(name).with_name(f".{PurePath(name).name}.*.tmp")) for name in OWN_FILES]
    return [file for pattern in patterns for file in directory.glob(pattern)]


def _delete(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _delete_empty(directory: Path) -> None:
    for folder in FOLDERS:
        with suppress(OSError):  # is not there, or holds something
            (directory / folder).rmdir()


def say(note: str) -> None:
    """A note on stderr."""
    sys.stderr.write(printable(f"note: {note}") + "\n")
