"""A run that was trained with the callback: its timeline, and single steps of it probed again."""

import json
import re
import shutil
from pathlib import Path

import pytest

from entropy_probe.integrations.recorder import write_record
from entropy_probe.integrations.trl import EntropyProbeCallback
from entropy_probe.results.estimate import Estimate
from entropy_probe.results.live import Timeline, read_records
from entropy_probe.results.probe import ProbeResult
from entropy_probe.rollouts.batch import Rollouts
from tests.cli.conftest import invoke
from tests.tiny import train_grpo

STEPS = 4
BATCHES = {"update": 3, "evaluation": 2}


@pytest.fixture
def run(made_once, tmp_path) -> Path:
    """A copy of a run of four steps, all recorded, with checkpoints after the second and the last."""

    def train(directory: Path) -> None:
        probes = EntropyProbeCallback(every=1, record="all", keep_gradients=3)
        arguments = {"lr_scheduler_type": "linear", "per_device_train_batch_size": 16, "callbacks": [probes]}
        train_grpo(directory, lora=True, steps=STEPS, save_steps=2, **arguments)

    return Path(shutil.copytree(made_once("recorded run", train), tmp_path / "grpo"))


def test_a_recorded_step_is_the_step_that_training_took(run, tmp_path):
    """From the checkpoint right before it, and from one before that, with the step in between taken again."""
    for step in (3, 4):
        done = invoke("run", "--at", f"{run}:{step}", "--output-dir", tmp_path / f"at-{step}")
        assert done.exit_code == 0, done.output
        result, record = ProbeResult.load(tmp_path / f"at-{step}"), read_records(run)[step - 1]
        assert result.predicted is not None
        assert record.predicted is not None
        assert record.entropy is not None
        assert record.learning_rate is not None
        assert result.predicted.value == pytest.approx(record.predicted.value, rel=1e-3)
        assert result.entropy.value == pytest.approx(record.entropy.value, rel=1e-5)
        assert result.optimizer_state.learning_rates[0] == pytest.approx(record.learning_rate, rel=1e-9)
        codes = [note.code for note in result.diagnostics.notes]
        assert "recorded_step" in codes
        assert ("steps_replayed" in codes) == (step == 4)
        assert "recorded_gradient_norm" not in codes


def test_a_replay_that_leaves_the_trainers_path_is_refused(run, tmp_path):
    record, place = read_records(run)[2], run / "entropy_probe" / "step-000003"
    rollouts = Rollouts.from_parquet(place / "rollouts.parquet")
    norm = record.gradient_norm
    assert norm is not None
    write_record(run, record.model_copy(update={"gradient_norm": 1.2 * norm}), rollouts)
    refused = invoke("run", "--at", f"{run}:4", "--output-dir", tmp_path / "out")
    assert refused.exit_code == 2
    assert "expected the gradient of step 3 as in training" in refused.output
    assert "probe step 3" in refused.output
    assert not (tmp_path / "out" / "results.json").exists()
    near = invoke("run", "--at", f"{run}:3", "--output-dir", tmp_path / "out")
    assert near.exit_code == 0
    assert "this is not quite the step taken" in " ".join(near.output.split())


def test_steps_without_a_way_to_them_are_refused_in_one_line(run, tmp_path):
    out = ("--output-dir", tmp_path / "out")
    for at, said in (
        (f"{run}:1", "expected a checkpoint of .* before step 1, got none; step 3 can be probed"),
        (f"{run}:9", "recorded with its batch, got 9; step 3 can be probed"),
        (f"{run}", "expected RUN_DIR:STEP, such as runs/grpo:123"),
        (f"{run}/no:3", "check the path"),
    ):
        refused = invoke("run", "--at", at, *out)
        assert refused.exit_code == 2
        assert len(refused.output.strip().splitlines()) == 1
        assert re.search(said, refused.output)
    (run / "entropy_probe" / "step-000003" / "rollouts.parquet").unlink()
    refused = invoke("run", "--at", f"{run}:4", *out)
    assert "got none of step 3, so this would be another step" in refused.output
    assert invoke("run").output.startswith("error: run: expected CONFIG.yaml, or --at RUN_DIR:STEP")


