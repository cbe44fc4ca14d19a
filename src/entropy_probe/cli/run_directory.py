"""The directory a run writes: everything or nothing, and never over what it did not write."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from entropy_probe.cli.lock import LOCK_FILE
from entropy_probe.report.wording import REPORT_FILE, RESULT_FIGURES
from entropy_probe.results.attribution_tables import TABLES
from entropy_probe.results.probe import RESULTS_FILE, ProbeResult
from entropy_probe.results.validation import VALIDATION_FILE

__all__ = ["CONFIG_FILE", "EVALUATION_FILE", "FIGURES", "SHARDS", "UPDATE_FILE", "check_output_dir", "stage"]

CONFIG_FILE = "config.yaml"
UPDATE_FILE = "update.parquet"
EVALUATION_FILE = "evaluation.parquet"
SHARDS = "evaluation"
"""Where the evaluation batch is collected while it is sampled; gone once the run is complete."""
FIGURES = "figures"
_STAGING = ".unfinished-"
# results.json goes last: where it is, the rest is, but for the validation, which comes later.
RUN_FILES = (CONFIG_FILE, UPDATE_FILE, EVALUATION_FILE, *TABLES, VALIDATION_FILE, RESULTS_FILE)
# Drawn from the rest, by this run or by `entropy-probe report` later.
SHOWN_FILES = (REPORT_FILE, *(f"{FIGURES}/{name}.{kind}" for name in RESULT_FIGURES for kind in ("png", "svg")))


def check_output_dir(directory: Path, overwrite: bool) -> None:
    """Refuse a directory, which is locked, that a run must not write into.

    Raises:
        ValueError: if it holds something and ``overwrite`` is off, or holds files named like a run's without being one.
    """
    if all(_left_by_a_killed_run(entry) for entry in directory.iterdir() if entry.name != LOCK_FILE):
        return
    if not overwrite:
        raise ValueError(
            f"output_dir: expected a new or empty directory, {directory} holds files; choose another one or pass "
            "--overwrite"
        )
    in_the_way = [name for name in RUN_FILES if (directory / name).exists()]
    if in_the_way and not _is_run(directory):
        raise ValueError(
            f"output_dir: {directory} holds {in_the_way[0]} but no result of an earlier run, so it is not "
            "overwritten; choose another one"
        )


def _left_by_a_killed_run(entry: Path) -> bool:
    """Whether a run that never came to its end left this; the next one goes on with its shards."""
    if entry.name == SHARDS and entry.is_dir():
        return all(file.name.lstrip(".").startswith("shard-") for file in entry.iterdir())
    return entry.name.startswith(_STAGING)


@contextmanager
def stage(directory: Path, keep: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """A temporary directory in a locked one, into which its files move when the block ends without an error.

    Files of an earlier run that this one did not write are removed, except the resolved paths in ``keep``;
    other files stay. After an error everything is as it was, but rollouts sampled by then are kept in a directory
    beside it, which a note on the error names. An evaluation batch that was sampled in part stays as it is, in
    shards, as it does when the process is killed: the next run goes on with it.
    """
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=directory))
    try:
        yield staging
        written = [name for name in RUN_FILES if (staging / name).exists()]
        for name in {*RUN_FILES, *SHOWN_FILES} - set(written):
            if (directory / name).resolve() not in keep:
                (directory / name).unlink(missing_ok=True)
        for name in written:
            (staging / name).replace(directory / name)
        for entry in directory.iterdir():
            if _left_by_a_killed_run(entry):
                shutil.rmtree(entry)
    except BaseException as error:
        _rescue_rollouts(staging, directory, error)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _rescue_rollouts(staging: Path, directory: Path, error: BaseException) -> None:
    """Sampling can take hours; keep what it gave when a later step fails."""
    sampled = [staging / name for name in (UPDATE_FILE, EVALUATION_FILE) if (staging / name).exists()]
    if staging / EVALUATION_FILE in sampled:
        shutil.rmtree(directory / SHARDS, ignore_errors=True)
    elif (directory / SHARDS).exists():
        error.add_note("the evaluation shards are kept, the same command goes on with them")
        return
    if not sampled:
        return
    kept = Path(tempfile.mkdtemp(prefix=f"{directory.name}.rollouts-", dir=directory.parent))
    for file in sampled:
        file.replace(kept / file.name)
    settings = " ".join(f"rollouts.{file.stem}={kept / file.name}" for file in sampled)
    error.add_note(f"the rollouts are kept, add {settings}")


def _is_run(directory: Path) -> bool:
    try:
        ProbeResult.load(directory)
    except ValueError:
        return False
    return True
