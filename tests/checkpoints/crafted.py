"""Archives of ``torch.save`` made so that two readers find different things in them, and what is said of each."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib

import torch

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
