from __future__ import annotations

import os
import subprocess
import sys

import pytest

from entropy_probe.cli.output import check_new
from entropy_probe.cli.output.lock import LOCK_FILE, locked


def check(directory) -> None:
    with locked(directory):
        check_new(directory, False, "nothing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_refused_before_any_work(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="cannot write into"), locked(tmp_path / "locked" / "out"):
        pass


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file; choose another one"), locked(tmp_path / "file"):
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
from entropy_probe.cli.output import locked
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
                check(out)
            assert (out / LOCK_FILE).exists(), "a refused process removed the lock of another"
            if kill:
                other.kill()
            else:
                other.stdin.close()
            other.wait()
        # what a killed process leaves neither blocks nor counts as something in the directory
        assert (out / LOCK_FILE).exists() == kill
        check(out)
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