def test_the_timeline_of_a_run_while_it_trains_and_afterwards(run):
    shutil.rmtree(run / "checkpoint-4")  # not there yet
    (run / "entropy_probe" / ".step-000005.1.tmp").mkdir()
    shown = invoke("timeline", run)
    assert shown.exit_code == 0, shown.output
    assert "Entropy over training, 4 steps, 4 probed" in shown.output
    assert "the predictions add up to" in " ".join(shown.output.split())
    assert (run / "entropy_probe" / "timeline.html").is_file()
    (one,) = [Timeline.model_validate(one) for one in json.loads(invoke("timeline", run, "--json").output)]
    assert [record.step for record in one.steps] == [1, 2, 3, 4]
    assert [record.logged("reward") is not None for record in one.steps] == [True] * 4


def test_the_timeline_of_checkpoints_alone(run, tmp_path):
    """From the trainer's log, and from a probe of one checkpoint beside it; what is probed is not in the log yet."""
    shutil.rmtree(run / "entropy_probe")
    shown = invoke("timeline", run, "--output-dir", tmp_path / "page")
    assert "Entropy over training, 4 steps, 0 probed" in shown.output
    assert (tmp_path / "page" / "timeline.html").is_file()


def test_a_probe_of_a_checkpoint_has_its_place_in_the_timeline(run, tmp_path):
    assert invoke("run", "--at", f"{run}:3", "--output-dir", tmp_path / "probes" / "a").exit_code == 0
    shutil.rmtree(run / "entropy_probe")
    (one,) = json.loads(invoke("timeline", tmp_path / "probes", "--json").output)
    timeline = Timeline.model_validate(one)
    assert [record.step for record in timeline.probed] == [3]
    assert [record.step for record in timeline.steps] == [1, 2, 3, 4]
    assert timeline.steps[2].logged("reward") is not None


def test_runs_beside_each_other(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    record = read_records(other)[3]
    worse = Estimate(value=-0.9, standard_error=0.01, num_clusters=16, unit="nats/token")
    write_record(other, record.model_copy(update={"realized": worse, "predicted": worse, "step": 5}))
    shown = invoke("timeline", run, other)
    assert "Entropy over training, 2 runs" in shown.output
    assert "collapse ahead (5)" in " ".join(shown.output.split())


def test_what_is_no_run_is_refused(tmp_path):
    assert "expected records of steps (entropy_probe/), checkpoints" in invoke("timeline", tmp_path).output
    assert "expected the directory of a run, found none" in invoke("timeline", tmp_path / "no").output
    damaged = tmp_path / "entropy_probe" / "step-000001"
    damaged.mkdir(parents=True)
    (damaged / "record.json").write_text("{")
    refused = invoke("timeline", tmp_path)
    assert refused.exit_code == 2
    assert "not the record of a step" in refused.output


def test_momentum_is_divided_over_the_steps_whose_gradients_were_recorded(run, tmp_path):
    """Of four steps, the gradients of three; what is older is the first step's."""
    files = {batch: f"{run}/entropy_probe/step-{k:06d}/rollouts.parquet" for batch, k in BATCHES.items()}
    settings = {"checkpoint": f"{run}/checkpoint-4", "rollouts": files, "origins": True}
    settings["probe"] = {"horizon": None, "learning_rate": 1e-4}
    (tmp_path / "probe.yaml").write_text(json.dumps(settings))
    done = invoke("run", tmp_path / "probe.yaml", "--output-dir", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert re.search(r"momentum from +adds +share of it\n *the last step +-?\d", done.output)
    result = ProbeResult.load(tmp_path / "out")
    origins, momentum = result.origins, result.components["momentum"]
    assert origins is not None
    assert len(origins.steps) == 3
    parts = [part.value for part in (*origins.steps, origins.older)]
    assert sum(parts) == pytest.approx(momentum.value, rel=1e-6)
    assert all(abs(part) > 1e-6 * abs(momentum.value) for part in parts)
    records, said = run / "entropy_probe", "they do not make the first moment of"
    shutil.copy(records / "step-000002/gradient.safetensors", records / "step-000001")  # so that none seems to lack
    for wrong in (said, "origins: expected the recorded gradient of step 4 beside"):
        refused = invoke("run", tmp_path / "probe.yaml", "--output-dir", tmp_path / "wrong")
        assert refused.exit_code == 2
        assert wrong in refused.output.splitlines()[-1]
        (records / "step-000004/gradient.safetensors").unlink(missing_ok=True)
