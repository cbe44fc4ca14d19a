"""Files changed at random, seeded: each is read, or refused in one line with an error of ours.

Bytes are cut, put in and replaced, in files and in the pickles inside archives (whose checksums are then right again);
values and tensors are exchanged for others of any kind.
"""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from entropy_probe.checkpoints import CheckpointError
from entropy_probe.checkpoints.dcp import METADATA, ShardedDirectory
from entropy_probe.checkpoints.formats.dcp import read_sharded_optimizer, read_sharded_weights
from entropy_probe.checkpoints.optimizer_file import check_entries, read_optimizer
from entropy_probe.checkpoints.weights import check_finite

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, about what it finds in the files
SEEDS = range(25)
VALUES = [
    *(None, True, 0, -1, 7, 2**40, 2**63, 10**5000, 0.5, -1.0, 1e300, float("nan"), float("inf"), "", "x" * 3000),
    *("../x", "\x1b\n", (), (0.9,), (0.9, None), [], [[]], [1, [2]], {}, {"a": 1}, {1: 2}, torch.float32),
    *(torch.ones(2), torch.zeros(0), torch.zeros(1).expand(10**6), torch.tensor(2.5), torch.eye(3).to_sparse()),
    *(torch.empty(3, device="meta"), torch.empty(2**30, 2**30, device="meta")),
    *(torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.int64)),
]


def garbled(r: random.Random, data: bytes) -> bytes:
    at, length = r.randrange(len(data)), r.randrange(1, 30)
    how = r.randrange(4)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + r.randbytes(length) + data[at:]
    if how == 2:
        return data[:at] + data[at + length :]
    found = bytearray(data)
    for _ in range(r.choice([1, 1, 5])):
        found[r.randrange(min(len(found), r.choice([100, 1000, 10**6])))] = r.choice([0, 0x85, 0x86, *b"tR(}", 255])
    return bytes(found)


def archive_garbled(r: random.Random, data: bytes) -> bytes:
    """One entry of an archive, mostly the pickle, with a right checksum."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(made, "w") as to:
        names = source.namelist()
        chosen = r.choice([*names, *5 * [n for n in names if n.endswith("data.pkl")]])
        for name in names:
            content = source.read(name)
            to.writestr(name, garbled(r, content) if name == chosen and content else content)
    return made.getvalue()


def changed(r: random.Random, value: Any) -> None:
    """Something in nested containers becomes something else."""
    containers, waiting = [], [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict | list) and found:
            containers.append(found)
            waiting += found.values() if isinstance(found, dict) else found
    inside = r.choice(containers)
    keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
    key, how = r.choice(keys), r.randrange(5)
    if how == 0:
        del inside[key]
    elif how == 1 and isinstance(inside, dict):
        inside[r.choice(["x", 3, None, ("a", 1), "step"])] = inside.pop(key)
    else:
        inside[key] = r.choice(VALUES)


def an_optimizer() -> Any:
    parameters = [torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(parameters, foreach=False)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


def trainers(r: random.Random, directory: Path) -> Callable[[], Any]:
    file, stream, saved = directory / "optimizer.pt", io.BytesIO(), an_optimizer()
    how = r.randrange(4)
    if how < 2:
        changed(r, r.choice([saved, saved["param_groups"]]))
    torch.save(saved, stream)
    data = stream.getvalue()
    file.write_bytes(data if how < 2 else garbled(r, data) if how == 2 else archive_garbled(r, data))

    def read() -> None:
        check_entries(read_optimizer(file))

    return read


def sharded(r: random.Random, directory: Path) -> Callable[[], Any]:
    saved = an_optimizer()
    names = {0: "a.weight", 1: "a.bias"}
    group = {key: value for key, value in saved["param_groups"][0].items() if key != "params"}
    content: dict[str, Any] = {
        "model": {name: torch.ones(4, 3) for name in names.values()},
        "optimizer": {
            "state": {names[i]: entry for i, entry in saved["state"].items()},
            "param_groups": [group | {"params": list(names.values())}],
        },
    }
    dcp.save(content, checkpoint_id=directory, no_dist=True)
    file = directory / METADATA
    if r.random() < 0.4:
        file.write_bytes(garbled(r, file.read_bytes()))
    else:
        index = pickle.loads(file.read_bytes())
        key = r.choice([*index.storage_data])
        if r.random() < 0.5:  # another value, at the end of the file
            place = index.storage_data[key]
            shard = directory / place.relative_path
            data, stream = shard.read_bytes(), io.BytesIO()
            torch.save(r.choice(VALUES), stream)
            old = data[place.offset : place.offset + place.length]
            new = r.choice([stream.getvalue(), archive_garbled(r, old), garbled(r, old)])
            place.offset, place.length = len(data), len(new)
            shard.write_bytes(data + new)
        else:
            meta = index.state_dict_metadata[key.fqn]
            inside = r.choice(
                [index, index.storage_data[key], key, meta, *getattr(meta, "chunks", ()), *3 * [index.planner_data]]
            )
            into = inside if isinstance(inside, dict) else vars(inside)
            if into:
                into[r.choice([*into])] = r.choice([v for v in VALUES if not isinstance(v, torch.Tensor)])
        file.write_bytes(pickle.dumps(index))

    def read() -> None:
        opened = ShardedDirectory.open(directory)
        check_finite(read_sharded_weights(opened))
        found = read_sharded_optimizer(opened)
        check_entries(found)
        found.loaded()

    return read


@pytest.mark.parametrize("make", [trainers, sharded])
def test_what_is_changed_at_random_is_read_or_refused(make, tmp_path):
    messages = []
    for seed in SEEDS:
        directory = tmp_path / str(seed)
        directory.mkdir()
        read = make(random.Random(seed), directory)
        try:
            read()
        except CheckpointError as error:
            messages.append(str(error))
    assert [m for m in messages if len(m.splitlines()) != 1 or len(m) > 1000 or "\ud800" in m] == []
    assert len(SEEDS) / 2 < len(messages) < len(SEEDS)
