"""Live models sharded by FSDP2 over two and three processes: the numbers of the whole model, and no trace."""

from __future__ import annotations

import json
from functools import cache

import pytest

from tests.cli.conftest import start
from tests.distributed.ranks import differences
from tests.distributed.sharded import probe, subject_of
from tests.distributed.test_watch import free_port

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WIDE = {"dtype": "float64"}
CASES = {
    "lora": {"what": "run", "kind": "lora", "config": WIDE},
    "full, tied": {"what": "run", "kind": "full", "model": {"tie_word_embeddings": True}, "config": WIDE},
    "kept nothing": {"what": "run", "kind": "lora", "config": WIDE | {"max_stored_gradient_gib": 0.0}},
    "frozen": {"what": "run", "kind": "full", "config": WIDE | {"geometry": "frozen", "frozen_max_scale": 1e9}},
    "gathered before": {"what": "run", "kind": "full", "config": WIDE, "gathered": True, "reshard": False},
    "one batch": {"what": "one_batch", "kind": "lora", "config": WIDE},
    "one batch, one side kept": {"what": "one_batch", "kind": "full", "config": WIDE | {"max_stored_gradient_gib": 2e-3}},
    "one batch, kept nothing": {"what": "one_batch", "kind": "lora", "config": WIDE | {"max_stored_gradient_gib": 0.0}},
    "sweep": {"what": "sweep", "kind": "lora", "config": WIDE},
    "float32": {"what": "run", "kind": "full", "config": {}},
}  # fmt: skip
REFUSED = {
    "attribution": ({"what": "attribute", "kind": "lora", "config": {}}, "model: expected whole parameters"),
    "SGD": ({"what": "run", "kind": "full", "config": {}, "optimizer": "SGD"}, "optimizer: expected torch.optim.AdamW"),
    "summed twice": (
        {"what": "run", "kind": "lora", "config": {}, "gradients_times": 2.0},
        "model: expected gradients summed",
    ),
    "bfloat16 inside": (
        {"what": "run", "kind": "lora", "config": {}, "mixed": True},
        "model: expected computation in at least float32, got torch.bfloat16",
    ),
}


@pytest.fixture(scope="module", params=[2, 3])
def on_shards(request, tmp_path_factory):
    """What every case gave on each rank."""
    out = tmp_path_factory.mktemp("sharded")
    cases = out / "cases.json"
    cases.write_text(json.dumps(CASES | {name: case for name, (case, _) in REFUSED.items()}))
    environment = {"WORLD_SIZE": str(request.param), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = ("-m", "tests.distributed.sharded")
    processes = [
        start(str(cases), str(out), command=command, **environment, RANK=str(rank)) for rank in range(request.param)
    ]
    ended = [(process.communicate(timeout=240), process.returncode) for process in processes]
    assert [code for _, code in ended] == [0] * request.param, ended[0][0]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(request.param)]


@cache
def whole(name: str):
    case = CASES[name]
    return json.loads(json.dumps(probe(case, *subject_of(case))))


HOW = ("head", "prefix_sharing", "per_unit_gradients", "messages", "gradients", "direct", "slope")
"""Fields that say how it was computed, which shards change."""


def numbers(found):
    if isinstance(found, dict):
        return {key: numbers(value) for key, value in found.items() if key not in HOW}
    return [numbers(x) for x in found] if isinstance(found, list) else found


@pytest.mark.parametrize("name", CASES)
def test_shards_give_the_numbers_of_the_whole_model(on_shards, name):
    first = on_shards[0][name]
    assert "result" in first, first.get("error") or first["crash"]
    rel = 1e-9 if CASES[name]["config"] else 2e-3
    assert differences(numbers(whole(name)), numbers(first["result"]), rel) == []
    for other in on_shards[1:]:
        assert differences(numbers(first["result"]), numbers(other[name]["result"]), 0.0) == []


@pytest.mark.parametrize("name", [*CASES, *REFUSED])
def test_a_sharded_model_is_left_as_it_was(on_shards, name):
    for of_rank in on_shards:
        assert of_rank[name].get("untouched", True)
        assert of_rank[name]["trains"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_shards_cannot_do_is_refused(on_shards, name):
    for of_rank in on_shards:
        assert of_rank[name].get("error", of_rank[name].get("crash", "no error")).startswith(REFUSED[name][1])
