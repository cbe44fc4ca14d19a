"""What a command may do in a directory, and that it may be killed at any moment: with a command of a few bytes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from importlib import import_module
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from entropy_probe.cli.config import RunConfig
from entropy_probe.cli.output import locked, unfinished
from entropy_probe.cli.output.directory import OWN_FILES, resume
from entropy_probe.cli.output.inputs import Inputs
from entropy_probe.cli.sweep import SweepIndex, load_sweeps, sweep_checkpoints
from entropy_probe.cli.sweep_config import SweepConfig
from entropy_probe.parallel.ranks import ALONE, Ranks
from entropy_probe.results.note import Note
from entropy_probe.results.record import write_atomically
from entropy_probe.results.validation import VALIDATION_FILE
from tests.invariants.hf_problems import rollouts
from tests.processes import Process
from tests.report.results import make_result

INPUTS = Inputs(
    command="validate", config={"update": {"seed": 0}}, checkpoint="c", base_model=None, given={}, prompts="p",
    reward="r", versions={"entropy-probe": "1"},
)  # fmt: skip
NOTE = Note(code="code", text="a note", remedy="a remedy")
ORDER = ("report.html", "validation.json", "results.json")
FILES = {
    *("config.yaml", "evaluation.parquet", "figures/parts.png", "inputs.json", "report.html", "results.json"),
    *("tokens.parquet", "update.parquet", "validation.json"),
}


def open_directory(directory: Path, inputs: Inputs = INPUTS, **settings):
    config = {"checkpoint": "c", "output_dir": directory, "rollouts": {"update": "u", "evaluation": "e"}}
    return resume(RunConfig.model_validate(config | settings), inputs)


def command(directory: Path, inputs: Inputs = INPUTS, **settings) -> list[str]:
    """As the commands do it, with the inputs for contents; what it sampled. Fails before it writes a file."""
    with locked(directory):
        return in_locked(directory, inputs, **settings)


def in_locked(
    directory: Path, inputs: Inputs = INPUTS, fail: str = "", last: str = VALIDATION_FILE, **settings
) -> list[str]:
    """:func:`command` in a directory that is locked."""
    sampled = []

    def write(name: str, content: str) -> None:
        if name == fail:
            raise RuntimeError("the power is out")
        (directory / name).parent.mkdir(exist_ok=True)
        write_atomically(directory / name, content.encode())

    text = inputs.model_dump_json()
    output = open_directory(directory, inputs, **settings)
    if not output.finished:
        with output.writing(ALONE):
            for batch in ("update", "evaluation"):
                if batch in output.inputs.rollouts or batch in settings.get("rollouts", ()):
                    continue
                for shard in range(2 if batch == "evaluation" else 0):
                    write(f"evaluation/shard-{shard:05d}.parquet", text)
                write(f"{batch}.parquet", batch + text)
                sampled.append(batch)
                output = output.record(batch, [NOTE])
            write("tokens.parquet", text)
            write("results.json", make_result().model_dump_json())
            write("halves/001.json", text)
            write(last, text)
    output.finish(lambda: (write("figures/parts.png", "drawn"), write("report.html", text)))
    return sampled


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def other(inputs: Inputs = INPUTS, **changes) -> Inputs:
    return inputs.model_copy(update=changes)


def test_what_a_command_leaves(tmp_path):
    out = tmp_path / "a" / "b"
    assert command(out) == ["update", "evaluation"]
    assert contents(out).keys() == FILES
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert command(out) == []
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("fail", ["update.parquet", "evaluation/shard-00000.parquet"])
def test_an_error_before_anything_is_sampled_leaves_nothing(tmp_path, fail):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(RuntimeError) as caught:
            command(tmp_path / name, fail=fail)
        if fail == "update.parquet":
            assert not hasattr(caught.value, "__notes__")
            assert (tmp_path / name).exists() == (name == "empty")
            assert contents(tmp_path / name) == {}
        else:
            assert contents(tmp_path / name).keys() == {"config.yaml", "inputs.json", "update.parquet"}


def test_an_error_keeps_what_took_long_and_says_so(tmp_path):
    out = tmp_path / "out"
    settings = f"rollouts.update={out}/update.parquet rollouts.evaluation={out}/evaluation.parquet"
    kept = f"the rollouts are kept, the same command goes on with them, another one with {settings} --overwrite"
    for fail, said in (
        ("evaluation.parquet", kept.replace(f" rollouts.evaluation={out}/evaluation.parquet", "")),
        ("tokens.parquet", kept),
        ("validation.json", f"the run itself is complete in {out}, the same command goes on with its validation"),
    ):
        with pytest.raises(RuntimeError) as caught:
            command(out, fail=fail)
        assert caught.value.__notes__ == [said]
        assert (unfinished(out) is None) == (fail == "validation.json")
    assert command(out) == []
    assert contents(out).keys() == FILES


def given_killed_everywhere(directory: Path, before: Path) -> None:
    """The same where the user's own rollouts lie in the directory that is overwritten."""
    os.fsync = lambda descriptor: None  # of this process, which ends here; it would take most of the time
    out = directory / "killed"
    mine = {name: out / f"{name}.parquet" for name in ("update", "evaluation")}
    given = {"rollouts": mine, "overwrite": True}
    for moment in count():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)
        rollouts = [path.read_bytes() for path in mine.values()]
        child = os.fork()
        if child == 0:
            kill_at(moment, str(out))
            command(out, **given)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert [path.read_bytes() for path in mine.values()] == rollouts, moment
        if os.WIFEXITED(status):
            assert moment > 20
            return
        assert command(out, **given) == [], moment
        assert contents(out).keys() == FILES, moment
        assert [path.read_bytes() for path in mine.values()] == rollouts, moment


