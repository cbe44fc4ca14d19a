"""``entropy-probe sweep``: what it writes, that it resumes to the same bytes after SIGKILL, and what it refuses."""

from __future__ import annotations

import io
import os
import shutil
import signal
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml
from PIL import Image

from entropy_probe import Rollouts, Sweep, SweepPoint
from entropy_probe.cli.output import locked
from entropy_probe.cli.sweep import open_index
from tests.checkpoints.conftest import edit_optimizer
from tests.cli.conftest import SHARD, command_line, execute, invoke, killed_before
from tests.processes import Process

RATES = [1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
FILES = [
    "config.yaml", "evaluation.parquet", "inputs.json", "points", "report.html", "sweep.json", "sweep.png", "sweep.svg",
    "update.parquet",
]  # fmt: skip


@pytest.fixture
def config(config) -> Path:
    """The config of a run, with rates to sweep over."""
    settings = yaml.safe_load(config.read_text())
    settings["sweep"] = {"learning_rates": RATES}
    config.write_text(yaml.safe_dump(settings))
    return config


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the two that name the directory itself."""
    files = (
        path for path in directory.rglob("*") if path.is_file() and path.name not in ("config.yaml", "report.html")
    )
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def sweep(*args) -> str:
    result = invoke("sweep", *args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def sweep_killed_before(number: int, *args: str) -> None:
    """In a process of its own, which ends by SIGKILL as it is about to write that point."""
    save, saved = SweepPoint.save, []

    def save_or_die(self, path):
        if len(saved) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        saved.append(path)
        return save(self, path)

    SweepPoint.save = save_or_die
    command_line("sweep", *args)


def test_a_killed_sweep_resumes_to_the_same_bytes(config, tmp_path):
    options = ("sweep.learning_rates=[1e-5,1e-4,3e-4]", "sweep.direct_curvature=true")
    shown = sweep(config, *options, "--output-dir", tmp_path / "whole")
    arguments = ("--output-dir", tmp_path / "killed", config, *options)
    process = Process(sweep_killed_before, 2, *map(str, arguments))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "sweep.json").exists()
    refused = invoke("report", tmp_path / "killed")
    assert refused.exit_code == 2
    assert "the sweep is not finished" in refused.stderr
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "points").glob("*.json")}
    assert len(kept) == 2
    resumed = execute("sweep", *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a finished point was computed again"
    assert "sample" not in resumed.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert resumed.stdout.replace(str(tmp_path / "killed"), str(tmp_path / "whole")) == shown


@pytest.mark.slow
def test_a_sweep_killed_before_any_file_appears_resumes_to_the_same_bytes(config, tmp_path, monkeypatch):
    monkeypatch.setattr(SHARD, 12)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("sweep.direct_curvature=true", "evaluation.total_sequences=64")
    shown = sweep(config, *options, "--output-dir", whole)
    points = sorted(path.name for path in (whole / "points").iterdir())
    assert len(points) == len(RATES)
    before = ["inputs.json", "config.yaml", "update.parquet", "shard-00000.parquet", "evaluation.parquet"]
    after = ["sweep.png", "sweep.svg", "report.html"]
    for name in (*before, *points, "sweep.json", *after):
        process = Process(killed_before, name, "sweep", str(config), *options, "--output-dir", str(killed))
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"{name} never appeared"
        assert (killed / "sweep.json").exists() == (name in after)
        if name in points:
            assert "the sweep is not finished" in invoke("report", killed).stderr
    kept = {path: path.stat().st_mtime_ns for path in (killed / "points").iterdir()}
    assert sweep(config, *options, "--output-dir", killed).replace("/killed", "/whole") == shown
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a finished point was computed again"
    assert contents(killed) == contents(whole)


@pytest.mark.drawn
def test_what_a_sweep_writes_and_shows(config, tmp_path):
    shown = sweep(config)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == FILES
    found = Sweep.load(out)
    assert [point.learning_rate for point in found.points] == RATES
    assert found.points[0].realized is not None
    for path in (out / "points").iterdir():
        point = SweepPoint.load(path)
        assert point.influence is None or len(point.influence) == 24
    assert len(Rollouts.from_parquet(out / "evaluation.parquet")) == 24
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["sweep"]["learning_rates"] == RATES
    assert saved["probe"]["learning_rate"] is None
    assert found.prediction.timing == found.prediction.memory == {}
    assert str(tmp_path) not in (out / "sweep.json").read_text()
    with Image.open(io.BytesIO((out / "sweep.png").read_bytes())) as image:
        image.load()
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 50
    svg = ElementTree.parse(out / "sweep.svg").getroot()
    assert svg.tag.endswith("svg")
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}path"))) > 50
    assert b"<dc:date>" not in (out / "sweep.svg").read_bytes()
    # one row for every rate
    rows = [line.split()[0] for line in shown.splitlines() if line[:2] == " " + line[1:2] and line[1:2].isdigit()]
    assert rows == [f"{rate:.3g}" for rate in RATES]
    assert "inear" in shown
    assert invoke("report", out).stdout == shown
    assert invoke("report", out / "sweep.json").stdout == shown
    before = contents(out)
    assert sweep(config) == shown
    assert contents(out) == before


def test_a_sweep_repeats_from_its_own_config(config, tmp_path):
    sweep(config, "sweep.learning_rates=[1e-5,1e-4]")
    sweep(tmp_path / "out" / "config.yaml", "--output-dir", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


@pytest.fixture
def swept(config, checkpoint, tmp_path) -> tuple[Path, str]:
    """A finished sweep of two rates of a checkpoint that a test may damage: config, and override that names it."""
    named = f"checkpoint={checkpoint}"
    sweep(config, named, "sweep.learning_rates=[1e-5,1e-4]")
    return config, named


def test_a_sweep_of_other_inputs_is_not_resumed(swept, checkpoint, tmp_path, refused):
    config, named = swept
    same = (config, named, "sweep.learning_rates=[1e-5,1e-4]")
    out = tmp_path / "out"
    before = contents(out)
    ending = "choose another one, or pass --overwrite to sweep again"

    def refusal(*args) -> str:
        line = refused("sweep", *args)
        assert line.startswith(f"output_dir: {out} holds ")
        assert line.endswith(ending)
        assert contents(out) == before
        return line

    assert "another sweep.learning_rates" in refusal(config, named, "sweep.learning_rates=[1e-5,2e-4]")
    assert "another probe.normalization" in refusal(*same, "probe.normalization=sequence")
    assert "another update.seed" in refusal(*same, "update.seed=5")
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    sweep(config, f"checkpoint={moved}", "sweep.learning_rates=[1e-5,1e-4]")  # the same content elsewhere
    edit_optimizer(moved, lambda saved: saved["state"][0]["exp_avg"].mul_(2))
    assert "other checkpoint files" in refusal(config, f"checkpoint={moved}", "sweep.learning_rates=[1e-5,1e-4]")
    data = (out / "update.parquet").read_bytes()
    shutil.copy(out / "evaluation.parquet", out / "update.parquet")
    before = contents(out)
    assert "other update rollouts than update.parquet" in refusal(*same)
    (out / "update.parquet").write_bytes(data)
    (out / "notes.txt").write_text("mine")
    sweep(config, f"checkpoint={moved}", "sweep.learning_rates=[1e-5,2e-4]", "--overwrite")
    assert [point.learning_rate for point in Sweep.load(out).points] == [1e-5, 2e-4]
    assert len(list((out / "points").iterdir())) == 2
    assert (out / "notes.txt").read_text() == "mine"


def test_saved_rollouts_are_compared_by_content(swept, tmp_path, refused):
    config, named = swept
    out, given = tmp_path / "out", tmp_path / "given.parquet"
    shutil.copy(out / "evaluation.parquet", given)
    arguments = (config, named, "sweep.learning_rates=[1e-5,1e-4]", f"rollouts.evaluation={given}", "--output-dir", tmp_path / "b")  # noqa: E501  # fmt: skip
    sweep(*arguments, "probe.evaluation_unit=sequence")
    first, second = Sweep.load(out), Sweep.load(tmp_path / "b")
    assert [point.realized for point in second.points] == [point.realized for point in first.points]
    Rollouts.from_parquet(given).select(torch.arange(20)).to_parquet(given)
    assert "other evaluation rollouts" in refused("sweep", *arguments, "probe.evaluation_unit=sequence")


def test_several_checkpoints(config, checkpoint, trained, tmp_path, refused):
    other = shutil.copytree(checkpoint, tmp_path / "checkpoint-3")
    edit_optimizer(other, lambda saved: saved["state"][0]["exp_avg"].mul_(2))
    arguments = (config, f"sweep.checkpoints=[{checkpoint},{other}]", "sweep.learning_rates=[1e-5,1e-3]")
    shown = sweep(*arguments)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint-2", "checkpoint-3", "config.yaml", "report.html", "sweeps.json", "sweeps.png", "sweeps.svg"
    ]  # fmt: skip
    assert sorted(path.name for path in (out / "checkpoint-3").iterdir()) == FILES
    for name in ("checkpoint-2", "checkpoint-3"):
        assert f" {name} " in shown
    assert invoke("report", out).stdout == shown
    alone = sweep(config, f"checkpoint={other}", *arguments[2:], "--output-dir", tmp_path / "alone")
    assert alone
    assert contents(tmp_path / "alone") == contents(out / "checkpoint-3")
    before = contents(out)
    assert sweep(*arguments) == shown
    assert contents(out) == before
    line = refused("sweep", config, f"sweep.checkpoints=[{checkpoint}]", *arguments[2:])
    assert "holds sweeps of other checkpoints" in line
    (out / "checkpoint-3" / "sweep.json").unlink()
    assert "checkpoint-3: the sweep is not finished" in refused("report", out)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["sweep.learning_rates=null"], "sweep: expected learning_rates, or smallest, largest and num"),
        (["sweep.num=3"], "sweep: expected learning_rates, or smallest, largest and num; give one of the two"),
        (["sweep.learning_rates=null", "sweep.num=3"], "expected smallest, largest and num together"),
        (["sweep.learning_rates=[1e-3]"], "learning_rates: expected at least 2, positive, finite and distinct"),
        (["sweep.learning_rates=[1e-3,-1e-3]"], "expected at least 2, positive, finite and distinct"),
        (["sweep.learning_rates=[1e-3,x]"], "sweep.learning_rates.1: input should be a valid number"),
        (["sweep.larning_rates=[1,2]"], "sweep.larning_rates: unknown key; did you mean sweep.learning_rates?"),
        (["sweep=null"], "sweep: input should be a valid dictionary"),
        (["mode=both"], "mode: expected two_batch, which is what a sweep measures, got both"),
        (["save_rollouts=false"], "save_rollouts: expected true, since a sweep resumes from its rollouts"),
        (["sweep.checkpoints=[a/x,b/x]"], "sweep.checkpoints: expected directories of different names, got x, x"),
        (["sweep.checkpoints=[a]", "rollouts.update=u.parquet"], "sweep.checkpoints: each checkpoint has its own"),
        (["checkpoint=/nowhere"], "/nowhere: expected a checkpoint directory"),
        (["rollouts.update=/nowhere.parquet"], "/nowhere.parquet: expected a Parquet file of rollouts"),
        (["prompts.jsonl=/nowhere.jsonl"], "/nowhere.jsonl: expected a JSONL file of prompts"),
        (["reward=nobody"], "reward: expected exact_match, gsm8k, math, reasoning_gym or package.module:function"),
    ],
)
def test_bad_settings(config, refused, tmp_path, args, match):
    assert match in refused("sweep", config, *args)
    assert not (tmp_path / "out").exists()


def test_evenly_spaced_rates(config, tmp_path):
    sweep(config, "sweep.learning_rates=null", "sweep.smallest=1e-6", "sweep.largest=1e-4", "sweep.num=5")
    rates = [point.learning_rate for point in Sweep.load(tmp_path / "out").points]
    assert rates == [1e-6, 3.16228e-6, 1e-5, 3.16228e-5, 1e-4]


def test_a_directory_of_something_else_is_left_alone(config, refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    several = f"sweep.checkpoints=[{tmp_path}/a]"
    for extra in ([], [several]):
        line = refused("sweep", config, *extra)
        assert f"expected a new or empty directory, {tmp_path}/out holds files; choose another one" in line
    (tmp_path / "out" / "sweep.png").write_text("mine")
    for extra, said in (([], "no result of an earlier run"), ([several], "no sweeps of several checkpoints")):
        line = refused("sweep", config, "--overwrite", *extra)
        assert f"holds sweep.png but {said}, so it is not overwritten; choose another one" in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sweep.png", "thesis.tex"]
    line = refused("sweep", config, f"rollouts.update={tmp_path}/out/evaluation.parquet")
    assert "rollouts.update: lies in output_dir where the evaluation batch goes; choose another output_dir" in line


def test_two_sweeps_do_not_work_in_one_directory(config, trained, tmp_path, refused):
    several = f"sweep.checkpoints=[{trained.checkpoint}]"
    (tmp_path / "out").mkdir()
    open_index(tmp_path / "out", ["checkpoint-2"], overwrite=False)
    for place, extra in (("out", ()), ("out", (several,)), ("out/checkpoint-2", (several,))):
        with locked(tmp_path / place):
            line = refused("sweep", config, *extra)
        assert line.startswith(f"output_dir: another process is working in {tmp_path / place}; wait for it")
