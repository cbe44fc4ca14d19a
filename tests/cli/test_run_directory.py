from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from entropy_probe.cli.lock import LOCK_FILE, locked
from entropy_probe.cli.run_directory import RUN_FILES, check_output_dir, stage
from tests.report.results import make_result


@contextmanager
def staged(directory, **arguments):
    """As a run does it."""
    with locked(directory), stage(directory, **arguments) as staging:
        yield staging


def check(directory, overwrite: bool) -> None:
    with locked(directory):
        check_output_dir(directory, overwrite)


def write_run(directory, *names: str, text: str = "new") -> None:
    with staged(directory) as staging:
        for name in names:
            (staging / name).write_text(text)
        make_result().save(staging)


def contents(directory) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_files_appear_together_and_nothing_else_is_left(tmp_path):
    out = tmp_path / "a" / "b"
    with staged(out) as staging:
        (staging / "config.yaml").write_text("x")
        assert {path.name for path in out.iterdir()} == {staging.name, LOCK_FILE}
    assert contents(out) == {"config.yaml": "x"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, RuntimeError])
def test_after_an_error_everything_is_as_it_was(tmp_path, error):
    def fail(directory):
        with staged(directory) as staging:
            (staging / "config.yaml").write_text("half")
            raise error

    with pytest.raises(error):
        fail(tmp_path / "new")
    assert not (tmp_path / "new").exists()

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(error):
        fail(empty)
    assert list(empty.iterdir()) == []

    write_run(tmp_path / "run", "config.yaml", "update.parquet")
    before = contents(tmp_path / "run")
    with pytest.raises(error):
        fail(tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_overwriting_removes_what_the_new_run_has_not_and_nothing_of_others(tmp_path):
    write_run(tmp_path / "run", "config.yaml", "update.parquet", "evaluation.parquet")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    kept = frozenset({(tmp_path / "run" / "update.parquet").resolve()})
    with staged(tmp_path / "run", keep=kept) as staging:
        (staging / "config.yaml").write_text("second")
        make_result().save(staging)
    left = contents(tmp_path / "run")
    assert left.keys() == {"config.yaml", "results.json", "update.parquet", "notes.txt"}
    assert left["config.yaml"] == "second"
    assert left["notes.txt"] == "mine"


def test_directories_that_may_be_written(tmp_path):
    check(tmp_path / "new", overwrite=False)
    check(tmp_path, overwrite=False)
    write_run(tmp_path / "run", "config.yaml")
    check(tmp_path / "run", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    check(tmp_path / "other", overwrite=True)


def test_directories_that_may_not_be_written(tmp_path):
    write_run(tmp_path / "run", "config.yaml")
    with pytest.raises(ValueError, match=r"expected a new or empty directory, .* pass --overwrite"):
        check(tmp_path / "run", overwrite=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        check(tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("name", RUN_FILES)
def test_overwrite_never_replaces_files_that_no_run_wrote(tmp_path, name):
    (tmp_path / name).write_text("somebody's own")
    with pytest.raises(ValueError, match=f"holds {name} but no result of an earlier run"):
        check(tmp_path, overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_refused_before_any_work(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="cannot write into"), locked(tmp_path / "locked" / "out"):
        pass


def test_a_path_through_a_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ValueError, match=r"cannot write into .*file/out: Not a directory"),
        locked(tmp_path / "file" / "out"),
    ):
        pass


HOLD = """
import sys
from pathlib import Path
from entropy_probe.cli.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_directory_is_held_by_one_process_until_it_ends_or_is_killed(tmp_path):
    out = tmp_path / "out"
    for kill in (True, False):
        command = [sys.executable, "-c", HOLD, str(out)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdin is not None
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(ValueError, match=r"another process is working in .*out; wait for it to end"):
                check(out, overwrite=True)
            assert (out / LOCK_FILE).exists(), "a refused process removed the lock of another"
            if kill:
                other.kill()
            else:
                other.stdin.close()
            other.wait()
        # what a killed process leaves neither blocks nor counts as something in the directory
        assert (out / LOCK_FILE).exists() == kill
        check(out, overwrite=False)
        assert out.exists() == kill
        if kill:
            assert list(out.iterdir()) == []
            out.rmdir()


def test_a_lock_file_removed_in_between_is_no_lock(tmp_path, monkeypatch):
    """The holder ends between another's opening the file and its locking it: the other holds a file that is gone."""
    import fcntl

    flock, calls = fcntl.flock, []

    def late(descriptor, how):
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
        calls.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path):
        assert len(calls) == 2
        with pytest.raises(ValueError, match="another process is working in"), locked(tmp_path):
            pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    import errno
    import fcntl

    def unsupported(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path / "out"):
        pass
    assert "out cannot be locked (No locks available): keep other processes out of it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
