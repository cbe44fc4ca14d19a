"""What a directory tells of the run that wrote it reaches who loads it, and who looks at it."""

from __future__ import annotations

import json

import pytest

from entropy_probe import ProbeConfig
from entropy_probe.checkpoints import errors, inspect_checkpoint, load_checkpoint
from entropy_probe.checkpoints.record import record_checkpoint
from entropy_probe.checkpoints.training_run import TrainingRun
from entropy_probe.report import checkpoint_section
from tests.checkpoints.conftest import edit_json
from tests.checkpoints.settings_files import GRPO, pickled_settings, saved_settings
from tests.report.results import shown

REUSING = GRPO | {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2}


def test_a_loaded_checkpoint_has_its_loss_and_settings(runs):
    state = runs("lora").load(3)
    assert state.loss is not None
    assert ProbeConfig(loss=state.loss).loss.loss_type == "dapo"
    assert state.settings["max_grad_norm"] == 1.0
    assert state.report.trainer == "trl.trainer.grpo_config.GRPOConfig"
    assert {setting.source for setting in state.report.settings} == {"training_args.bin"}
    assert len(state.report.logged["grad_norm"]) == 3
    assert state.report == inspect_checkpoint(runs("lora").checkpoint(3))


def test_without_files_nothing_is_told(copy_of):
    path = copy_of("lora")
    (path / "training_args.bin").unlink()
    edit_json(path / "trainer_state.json", log_history=[])
    state = load_checkpoint(path)
    assert (state.loss, dict(state.settings), state.report.settings, state.report.logged) == (None, {}, (), {})


def test_a_trainer_of_another_loss_is_refused_unless_any_will_do(copy_of):
    path = saved_settings(copy_of("lora"), pickled_settings("trl.trainer.dpo_config DPOConfig", beta=0.1))
    refused = r"got one of trl\.trainer\.dpo_config\.DPOConfig \(training_args\.bin\), whose step is that of another"
    with pytest.raises(errors.UnsupportedError, match=refused):
        load_checkpoint(path)
    report = inspect_checkpoint(path)
    assert report.verdict == "unusable"
    assert report.trainer == "trl.trainer.dpo_config.DPOConfig"
    assert report.optimizer_state is not None  # everything else was looked at
    assert load_checkpoint(path, any_trainer=True).loss is None
    record_checkpoint(path, written_by="a test")
    with pytest.raises(errors.UnsupportedError, match=refused):
        load_checkpoint(path)


def test_a_recorded_settings_file_is_verified(copy_of):
    path = copy_of("lora")
    record_checkpoint(path, written_by="a test")
    saved_settings(path, pickled_settings(**GRPO))
    with pytest.raises(errors.DamagedFileError, match=r"training_args\.bin: expected the recorded"):
        load_checkpoint(path)


def test_a_settings_file_that_was_added_is_refused(copy_of):
    path = copy_of("lora")
    (path / "training_args.bin").unlink()
    record_checkpoint(path, written_by="a test")
    saved_settings(path, pickled_settings(**GRPO))
    with pytest.raises(errors.MismatchError, match=r"training_args\.bin: expected a file that"):
        load_checkpoint(path)


def test_a_settings_file_that_leads_outside_is_not_opened(copy_of, tmp_path):
    path = copy_of("lora")
    (path / "training_args.bin").rename(tmp_path / "elsewhere")
    (path / "training_args.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.UnsafeFileError, match="got a link to"):
        TrainingRun.read(path)


@pytest.mark.parametrize(
    ("step", "settings", "place"),
    [
        (0, REUSING, (1, 4)),
        (3, REUSING, (4, 4)),
        (4, REUSING, (1, 4)),
        (7, GRPO, (1, 1)),
        (7, GRPO | {"steps_per_generation": 1, "gradient_accumulation_steps": 4}, (1, 1)),
        (7, GRPO | {"steps_per_generation": 3, "gradient_accumulation_steps": 2}, None),
        (None, REUSING, None),
    ],
)
def test_which_step_on_the_same_rollouts_comes_next(copy_of, step, settings, place):
    path = saved_settings(copy_of("lora"), pickled_settings(**settings))
    if step is None:
        (path / "trainer_state.json").unlink()
    else:
        edit_json(path / "trainer_state.json", global_step=step)
    run = TrainingRun.read(path)
    assert run.place == place
    said = [note.code for note in run.notes()]
    assert said == (["reused_rollouts"] if place and place[0] > 1 else [])


def test_notes_of_the_run_leave_the_verdict_alone(copy_of):
    path = copy_of("lora")
    clean = inspect_checkpoint(path)
    saved_settings(path, pickled_settings("my_project.train GRPOConfig", **REUSING, top_p=0.9))
    edited = inspect_checkpoint(path)
    assert edited.verdict == clean.verdict
    known = {note.code for note in clean.notes}
    more = [note for note in edited.notes if note.code not in known]
    assert [note.code for note in more] == ["derived_trainer", "reused_rollouts", "other_samples"]
    assert "top_p 0.9" in more[-1].text


def test_a_log_alone_tells_of_reused_rollouts(copy_of):
    path = copy_of("lora")
    (path / "training_args.bin").unlink()
    log = [{"reward": 1.0, "clip_ratio/low_mean": 0.0, "loss": 0.1}, {"clip_ratio/low_mean": 0.0, "loss": 0.1}]
    edit_json(path / "trainer_state.json", log_history=log)
    assert [note.code for note in TrainingRun.read(path).notes()] == ["reused_rollouts_by_log"]


def test_a_loop_of_its_own_says_that_its_loss_is_not_told(copy_of):
    path = saved_settings(copy_of("lora"), pickled_settings("transformers.training_args TrainingArguments"))
    assert [note.code for note in TrainingRun.read(path).notes()] == ["loss_not_told"]


def test_inspect_shows_each_setting_with_its_source(copy_of):
    path = copy_of("lora")
    text = shown([checkpoint_section(inspect_checkpoint(path))], width=120)
    assert "trainer" in text
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("max_grad_norm"))
    assert row == ["max_grad_norm", "1", "training_args.bin"]
    assert "vespo_k_pos" not in text
    assert "vllm_importance" not in text
    (path / "training_args.bin").unlink()
    history = json.loads((path / "trainer_state.json").read_text())["log_history"]
    edit_json(path / "trainer_state.json", log_history=[record | {"kl": 0.01} for record in history])
    text = shown([checkpoint_section(inspect_checkpoint(path))], width=120)
    assert "beta    above 0 trainer_state.json (kl)" in text
