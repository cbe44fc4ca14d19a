"""Dumps of trainers on the command line: shown, held against a checkpoint, converted, and read by a run's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from entropy_probe.cli.config import RunConfig, load_config
from entropy_probe.cli.dumps import given_batch
from entropy_probe.cli.from_checkpoint import with_trainer_settings
from entropy_probe.rollouts.batch import Rollouts
from tests.cli.conftest import invoke
from tests.dumps import written

AFTER = 2
"""The step of the checkpoint that the tests have."""


@pytest.fixture
def of_next_step(monkeypatch) -> None:
    monkeypatch.setattr(written, "STEP", AFTER + 1)


def config(trained: Any, tmp_path: Path, **settings: Any) -> RunConfig:
    batches = {
        "checkpoint": trained.checkpoint, "output_dir": tmp_path / "out", "device": "cpu",
        "prompts": {"jsonl": trained.prompts}, "evaluation": {"total_sequences": 8},
    }  # fmt: skip
    return with_trainer_settings(RunConfig.model_validate(batches | settings))[0]


def test_what_a_dump_holds_is_shown_without_a_checkpoint(tmp_path):
    shown = invoke("rollouts", written.open_instruct(tmp_path), "--json")
    assert shown.exit_code == 0, shown.output
    holds = json.loads(shown.stdout)["holds"]
    assert holds["layout"] == "open-instruct"
    assert holds["step"] == f"{written.STEP}, sampled by checkpoint {written.STEP - 1}"
    assert holds["sequences"] == "4, 2 to each of 2 prompts"
    text = invoke("rollouts", written.verl(tmp_path))
    assert text.exit_code == 0
    assert "none: texts, for which --checkpoint or --base-model has the tokenizer" in " ".join(text.stdout.split())


def test_a_dump_is_checked_against_its_checkpoint_and_converted(trained, tmp_path, of_next_step):
    dump, output = written.trl(tmp_path), tmp_path / "update.parquet"
    shown = invoke("rollouts", dump, "--checkpoint", trained.checkpoint, "-o", output, "--json")
    holds = json.loads(shown.stdout)
    assert {"surprisal", "log p < -12", "advantages", "written"} <= holds["holds"].keys()
    assert "end_tokens_restored" in [note["code"] for note in holds["notes"]]
    assert Rollouts.from_parquet(output).retokenised
    again = invoke("rollouts", dump, "-o", output)
    assert again.exit_code == 2
    assert "expected a file that is not there yet" in again.stderr


def test_a_dump_of_another_step_is_suspicious(trained, tmp_path):
    shown = invoke("rollouts", written.open_instruct(tmp_path), "--checkpoint", trained.checkpoint)
    assert shown.exit_code == 1
    assert "Verdict: suspicious" in shown.stdout
    assert "after 2 steps is that of step 3" in " ".join(shown.stdout.split())


@pytest.mark.usefixtures("of_next_step")
def test_a_config_reads_a_dump_directly(trained, tmp_path):
    path = tmp_path / "run.yaml"
    settings = {"checkpoint": str(trained.checkpoint), "output_dir": "out", "prompts": {"jsonl": str(trained.prompts)}}
    settings |= {"update": {"path": str(written.trl(tmp_path))}, "evaluation": {"total_sequences": 8}}
    path.write_text(yaml.safe_dump(settings))
    loaded = load_config(path)
    assert loaded == RunConfig.model_validate(settings)
    assert (loaded.update, str(loaded.rollouts.update)) == (None, settings["update"]["path"])
    given = given_batch(with_trainer_settings(loaded)[0], "update")
    assert given is not None
    assert given.rollouts.retokenised
    assert [note.code for note in given.notes] == ["other_size", "end_tokens_restored"]
    for more, match in (({"num_prompts": 2}, "update: expected path alone, got num_prompts"), ({"pat": 1}, "update")):
        path.write_text(yaml.safe_dump(settings | {"update": settings["update"] | more}))
        with pytest.raises(ValueError, match=match):
            load_config(path)


@pytest.mark.usefixtures("of_next_step")
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mode": "one_batch"}, "expected the tokens that the policy sampled in the batch of mode one_batch"),
        ({"mode": "both"}, "expected the tokens that the policy sampled in the batch of mode both"),
    ],
)
def test_texts_play_no_evaluation_batch(trained, tmp_path, settings, match):
    dump = written.trl(tmp_path)
    with pytest.raises(ValueError, match=match):
        given_batch(config(trained, tmp_path, update={"path": dump}, **settings), "update")
    both = config(trained, tmp_path, update={"path": dump}, evaluation={"path": dump})
    with pytest.raises(ValueError, match="expected the tokens that the policy sampled in the evaluation batch"):
        given_batch(both, "evaluation")


def test_a_dump_of_another_step_is_refused_unless_insisted_on(trained, tmp_path):
    dump = written.trl(tmp_path)
    with pytest.raises(ValueError, match="the dump is of step 7; the next batch of a checkpoint after 2 steps is that"):
        given_batch(config(trained, tmp_path, update={"path": dump}), "update")
    given = given_batch(config(trained, tmp_path, update={"path": dump}, trust_config=True), "update")
    assert given is not None
    assert given.notes[0].code == "other_step"
