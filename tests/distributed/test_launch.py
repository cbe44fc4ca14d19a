"""Several processes through the real command line: the same numbers, the same files, and a way out when one dies."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import yaml

from entropy_probe import Rollouts
from entropy_probe.cli.ranks import LOST
from tests.cli.conftest import invoke
from tests.distributed.launch import on_processes, saved
from tests.distributed.ranks import differences

SETTINGS = {
    "device": "cpu",
    "reward": "tests.cli.rewards:odd_characters",
    "update": {"num_prompts": 7, "group_size": 3},
    "evaluation": {"total_sequences": 40},
    "mode": "both",
    # ranks pack their rows otherwise, which rounds otherwise
    "probe": {"max_completion_length": 8, "learning_rate": 1e-3, "dtype": "float64"},
}


def config_file(directory: Path, trained, **changes) -> Path:
    settings = SETTINGS | {
        "checkpoint": str(trained.checkpoint),
        "prompts": {"jsonl": str(trained.prompts)},
        "output_dir": str(directory / "out"),
    }
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(settings | changes))
    return path


def check_same(one: Path, many: Path) -> None:
    """Every field equal to 1e-6."""
    assert differences(saved(one), saved(many), 1e-6) == []
    for batch in ("update", "evaluation"):
        x, y = (Rollouts.from_parquet(directory / f"{batch}.parquet") for directory in (one, many))
        for column in ("input_ids", "attention_mask", "response_mask", "prompt_ids", "advantages", "rewards"):
            mine, yours = getattr(x, column), getattr(y, column)
            assert (mine is yours is None) or mine.equal(yours), column


def lines(stderr: str) -> list[str]:
    """What is not progress (``12:34:56 …``)."""
    return [line for line in stderr.splitlines() if line[2:3] != ":"]


def test_seven_prompts_on_three_ranks(trained, tmp_path):
    config = config_file(tmp_path, trained)
    assert invoke("run", config, "--output-dir", tmp_path / "one").exit_code == 0
    codes, out, err = on_processes(3, "run", config)
    assert codes == [0, 0, 0], err
    check_same(tmp_path / "one", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )
    assert "Saved in" in out[0]
    assert out[1:] == ["", ""]
    assert "score evaluation" in err[0]
    assert [lines(text) for text in err] == [[], [], []]
    assert not any("score evaluation" in text for text in err[1:])


def test_a_killed_rank_ends_the_run_and_the_next_resumes(trained, tmp_path):
    config = config_file(tmp_path, trained, mode="two_batch")
    codes, _, err = on_processes(2, "run", config, fault="kill:second shard", rank=1)
    assert codes == [1, -signal.SIGKILL]
    assert lines(err[0]) == [f"error: {LOST}"]
    shards = sorted((tmp_path / "out" / "evaluation").iterdir())
    assert [shard.name for shard in shards] == ["shard-00000.parquet"]
    first = shards[0].stat().st_mtime_ns
    assert not (tmp_path / "out" / "results.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("entropy_probe.sampling.evaluation.SHARD_SEQUENCES", 12)
        kept = []
        from entropy_probe.sampling import evaluation

        merge = evaluation.merge_rollouts

        def look(files, path):
            kept.append(files[0].stat().st_mtime_ns)
            merge(files, path)

        patch.setattr(evaluation, "merge_rollouts", look)
        assert invoke("run", config).exit_code == 0
    assert kept == [first], "the first shard was not taken as it is"
    assert invoke("run", config, "--output-dir", tmp_path / "one").exit_code == 0
    check_same(tmp_path / "one", tmp_path / "out")


PHASES = ("load checkpoint", "sample", "second shard", "score evaluation", "update gradient", "evaluation gradient",
          "update error", "score after step", "noise floor", "score batch", "cross-prompt gradients")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_may_be_killed_in_any_phase(trained, tmp_path, phase, rank):
    config = config_file(tmp_path, trained)
    began = time.monotonic()
    codes, _, err = on_processes(3, "run", config, fault=f"kill:{phase}", rank=rank)
    assert time.monotonic() - began < 120
    assert [codes[other] for other in {0, 1, 2} - {rank}] == [1, 1]
    assert [line for text in err for line in lines(text)] == [f"error: {LOST}"]
    codes, _, err = on_processes(3, "run", config)
    assert codes == [0, 0, 0], err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", ["load checkpoint", "second shard", "update gradient", "score after step"])
def test_a_rank_that_holds_shards_may_be_killed(trained, tmp_path, phase, rank):
    """The others are in the middle of a pass that they make together."""
    config = config_file(tmp_path, trained, shard=True)
    codes, _, err = on_processes(2, "run", config, fault=f"kill:{phase}", rank=rank)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1
    assert lines(err[1 - rank]) == [f"error: {LOST}"]
    codes, _, err = on_processes(2, "run", config)
    assert codes == [0, 0], err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("how", "code"), [("refuse", 2), ("raise", 1)])
@pytest.mark.parametrize("phase", ["load checkpoint", "second shard", "score evaluation", "score after step"])
def test_an_error_in_any_phase_is_one_line(trained, tmp_path, phase, how, code, rank):
    codes, _, err = on_processes(3, "run", config_file(tmp_path, trained), fault=f"{how}:{phase}", rank=rank)
    assert codes == [code] * 3
    (said,) = [line for text in err for line in lines(text)]
    assert f"struck in {phase}" in said


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_do_not_depend_on_ranks_or_microbatches(trained, tmp_path, size, normalization, dtype):
    settings = SETTINGS["probe"] | {"normalization": normalization, "dtype": dtype}
    for tokens in (40, 300, 8192):
        config = config_file(tmp_path, trained, probe=settings | {"max_tokens_per_microbatch": tokens})
        codes, _, err = on_processes(size, "run", config, "--output-dir", tmp_path / str(tokens))
        assert codes == [0] * size, err
    config = config_file(tmp_path, trained, probe=settings)
    assert invoke("run", config, "--output-dir", tmp_path / "one").exit_code == 0
    for tokens in (40, 300, 8192):
        check_same(tmp_path / "one", tmp_path / str(tokens))


@pytest.mark.slow
def test_a_sweep_on_three_ranks_is_resumed_by_one(trained, tmp_path):
    changes = {"sweep": {"smallest": 1e-4, "largest": 1e-3, "num": 4, "direct_curvature": True}}
    config = config_file(tmp_path, trained, mode="two_batch", **changes)
    codes, _, err = on_processes(3, "sweep", config, fault="kill:score at 0.000464", rank=1)
    assert codes[1] == -signal.SIGKILL
    assert {codes[0], codes[2]} == {1}
    assert len(list((tmp_path / "out" / "points").iterdir())) == 2
    codes, _, err = on_processes(3, "sweep", config)
    assert codes == [0, 0, 0], err
    assert invoke("sweep", config, "--output-dir", tmp_path / "one").exit_code == 0
    found, expected = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("out", "one"))
    for a, b in zip(expected["points"], found["points"], strict=True):
        assert a["predicted"]["value"] == pytest.approx(b["predicted"]["value"], rel=1e-6)
        assert abs(a["realized"]["value"] - b["realized"]["value"]) < a["realized"]["noise_floor"]
    direct = [x["curvature"]["direct"] for x in (found, expected)]
    assert direct[0]["value"] == pytest.approx(direct[1]["value"], rel=1e-4)
