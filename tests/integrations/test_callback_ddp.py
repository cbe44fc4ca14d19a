"""The callback on two ranks that average their gradients (gloo)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from entropy_probe.integrations.trl import EntropyProbeCallback, HeldOut
from entropy_probe.results.live import read_records
from tests.distributed.launch import rank_environment
from tests.integrations.witness import trained
from tests.processes import Process, run_all

SETTINGS = {"per_device_train_batch_size": 6, "steps": 2, "save_steps": 2}


def one_rank(directory: str, how: str) -> None:
    """Train on this rank, and write down what was seen."""
    evaluation = {"batch": "batch", "held out": HeldOut(size=6), "alone": None}[how]
    callbacks = [] if evaluation is None else [EntropyProbeCallback(every=1, evaluation=evaluation)]
    witness, warned = trained(Path(directory), callbacks, **SETTINGS)
    seen = {"seen": witness.seen, "warned": warned, "logs": witness.logs}
    Path(directory, f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))


def on_two_ranks(directory: Path, how: str) -> list[dict]:
    directory.mkdir()
    environments = [e | {"LOCAL_RANK": e["RANK"], "LOCAL_WORLD_SIZE": "2"} for e in rank_environment(2)]
    run_all(*(Process(one_rank, str(directory), how, **environment) for environment in environments))
    return [json.loads((directory / f"seen-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["batch", "held out"])
def test_two_ranks_train_as_without_and_probe_the_whole_batch(tmp_path, how):
    alone = on_two_ranks(tmp_path / "alone", "alone")
    beside = on_two_ranks(tmp_path / "beside", how)
    for with_probe, without in zip(beside, alone, strict=True):
        assert with_probe["warned"] == []
        assert with_probe["seen"] == without["seen"]
    assert beside[0]["seen"][-1]["weights"] == beside[1]["seen"][-1]["weights"]
    records = read_records(tmp_path / "beside")
    assert [record.step for record in records] == [1, 2]
    if how == "batch":
        assert all(record.loss_distance is not None and record.loss_distance < 1e-5 for record in records)
        assert all(record.predicted and record.predicted.num_clusters == 3 for record in records)
    assert sum("entropy_probe/predicted" in log for log in beside[0]["logs"]) == 2
