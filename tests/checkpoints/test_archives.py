"""Archives made so that two readers find different things in them, or so that one never ends."""

from __future__ import annotations

import io
import zipfile

import pytest
import torch

from entropy_probe.checkpoints import CheckpointError
from entropy_probe.checkpoints import archives as module
from entropy_probe.checkpoints.archives import check_archive, check_same_reading
from entropy_probe.checkpoints.objects import read_objects
from entropy_probe.checkpoints.safe_read import read_archive, read_archived
from tests.checkpoints.crafted import (
    CRAFTED,
    THREE_TIMES,
    VALUES,
    entries,
    saved,
    two_directories_by_offset,
    written,
)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", CRAFTED)
def test_what_is_checked_is_what_is_read(case, tmp_path, monkeypatch):
    craft, match = CRAFTED[case]
    data = craft(saved())
    path = tmp_path / "optimizer.pt"
    path.write_bytes(data)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was opened"))
    for read in (lambda: read_archive(path), lambda: read_archived(data, "here")):
        with pytest.raises(CheckpointError, match=match) as caught:
            read()
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError):
        read_objects(path, {}, "do something") if case != "an entry of no folder" else read_archive(path)


def test_python_and_torch_do_read_crafted_files_differently():
    """Else these tests would show nothing: each reader is let on its own."""
    data = two_directories_by_offset(saved())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        by_python = archive.read("archive/data/0")
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    assert by_python == bytes(torch.arange(6.0).mul(3).numpy())
    assert reader.get_record("data/0") == bytes(torch.arange(6.0).numpy())


def test_torch_is_asked_where_it_finds_what_was_checked():
    data, other = saved(), saved(THREE_TIMES | {"more": torch.ones(400)})
    contents = check_archive("here", io.BytesIO(data), data)
    check_same_reading("here", data, contents)
    with pytest.raises(CheckpointError, match="entries that torch finds elsewhere"):
        check_same_reading("here", other, contents)
    shorter = contents | {"archive/data.pkl": range(contents["archive/data.pkl"].start, 70)}
    with pytest.raises(CheckpointError, match="a pickle that torch finds another length of"):
        check_same_reading("here", data, shorter)


@pytest.mark.parametrize("write", [saved, lambda value=VALUES: written(entries(saved(value)))])
def test_what_torch_and_python_write_is_read(write, tmp_path):
    path = tmp_path / "optimizer.pt"
    path.write_bytes(write())
    for got in (read_archive(path), read_archived(path.read_bytes(), "here")):
        assert all(torch.equal(got[name], x) for name, x in VALUES.items())


def test_sizes_are_bounded(monkeypatch, tmp_path):
    """The bounds are lowered: what is refused at them is refused before it is looked at."""
    data = saved([str(k) for k in range(5000)])
    with monkeypatch.context() as patch:
        patch.setattr(module, "MAX_PICKLE", 10_000)
        with pytest.raises(CheckpointError, match=r"a pickle of [\d,]+ bytes"):
            read_archived(data, "here")
    with monkeypatch.context() as patch:
        patch.setattr("entropy_probe.checkpoints.pickles.MAX_INSTRUCTIONS", 10_000)
        with pytest.raises(CheckpointError, match="more than 10,000 instructions"):
            read_archived(data, "here")
    with monkeypatch.context() as patch:
        patch.setattr(module, "MAX_DIRECTORY", 300)
        patch.setattr(zipfile, "ZipFile", lambda *a: pytest.fail("its directory was read"))
        with pytest.raises(CheckpointError, match=r"a directory of [\d,]+ bytes"):
            read_archived(data, "here")
    read_archived(data, "here")


@pytest.mark.parametrize("depth", [500, 100_000])
def test_what_is_nested_deeply_ends(depth):
    inner = b"]" * depth + b"a" * (depth - 1)
    data = written([(n, b"\x80\x02" + inner + b"." if n.endswith("data.pkl") else c) for n, c in entries(saved(0))])
    got = read_archived(data, "here")
    assert isinstance(got, list)
