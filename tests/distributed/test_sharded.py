"""Live models sharded by FSDP2 over two and three processes: the numbers of the whole model, and no trace."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import yaml

from entropy_probe.checkpoints import CheckpointError, load_checkpoint
from tests.cli.conftest import invoke
from tests.distributed.launch import on_processes, rank_environment, saved
from tests.distributed.ranks import differences
from tests.distributed.sharded import one_rank, probe, subject_of
from tests.processes import Process, run_all
from tests.tiny import train_grpo

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WIDE = {"dtype": "float64"}
ONE_SIDE = 2e-3
"""GiB that hold the gradients of one side, on one rank of two and on one of one alike."""
CASES = {
    "lora": {"what": "run", "kind": "lora", "model": {"rank": 1}, "config": WIDE},
    "full, tied, frozen": {
        "what": "run",
        "kind": "full",
        "model": {"tie_word_embeddings": True},
        "config": WIDE | {"geometry": "frozen", "frozen_max_scale": 1e9},
    },
    "one batch": {"what": "one_batch", "kind": "lora", "config": WIDE | {"horizon": None}},  # has no profile in shards
    "gradient": {"what": "gradient", "kind": "lora", "config": WIDE},
    "live step, own batch": {"what": "ahead", "own": True, "kind": "lora", "config": WIDE},
}  # fmt: skip
MORE = {
    "question": {"what": "question", "kind": "lora", "config": WIDE},
    "live step": {"what": "ahead", "own": False, "kind": "full", "config": WIDE},
    "sweep": {"what": "sweep", "kind": "lora", "config": WIDE},
    "kept in bfloat16": {
        "what": "gradient",
        "kind": "full",
        "config": WIDE | {"max_grad_norm": None},  # the norm of shards is rounded otherwise
        "kept": True,
    },
    "one batch, kept nothing": {"what": "one_batch", "kind": "lora", "config": WIDE | {"max_stored_gradient_gib": 0.0}},
    "gathered before": {"what": "run", "kind": "full", "config": WIDE, "gathered": True, "reshard": False},
    "one side kept": {
        "what": "one_batch",
        "kind": "full",
        "config": WIDE | {"max_stored_gradient_gib": ONE_SIDE, "horizon": None},
    },
    "question, kept nothing": {"what": "question", "kind": "full", "config": WIDE | {"max_stored_gradient_gib": 0.0}},
    "kept nothing": {"what": "run", "kind": "lora", "config": WIDE | {"max_stored_gradient_gib": 0.0}},
}  # fmt: skip
"""What the long suite tries too."""
REFUSED = {
    "attribution": ({"what": "attribute", "kind": "lora", "config": {}}, "model: expected whole parameters"),
    "SGD": ({"what": "run", "kind": "full", "config": {}, "optimizer": "SGD"}, "optimizer: expected torch.optim.AdamW"),
    "whole gradient": (
        {"what": "gradient", "kind": "lora", "config": {}, "gathered_gradient": True},
        "gradient: base_model",
    ),
    "summed twice": (
        {"what": "run", "kind": "lora", "config": {}, "gradients_times": 2.0},
        "model: expected log-probabilities to change along",
    ),
    "bfloat16 inside": (
        {"what": "run", "kind": "lora", "config": {}, "mixed": True},
        "model: expected computation in at least float32, got torch.bfloat16",
    ),
}


UNEVEN = ("lora", "gathered before", "one batch, kept nothing")
"""What is tried on three ranks; on one of two, nothing is left of a tensor of one row either."""


@pytest.fixture(scope="module")
def on_shards(made_once):
    """What every case gave on each rank of two."""
    cases = CASES | {name: case for name, (case, _) in REFUSED.items()}
    return outcomes(made_once("on-shards", lambda directory: probe_on(2, cases, directory)))


def probe_on(size: int, cases: dict, out: Path) -> None:
    (out / "cases.json").write_text(json.dumps(cases))
    run_all(*(Process(one_rank, out / "cases.json", out, **environment) for environment in rank_environment(size)))


def outcomes(directory: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob("[0-9].json"))]


@cache
def whole(name: str):
    case = (CASES | MORE)[name]
    return json.loads(json.dumps(probe(case, *subject_of(case))))


HOW = ("head", "prefix_sharing", "per_sample_gradients", "notes", "gradients", "direct", "direct_slope")
"""Fields that say how it was computed, which shards change, and what they cannot have."""


def numbers(found):
    if isinstance(found, dict):
        return {key: numbers(value) for key, value in found.items() if key not in HOW}
    return [numbers(x) for x in found] if isinstance(found, list) else found


def check(name: str, on_ranks: list[dict]) -> None:
    first = on_ranks[0][name]
    assert "result" in first, first.get("error") or first["crash"]
    assert differences(numbers(whole(name)), numbers(first["result"]), 1e-9) == []
    for other in on_ranks[1:]:
        assert differences(numbers(first["result"]), numbers(other[name]["result"]), 0.0) == []


@pytest.mark.parametrize("name", CASES)
def test_shards_give_the_numbers_of_the_whole_model(on_shards, name):
    check(name, on_shards)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "names"), [(2, tuple(MORE)), (3, UNEVEN)])
def test_more_cases_and_uneven_shards(size, names, tmp_path):
    probe_on(size, {name: (CASES | MORE)[name] for name in names}, tmp_path)
    on_ranks = outcomes(tmp_path)
    for name in names:
        check(name, on_ranks)
        assert all(of_rank[name].get("untouched", True) for of_rank in on_ranks)


@pytest.mark.parametrize("name", [*CASES, *REFUSED])
def test_a_sharded_model_is_left_as_it_was(on_shards, name):
    for of_rank in on_shards:
        assert of_rank[name].get("untouched", True)
        assert of_rank[name]["trains"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_shards_cannot_do_is_refused(on_shards, name):
    for of_rank in on_shards:
        assert of_rank[name].get("error", of_rank[name].get("crash", "no error")).startswith(REFUSED[name][1])


@pytest.fixture(scope="module")
def full_checkpoint(tmp_path_factory) -> Path:
    return train_grpo(tmp_path_factory.mktemp("full"), lora=False, steps=2, save_steps=2)


def run_whole_and_sharded(directory: Path, **settings) -> tuple[dict, dict]:
    """The results of the command line in one process and, in shards, in two, on the same rollouts."""
    settings = {"device": "cpu", "probe": {"max_completion_length": 8, "dtype": "float64"}} | settings
    one, two = directory / "one", directory / "two"
    (directory / "run.yaml").write_text(yaml.safe_dump(settings))
    assert invoke("run", directory / "run.yaml", "--output-dir", one).exit_code == 0
    codes, _, errors = on_processes(2, "run", str(directory / "run.yaml"), "shard=true", "--output-dir", str(two))
    assert codes == [0, 0], errors
    first, second = saved(one), saved(two)
    assert second["diagnostics"]["per_sample_gradients"] == "per cluster (the parameters are sharded)"
    return numbers(first), numbers(second)


@pytest.mark.parametrize(
    "where",
    ["DCP", pytest.param("adapter", marks=pytest.mark.slow), pytest.param("full weights", marks=pytest.mark.slow)],
)
def test_checkpoints_are_loaded_in_shards(where, tmp_path, request):
    """Sampling included, which all ranks do together."""
    run = request.getfixturevalue("trained")
    settings = {
        "checkpoint": str(run.checkpoint),
        "prompts": {"jsonl": str(run.prompts)},
        "reward": "tests.cli.rewards:odd_characters",
    }
    if where == "full weights":
        settings["checkpoint"] = str(request.getfixturevalue("full_checkpoint"))
    if where == "DCP":
        run = request.getfixturevalue("sharded") / "tied"
        settings |= {"checkpoint": str(run / "hf" / "checkpoint-2"), "base_model": str(run / "base")}
    one, two = run_whole_and_sharded(
        tmp_path,
        **settings,
        update={"num_prompts": 4, "group_size": 3},
        evaluation={"total_sequences": 8},
        mode="both" if where == "DCP" else "two_batch",
    )
    # norms of the library compute in float32 also here, which the change of a score by a step feels
    for name in ("realized", "difference"):
        for key, value in one.pop(name).items():
            other = two[name][key]
            if isinstance(value, float):
                size = 1e-7 if key in ("value", "standard_error") else 1e-5 * abs(value)
                assert abs(value - other) <= size or key in ("noise_floor", "step_rounding"), (name, key, value, other)
            else:
                assert value == other
        del two[name]
    profiles = (each.pop("horizons")["points"] for each in (one, two))
    for p, q in zip(*profiles, strict=True):
        assert all(abs(p[name]["value"] - q[name]["value"]) <= 1e-7 for name in ("predicted", "realized"))
    assert differences(one, two, 1e-6) == []


def test_a_process_alone_has_nothing_to_shard_over(trained):
    with pytest.raises(CheckpointError, match=r"^shard: expected a process group to spread the model over, found none"):
        load_checkpoint(trained.checkpoint, shard=True)