def killed_everywhere(directory: Path, before: Path) -> None:
    """Kill the command at every change of the directory in turn, each time in a copy of what was before; it goes on."""
    os.fsync = lambda descriptor: None  # of this process, which ends here; it would take most of the time
    whole, out = directory / "whole", directory / "killed"
    command(whole)
    expected = contents(whole) | {"config.yaml": b""}
    for moment in count():
        shutil.rmtree(out, ignore_errors=True)
        if before.exists():
            shutil.copytree(before, out)
        child = os.fork()
        if child == 0:
            kill_at(moment, str(out))
            command(out, overwrite=before.exists())
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert moment > 40
            return
        now = contents(out)
        for last, earlier in pairwise(ORDER):
            assert last not in now or earlier in now, (moment, now.keys())
        assert "results.json" not in now or now.keys() >= FILES - {*ORDER, "figures/parts.png"}, (moment, now.keys())
        inputs = Inputs.model_validate_json(now["inputs.json"]) if "inputs.json" in now else INPUTS
        old = inputs.checkpoint != INPUTS.checkpoint
        sampled = command(out, overwrite=old)
        assert set(sampled) == {"update", "evaluation"} - (set() if old else inputs.rollouts.keys()), moment
        assert contents(out) | {"config.yaml": b""} == expected, moment


