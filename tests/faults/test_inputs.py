"""Every fault of settings, prompts, rollouts, paths and programs is one line, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import re

import pytest
import torch

from entropy_probe.cli.errors import describe
from entropy_probe.results import record
from tests.cli.conftest import invoke
from tests.faults.inputs import COMMANDS, INPUT_FAULTS, PATH_FAULTS, WAYS

pytestmark = pytest.mark.unchecked  # types are part of what is at fault


@pytest.mark.parametrize("fault", INPUT_FAULTS, ids=lambda fault: f"{fault.where}: {fault.name}")
def test_an_input(fault, tmp_path):
    with pytest.raises(ValueError) as caught:
        fault.meet(tmp_path)
    line = describe(caught.value)
    assert re.search(fault.line, line), line
    assert len(line) < 1000


@pytest.mark.parametrize(("where", "way"), PATH_FAULTS)
def test_a_path(where, way, tmp_path):
    result = invoke(*COMMANDS[where](WAYS[way](tmp_path)))
    assert result.exit_code == 2, result.exception
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr) < 1000
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "a link in a loop"])
def test_a_file_to_write(trained, way, tmp_path):
    """Nothing but a file is replaced: a folder, a pipe or a device stays what it is. A link becomes the file."""
    path = WAYS[way](tmp_path)
    before = os.lstat(path).st_mode if os.path.lexists(tmp_path) and way in ("a folder", "a pipe") else None
    result = invoke("init", trained.checkpoint, "--output", path, "--overwrite")
    assert result.exit_code == 2, result.exception
    assert len(result.stderr.splitlines()) == 1
    assert before is None or os.lstat(path).st_mode == before
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("number", "code", "remedy"), [(errno.ENOSPC, 1, "make room"), (errno.EACCES, 2, "permission")]
)
def test_what_the_system_refuses(trained, tmp_path, monkeypatch, number, code, remedy):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(record.Path, "write_bytes", refuse)
    result = invoke("init", trained.checkpoint, "--output", tmp_path / "probe.yaml")
    assert result.exit_code == code
    assert result.stderr.startswith(f"error: {tmp_path}/probe.yaml: the system says {os.strerror(number)}; ")
    assert remedy in result.stderr
    assert not list(tmp_path.iterdir())


def test_another_default_device(trained):
    """What is read and loaded does not depend on it."""
    from entropy_probe.checkpoints import load_checkpoint

    plain = load_checkpoint(trained.checkpoint)
    with torch.device("meta"):
        other = load_checkpoint(trained.checkpoint)
    for p, q in zip(plain.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_faults_have_names_of_their_own():
    names = [(fault.where, fault.name) for fault in INPUT_FAULTS]
    assert len(set(names)) == len(names)
