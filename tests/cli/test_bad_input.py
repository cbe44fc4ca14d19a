"""Bad input: exit code 2, one line on stderr, nothing written."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from entropy_probe import Rollouts
from entropy_probe.sampling import HFGenerator
from tests.checkpoints.conftest import edit_json, edit_optimizer
from tests.cli.conftest import execute, invoke


@pytest.fixture(autouse=True)
def _nothing_written(tmp_path):
    yield
    assert not (tmp_path / "out").exists()


@pytest.fixture
def rollout_file(tmp_path):
    """A valid batch on file, one column of which a test may replace."""
    path = tmp_path / "saved.parquet"
    lengths = torch.tensor([3, 4, 5, 6, 3, 4, 5, 6])
    position = torch.arange(8)
    Rollouts(
        input_ids=torch.randint(2, 50, (8, 8), generator=torch.Generator().manual_seed(0)),
        attention_mask=position < (2 + lengths)[:, None],
        response_mask=(position >= 2) & (position < (2 + lengths)[:, None]),
        prompt_ids=torch.arange(8) // 2,
        advantages=torch.tensor([1.0, -1.0] * 4),
    ).to_parquet(path)

    def edit(column: str | None = None, values=None):
        table = pq.read_table(path)
        if column is not None:
            index = table.column_names.index(column)
            field = table.schema.field(index)
            table = table.set_column(index, field, pa.array(values(table[column].to_pylist()), field.type))
            pq.write_table(table, path)
        return path

    return edit


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["probe.lerning_rate=1"], "probe.lerning_rate: unknown key; did you mean probe.learning_rate?"),
        (["generation.top_p=0.95"], "generation.top_p: expected 1.0, got 0.95"),
        (["--learning-rate", "0"], "probe.learning_rate: input should be greater than 0, got 0"),
        (["--learning-rate", "x"], "Invalid value for '--learning-rate'"),
        (["--no-such-option"], "No such option"),
        (["nonsense"], "nonsense: expected an override key=value"),
        (["reward=nobody"], "reasoning_gym or package.module:function, got 'nobody'"),
        (
            ["reward=no_such_module:f"],
            "reward: expected code that you allow, no_such_module:f would be imported from nowhere",
        ),
        (["prompts.jsonl=/nowhere.jsonl"], "/nowhere.jsonl: expected a JSONL file of prompts"),
        (["update.num_prompts=51"], "num_prompts: expected at most the 50 prompts"),
        (["checkpoint=/nowhere"], "/nowhere: expected a checkpoint directory"),
        (["rollouts.update=/nowhere.parquet"], "/nowhere.parquet: expected a Parquet file of rollouts"),
        (["update.num_prompts=1"], "num_prompts: expected at least 2"),
        (["evaluation.total_sequences=1"], "greater than or equal to 2, got 1"),
        (["attribution=true", "attribution_folds=25"], "attribution_folds: expected at most the 24 clusters"),
    ],
)
def test_settings(config, refused, args, match):
    assert match in refused("run", config, *args)


def test_usage(refused, tmp_path):
    # click names one command or several, by its version
    assert re.search("did you mean.*'inspect'", refused("inspct").lower())
    assert refused() == "Missing command; see `entropy-probe --help`"
    assert refused("run").startswith("run: expected CONFIG.yaml, or --at RUN_DIR:STEP for a recorded step, got neither")
    assert refused("sweep") == "Missing argument 'CONFIG.yaml'; see `entropy-probe sweep --help`"
    assert "no such file" in refused("run", tmp_path / "none.yaml")
    assert "expected a saved result" in refused("report", tmp_path)


def test_output_directory_not_empty(config, refused, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    line = refused("run", config, "--output-dir", tmp_path / "full")
    assert line == (
        f"output_dir: expected a new or empty directory, {tmp_path / 'full'} holds files; choose another one or pass "
        "--overwrite"
    )
    (tmp_path / "full" / "config.yaml").write_text("somebody's own")
    assert "no result of an earlier run" in refused("run", config, "--output-dir", tmp_path / "full", "--overwrite")


def test_optimizer_file_missing(config, checkpoint, refused):
    (checkpoint / "optimizer.pt").unlink()
    assert "optimizer.pt" in refused("run", config, f"checkpoint={checkpoint}")


def test_optimizer_file_truncated(config, checkpoint, refused):
    data = (checkpoint / "optimizer.pt").read_bytes()
    (checkpoint / "optimizer.pt").write_bytes(data[: len(data) // 2])
    assert "optimizer.pt" in refused("run", config, f"checkpoint={checkpoint}")


def test_optimizer_state_of_another_model(config, checkpoint, refused):
    def transpose(saved):
        for entry in saved["state"].values():
            entry["exp_avg"], entry["exp_avg_sq"] = entry["exp_avg"].T.clone(), entry["exp_avg_sq"].T.clone()

    edit_optimizer(checkpoint, transpose)
    assert "optimizer.pt: expected one assignment" in refused("run", config, f"checkpoint={checkpoint}")


def test_learning_rate_0_in_the_checkpoint(config, checkpoint, refused):
    edit_optimizer(checkpoint, lambda saved: [group.update(lr=0.0) for group in saved["param_groups"]])
    line = refused("run", config, f"checkpoint={checkpoint}", "probe.learning_rate=null")
    assert "learning rate" in line
    assert "got 0" in line
    assert "set probe.learning_rate" in line


def test_attribution_of_another_optimizer_is_refused_before_sampling(config, checkpoint, refused, monkeypatch):
    def to_sgd(saved):
        kept = {"momentum": 0.9, "dampening": 0, "nesterov": False, "maximize": False, "foreach": None,
                "differentiable": False, "fused": None}  # fmt: skip
        names = ("params", "lr", "initial_lr", "weight_decay")
        groups = [{name: group[name] for name in names if name in group} | kept for group in saved["param_groups"]]
        state = {key: {"momentum_buffer": entry["exp_avg"]} for key, entry in saved["state"].items()}
        saved |= {"param_groups": groups, "state": state}

    edit_optimizer(checkpoint, to_sgd)
    monkeypatch.setattr(HFGenerator, "generate", lambda *_: pytest.fail("sampled"))
    for command in ("run", "validate"):
        line = refused(command, config, f"checkpoint={checkpoint}", "attribution=true")
        assert line.startswith("attribution: expected torch.optim.AdamW or Adam, whose step divides")
        assert "got torch.optim.SGD" in line


def test_prompt_longer_than_the_context(config, refused, tmp_path):
    prompts = tmp_path / "long.jsonl"
    rows = [{"prompt": "1" * 250, "answer": "1"}, {"prompt": "1" * 251, "answer": "1"}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    line = refused("run", config, f"prompts.jsonl={prompts}", "update.num_prompts=2")
    assert "256" in line


def test_no_tokenizer_anywhere(config, checkpoint, trained, refused, tmp_path):
    base = shutil.copytree(trained.directory / "base", tmp_path / "base")
    for directory in (checkpoint, base):
        for file in directory.glob("tokenizer*"):
            file.unlink()
    line = refused("run", config, f"checkpoint={checkpoint}", f"base_model={base}")
    assert "expected a tokenizer to sample with" in line


def test_tokenizer_without_an_end_token(config, checkpoint, refused):
    edit_json(checkpoint / "tokenizer_config.json", eos_token=None)
    assert "eos" in refused("run", config, f"checkpoint={checkpoint}")


@pytest.mark.parametrize(
    ("column", "change", "match"),
    [
        (
            "response_mask",
            lambda rows: [[False] * len(row) for row in rows],
            "a response_mask that is false everywhere",
        ),
        ("advantage", lambda rows: [np.nan, *rows[1:]], "advantages are not finite in 1 of 8 sequences"),
        ("advantage", lambda rows: [*rows[1:], np.inf], "advantages are not finite"),
    ],
)
def test_saved_rollouts(config, refused, rollout_file, column, change, match):
    path = rollout_file(column, change)
    line = refused("run", config, f"rollouts.update={path}")
    assert str(path) in line
    assert match in line


def test_a_given_batch_that_cannot_be_probed_leaves_no_copy(config, refused, rollout_file, tmp_path):
    """Token ids beyond the vocabulary are seen after the model is loaded; the other batch is sampled, and is kept."""
    path = rollout_file("response_token_ids", lambda rows: [[90_000] * len(row) for row in rows])
    line = refused("run", config, f"rollouts.update={path}")
    assert "expected token ids below" in line
    assert [file.name for file in (tmp_path / "out").glob("*.parquet")] == ["evaluation.parquet"]
    assert "rollouts.update=" not in line
    shutil.rmtree(tmp_path / "out")
    line = refused("run", config, f"rollouts.update={path}", f"rollouts.evaluation={path}")
    assert "are kept" not in line


def test_saved_update_without_advantages(config, refused, rollout_file):
    path = rollout_file()
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["advantage"]), path)
    assert "advantages" in refused("run", config, f"rollouts.update={path}")


def test_saved_rollouts_that_are_not_parquet(config, refused, tmp_path):
    (tmp_path / "bad.parquet").write_text("not parquet")
    assert "bad.parquet: expected a Parquet file" in refused("run", config, f"rollouts.update={tmp_path}/bad.parquet")


def test_one_line_in_a_process_of_its_own(config, checkpoint):
    (checkpoint / "optimizer.pt").unlink()
    done = execute("run", config, f"checkpoint={checkpoint}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")


def test_inspect_exit_codes(trained, checkpoint, refused, tmp_path):
    healthy = invoke("inspect", trained.checkpoint)
    assert healthy.exit_code == 0, healthy.output
    assert "Verdict: healthy" in healthy.stdout
    edit_optimizer(checkpoint, lambda saved: [group.update(lr=0.0) for group in saved["param_groups"]])
    suspicious = invoke("inspect", checkpoint)
    assert suspicious.exit_code == 1
    assert "learning rate is 0" in suspicious.stdout
    (checkpoint / "optimizer.pt").unlink()
    unusable = invoke("inspect", checkpoint, "--json")
    assert unusable.exit_code == 2
    report = json.loads(unusable.stdout)
    assert report["verdict"] == "unusable"
    assert "optimizer.pt" in report["notes"][0]["text"]
    assert "expected a checkpoint directory" in refused("inspect", tmp_path / "none")
