"""Archives made so that two readers find different things in them, or so that one never ends."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib

import pytest
import torch

from entropy_probe.checkpoints import CheckpointError
from entropy_probe.checkpoints import archives as module
from entropy_probe.checkpoints.archives import check_archive, check_same_reading
from entropy_probe.checkpoints.objects import read_objects
from entropy_probe.checkpoints.safe_read import read_archive, read_archived

VALUES = {"exp_avg": torch.arange(6.0), "exp_avg_sq": torch.arange(6.0) ** 2, "half": torch.ones(3).bfloat16()}


def saved(value: object = VALUES) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def entries(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def written(parts: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in parts:
            archive.writestr(name, content)
    return stream.getvalue()


def directory(data: bytes) -> tuple[int, int]:
    """Where the directory of an archive of Python's begins and ends."""
    size, start = struct.unpack("<2L", data[-10:-2])
    return start, start + size


def with_ending(body: bytes, start: int, size: int, count: int, comment: bytes = b"") -> bytes:
    return body + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, start, len(comment)) + comment


COUNT = len(entries(saved()))
THREE_TIMES = {name: x * 3 for name, x in VALUES.items()}


def two_directories_by_offset(data: bytes) -> bytes:
    """Python goes by the length of the directory and finds the last, others by its offset and find the first."""
    first, second = written(entries(data)), written(entries(saved(THREE_TIMES)))
    start, end = directory(second)
    return with_ending(first + second[:end], start, end - start, COUNT)


def prefixed(data: bytes) -> bytes:
    """What torch takes for a bare pickle, with an archive behind it."""
    return pickle.dumps({"x": 1}, 2) + written(entries(data))


def commented(data: bytes) -> bytes:
    """An archive in the comment of another."""
    first, inner = written(entries(data)), written(entries(saved(THREE_TIMES)))
    start, end = directory(first)
    return with_ending(first[:end], start, end - start, COUNT, inner)


def zip64_elsewhere(data: bytes) -> bytes:
    """The last records are a short one and a long one, which lead to different directories."""
    first, second = written(entries(data)), written(entries(saved(THREE_TIMES)))
    start, end = directory(first)
    body = first[:end]
    place = len(body)
    body += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, COUNT, COUNT, end - start, start)
    body += second[: directory(second)[1]] + struct.pack("<4sLQL", b"PK\6\7", 0, place, 1)
    start, end = directory(second)
    return with_ending(body, start + len(first), end - start, COUNT)


def header(name: bytes, content: bytes, at: int) -> bytes:
    crc, size = zlib.crc32(content), len(content)
    return (
        struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, crc, size, size, len(name), 0, 0, 0, 0, 0, at) + name
    )


def overlapping(data: bytes, times: int = 50) -> bytes:
    """Many entries of the same bytes."""
    first = written(entries(data))
    start, end = directory(first)
    content = entries(data)[0][1]
    more = b"".join(header(f"archive/data/{k}0".encode(), content, 0) for k in range(times))
    return with_ending(first[:end] + more, start, end - start + len(more), COUNT + times)


def into_the_directory(data: bytes) -> bytes:
    """An entry that reaches behind the last one."""
    first = written(entries(data))
    start, end = directory(first)
    last = first[:end].rindex(b"PK\1\2")
    at = int.from_bytes(first[last + 42 : last + 46], "little")
    size = start - at
    content = first[at + 30 + len("archive/.data/serialization_id") :][: size + 10]
    return with_ending(first[:last] + header(b"archive/.data/serialization_id", content, at), start, end - start, COUNT)


def twice(data: bytes, name: str) -> bytes:
    return written([*entries(data), (name, pickle.dumps({"x": 3}, 2))])


def outside(data: bytes) -> bytes:
    """An entry that is not in torch's folder."""
    return written([*entries(data), ("elsewhere/data/0", bytes(24))])


def longer_storage(data: bytes, count: int = 60) -> bytes:
    """A tensor that takes its entry to be longer than it is, and so goes on into the next."""
    return written([(name, content.replace(b"K\6", bytes([75, count]))) for name, content in entries(data)])


CRAFTED = {
    "two directories, by offset": (two_directories_by_offset, "a second directory"),
    "two directories, by the long record": (zip64_elsewhere, "a second directory"),
    "an archive in the comment": (commented, "something before or behind one|a second directory"),
    "a bare pickle before it": (prefixed, "something before or behind one"),
    "something behind it": (lambda data: data + b"x", "something before or behind one|not a zip"),
    "entries of the same bytes": (overlapping, "an entry archive/.* over another"),
    "an entry over the directory": (into_the_directory, "over the directory"),
    "two pickles": (lambda data: twice(data, "archive/DATA.pkl"), "two entries of one name"),
    "two storages": (lambda data: twice(data, "archive/Data/0"), "two entries of one name"),
    "an entry of no folder": (outside, "entries that torch finds elsewhere|archive"),
    "a storage over its end": (longer_storage, "of another size than its data"),
    "a storage that is shorter": (lambda data: longer_storage(data, 3), "of another size than its data"),
    "compressed": (lambda data: written(entries(data), zipfile.ZIP_DEFLATED), "a compressed or encrypted entry"),
}


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