def several(directory: Path, names: str, version: str, *, overwrite: bool) -> None:
    """As ``sweep`` does it for several checkpoints, each of which is a command of a few bytes."""
    settings = {"checkpoints": [f"/{name}" for name in names], "learning_rates": [1e-5, 1e-4]}
    config = {"checkpoint": "/a", "output_dir": directory, "prompts": {"jsonl": "p"}, "reward": "exact_match",
              "update": {"num_prompts": 4, "group_size": 2}, "evaluation": {"total_sequences": 8},
              "probe": {"max_completion_length": 8}}  # fmt: skip
    config = SweepConfig.model_validate({**config, "sweep": settings, "overwrite": overwrite})
    inputs = other(command="sweep", versions={"entropy-probe": version})

    def one(config: SweepConfig, ranks: Ranks) -> None:
        in_locked(config.output_dir, inputs, last="sweep.json", overwrite=config.overwrite)

    def report(directory: Path, sweeps: object) -> SimpleNamespace:
        return SimpleNamespace(write=lambda: write_atomically(directory / "report.html", version.encode()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("entropy_probe.cli.sweep"), "sweep_checkpoint", one)
        patch.setattr(import_module("entropy_probe.cli.report"), "sweep_report", report)
        sweep_checkpoints(config, ALONE)


def several_killed_everywhere(directory: Path, before: Path, stride: int) -> None:
    """Overwrite the sweeps of three checkpoints by others of two of them, killed at every so many changes in turn."""
    os.fsync = lambda descriptor: None  # of this process, which ends here; it would take most of the time
    out = directory / "out"
    several(out, "ab", "new", overwrite=False)
    expected = contents(out)
    for moment in count(step=stride):
        shutil.rmtree(out)
        shutil.copytree(before, out)
        child = os.fork()
        if child == 0:
            kill_at(moment, str(out))
            several(out, "ab", "new", overwrite=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if (out / "config.yaml").exists():  # it is what says that these are sweeps of one config
            names = SweepIndex.load(out).checkpoints
            assert len({Inputs.load(out / name).versions["entropy-probe"] for name in names}) == 1, moment
        else:
            with pytest.raises(ValueError, match="sweeps are not finished; give the same command again"):
                load_sweeps(out)
        if os.WIFEXITED(status):
            assert moment > 40
        several(out, "ab", "new", overwrite=True)
        now = contents(out)
        assert {name: now[name] for name in expected if "config.yaml" not in name} == {
            name: content for name, content in expected.items() if "config.yaml" not in name
        }, moment
        assert now.keys() == expected.keys(), moment
        if os.WIFEXITED(status):
            return


@pytest.mark.parametrize("stride", [31, pytest.param(1, marks=pytest.mark.slow)])
def test_sweeps_that_replace_others_are_never_taken_for_those(tmp_path, stride):
    several(tmp_path / "before", "abc", "old", overwrite=False)
    process = Process(several_killed_everywhere, tmp_path, tmp_path / "before", stride)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr


def kill_at(moment: int, directory: str) -> None:
    """End this process by SIGKILL before it makes that change in the directory."""
    changes = []

    def watch(event: str, arguments: tuple) -> None:
        changing = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if event == "open":  # to write
            changing = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changing and str(arguments[0]).startswith(directory):
            if len(changes) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            changes.append(event)

    sys.addaudithook(watch)


def test_killed_at_any_operation_given_rollouts_stay(tmp_path):
    command(tmp_path / "before", other(checkpoint="before"))
    process = Process(given_killed_everywhere, tmp_path, tmp_path / "before")
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr


@pytest.mark.parametrize("write", [write_atomically, lambda path, _: rollouts().to_parquet(path)])
def test_files_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch, write):
    synced, sync, replace = [], os.fsync, Path.replace

    def renamed(self, target):
        assert os.stat(self).st_ino in synced
        synced.append(target)
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino) or sync(descriptor))
    monkeypatch.setattr(Path, "replace", renamed)
    write(tmp_path / "file", b"x")
    assert tmp_path / "file" in synced


@pytest.mark.parametrize("before", ["nothing", "another run"])
def test_killed_at_any_change_of_the_directory_it_goes_on_to_the_same(tmp_path, before):
    if before == "another run":
        command(tmp_path / before, other(checkpoint="before"))
    process = Process(killed_everywhere, tmp_path, tmp_path / before)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoint": "d"}, "a validation of other checkpoint files"),
        ({"base_model": "b"}, "a validation of other base model"),
        ({"prompts": "q"}, "a validation of other prompts"),
        ({"reward": None}, "a validation of other reward code"),
        ({"given": {"update": "u"}}, "a validation of other update rollouts"),
        ({"versions": {"entropy-probe": "2"}}, "a validation of other versions"),
        ({"config": {"update": {"seed": 1}}}, "a validation of another update.seed"),
    ],
)
def test_other_inputs_are_refused_by_name(tmp_path, changes, said):
    command(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=f"holds {said}; choose another one, or pass --overwrite to validate again$"):
        command(tmp_path / "out", other(**changes))
    assert contents(tmp_path / "out") == before


