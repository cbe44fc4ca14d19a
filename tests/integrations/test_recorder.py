"""Records of a live run: whole or absent, whenever their writer is killed."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from entropy_probe.integrations import recorder
from entropy_probe.integrations.recorder import Recorder, drop_records_after, write_record
from entropy_probe.results.estimate import Estimate
from entropy_probe.results.live import GRADIENT_FILE, ROLLOUTS_FILE, PromptShare, StepRecord, read_records
from entropy_probe.rollouts.batch import Rollouts
from tests.processes import Process

PREDICTED = Estimate(value=-0.001, standard_error=0.0002, num_clusters=16, unit="nats/token")
RECORD = StepRecord(
    step=123,
    log={"reward": 0.5},
    predicted=PREDICTED,
    prompts=(PromptShare(id=3, value=-0.0004, standard_error=0.0001, text="4+7="),),
)


def batch(fill: float = -1.0) -> Rollouts:
    mask = torch.tensor([[False, True, True], [False, True, False]])
    return Rollouts(
        input_ids=torch.tensor([[5, 6, 7], [5, 6, 0]]),
        attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]),
        response_mask=mask,
        prompt_ids=torch.tensor([0, 0]),
        advantages=torch.tensor([1.0, -1.0]),
        old_logprobs=torch.full((2, 3), fill),
        microbatch_ids=torch.tensor([0, 1]),
    )


def test_a_step_is_read_as_it_was_written(tmp_path):
    place = write_record(tmp_path, RECORD, batch(), {"w": torch.arange(3.0)}, keep_gradients=1)
    assert place == tmp_path / "entropy_probe" / "step-000123"
    assert read_records(tmp_path) == (RECORD,)
    saved = Rollouts.from_parquet(place / ROLLOUTS_FILE)
    assert saved.old_logprobs is not None
    assert saved.microbatch_ids is not None
    torch.testing.assert_close(saved.old_logprobs[saved.response_mask], torch.full((3,), -1.0))
    assert saved.microbatch_ids.tolist() == [0, 1]


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 9])
def test_of_the_gradients_the_last_are_kept(tmp_path, keep):
    for step in (1, 2, 3, 4):
        write_record(tmp_path, StepRecord(step=step), None, {"w": torch.ones(2)}, keep_gradients=keep)
        kept = sorted(file.parent.name for file in tmp_path.rglob(GRADIENT_FILE))
        assert kept == [f"step-{k:06d}" for k in range(max(1, step - keep + 1), step + 1)]
    write_record(tmp_path, StepRecord(step=5), None, {"w": torch.ones(2)}, keep_gradients=0)
    assert not list(tmp_path.rglob(GRADIENT_FILE))
    assert [record.step for record in read_records(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_run_that_starts_again_forgets_what_it_will_do_again(tmp_path):
    for step in (1, 2, 3):
        write_record(tmp_path, StepRecord(step=step))
    drop_records_after(tmp_path, 1)
    write_record(tmp_path, StepRecord(step=1, log={"reward": 1.0}))
    assert [(record.step, record.log) for record in read_records(tmp_path)] == [(1, {"reward": 1.0})]
    assert [entry.name for entry in (tmp_path / "entropy_probe").iterdir()] == ["step-000001"]


CALLS = ("mkdir", "write_text", "replace", "rename", "fsync", "rmtree")


def write_and_die(directory: Path, at: int) -> None:
    """Overwrite the record of step 123, and end by SIGKILL at the call number ``at`` into the file system."""
    left = [at]

    def counted(call):
        def counting(*arguments, **options):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*arguments, **options)

        return counting

    for owner in (Path, os, shutil):
        for name in CALLS:
            if hasattr(owner, name):
                setattr(owner, name, counted(getattr(owner, name)))
    write_record(directory, RECORD.model_copy(update={"seconds": 2.0}), batch(-2.0))


@pytest.mark.parametrize("apart", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_point_leaves_a_step_whole_or_absent(tmp_path, apart):
    """At every call into the file system, or at some of them."""
    outcomes, exits, at = set(), [], 0
    while not exits or exits[-1] != 0:
        directory = tmp_path / str(at)
        write_record(directory, RECORD, batch(-1.0))
        process = Process(write_and_die, directory, at)
        process.communicate()
        exits.append(process.returncode)
        for record in read_records(directory):
            rollouts = Rollouts.from_parquet(directory / "entropy_probe" / "step-000123" / ROLLOUTS_FILE)
            assert rollouts.old_logprobs is not None
            outcomes.add((record.seconds, rollouts.old_logprobs.min().item()))
        # the next step finds nothing in its way, and clears up
        write_record(directory, StepRecord(step=124))
        assert not list((directory / "entropy_probe").glob(".*"))
        at += apart
    assert set(exits[:-1]) == {-signal.SIGKILL}
    assert len(exits) > 8 / apart + 1
    assert outcomes == {(None, -1.0), (2.0, -2.0)}


def test_a_damaged_record_is_named_in_one_line(tmp_path):
    place = write_record(tmp_path, RECORD)
    (tmp_path / "entropy_probe" / ".step-000124.77.tmp").mkdir()  # of a killed process
    assert len(read_records(tmp_path)) == 1
    text = (place / "record.json").read_text()
    (place / "record.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"record\.json: not the record of a step, .* delete .*step-000123 to leave"):
        read_records(tmp_path)
    (place / "record.json").write_text(text.replace('"step": 123', '"step": 12'))
    with pytest.raises(ValueError, match="expected the record of step 123, got that of step 12; delete"):
        read_records(tmp_path)
    (place / "record.json").unlink()
    with pytest.raises(ValueError, match="expected the record of a step, got no such file; delete"):
        read_records(tmp_path)


def test_training_goes_on_while_a_step_is_written(tmp_path):
    kept, gradient = Recorder(tmp_path, keep_gradients=1), {"w": torch.ones(2)}
    kept.write(RECORD, batch(), gradient)
    gradient["w"].fill_(7.0)  # the next step's
    kept.close()
    from safetensors.torch import load_file

    assert load_file(tmp_path / "entropy_probe" / "step-000123" / GRADIENT_FILE)["w"].tolist() == [1.0, 1.0]


def test_a_full_disk_is_said_at_the_next_step(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recorder, "sync", full)
    kept = Recorder(tmp_path)
    kept.write(RECORD)
    with pytest.raises(OSError, match="No space left"):
        kept.write(RECORD)
    kept.close()