def test_another_command_is_refused_and_may_overwrite(tmp_path):
    command(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "figures" / "mine.png").write_text("mine")
    with pytest.raises(ValueError, match="holds a validation; choose another one, or pass --overwrite to replace it"):
        command(tmp_path / "out", other(command="run"))
    command(tmp_path / "out", other(command="sweep"), overwrite=True)
    assert contents(tmp_path / "out").keys() == FILES | {"notes.txt", "figures/mine.png"}


def test_rollouts_that_were_changed_are_refused(tmp_path):
    out = tmp_path / "out"
    command(out)
    (out / "update.parquet").unlink()
    command(out)  # a finished one may do without
    (out / "validation.json").unlink()
    refusal = f"holds a validation of other update rollouts than update.parquet; choose another one, or pass --overwrite to validate again, with rollouts.update={out}/update.parquet rollouts.evaluation="  # noqa: E501  # fmt: skip
    for text in (None, "changed"):
        if text is not None:
            (out / "update.parquet").write_text(text)
        with pytest.raises(ValueError, match=refusal):
            command(out)


def test_rollouts_that_are_not_saved_are_there_until_the_end(tmp_path):
    with pytest.raises(RuntimeError):
        command(tmp_path / "out", fail="results.json", save_rollouts=False)
    assert (tmp_path / "out" / "update.parquet").exists()
    assert command(tmp_path / "out", save_rollouts=False) == []
    assert contents(tmp_path / "out").keys() == FILES - {"update.parquet", "evaluation.parquet"}
    assert command(tmp_path / "out", save_rollouts=False) == []


def test_given_rollouts_survive_where_they_lie(tmp_path):
    out = tmp_path / "out"
    command(out)
    given = {"update": out / "update.parquet", "evaluation": out / "evaluation.parquet"}
    with locked(out), open_directory(out, overwrite=True, rollouts=given).writing(ALONE):
        assert contents(out).keys() == {"update.parquet", "evaluation.parquet", "inputs.json", "config.yaml", ".lock"}


def test_a_run_of_before_there_were_inputs_may_be_overwritten(tmp_path):
    out = tmp_path / "out"
    command(out)
    (out / "inputs.json").unlink()
    with pytest.raises(ValueError, match=r"expected a new or empty directory, .* pass --overwrite"):
        command(out)
    (out / "results.json").rename(tmp_path / "results.json")
    with pytest.raises(ValueError, match=r"holds report.html but no result of an earlier run"):
        command(out, overwrite=True)
    (tmp_path / "results.json").rename(out / "results.json")
    assert command(out, overwrite=True) == ["update", "evaluation"]


def test_files_of_others_stay(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"expected a new or empty directory, .* pass --overwrite"):
        command(out)
    command(out, overwrite=True)
    assert contents(out).keys() == FILES | {"thesis.tex"}


@pytest.mark.parametrize("name", [name.replace("[0-9]*", "001").replace("*", "00001") for name in OWN_FILES])
@pytest.mark.parametrize("content", ["somebody's own", "{}", '{"versions": 1}'])
def test_overwrite_never_replaces_files_that_no_command_wrote(tmp_path, name, content):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"holds {name} but no result of an earlier run"):
        command(tmp_path, overwrite=True)
    assert contents(tmp_path) == {name: content.encode()}


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"cannot write into .*out: No space left on device; choose another one"):
        command(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_later_leaves_no_half_file(tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(self, content):
        write(self, content[:5])
        if "results.json" in self.name:
            raise OSError(28, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as caught:
        command(tmp_path / "out")
    assert "the rollouts are kept, the same command goes on with them" in caught.value.__notes__[0]
    assert contents(tmp_path / "out").keys() == FILES - {*ORDER, "figures/parts.png"}
    monkeypatch.undo()
    assert command(tmp_path / "out") == []
