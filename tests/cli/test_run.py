from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from entropy_probe import EntropyProbe, ProbeResult, Rollouts, Validation
from entropy_probe.cli.output import locked
from entropy_probe.report.wording import RESULT_FIGURES
from entropy_probe.results.validation import MeasuredStep
from entropy_probe.sampling import HFGenerator
from tests.checkpoints.conftest import edit_json
from tests.checkpoints.settings_files import GRPO, pickled_settings, saved_settings
from tests.cli.conftest import SHARD, command_line, execute, invoke, killed_before
from tests.notes import texts
from tests.processes import Process

AS_USERS_DO = ("-m", "entropy_probe")


def run(*args) -> str:
    result = invoke("run", *args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def numbers(directory) -> dict:
    """Everything in a result but how long it took and how much memory."""
    saved = json.loads((directory / "results.json").read_text())
    if saved["attribution"]:
        del saved["attribution"]["seconds"]
    return {key: value for key, value in saved.items() if key not in ("timing", "memory")}


def contents(directory) -> dict[str, object]:
    """Every file but those that say how long it took or name the directory."""
    files = {path for path in directory.rglob("*") if path.is_file()}
    varying = {directory / name for name in ("config.yaml", "report.html", "results.json")}
    found: dict[str, object] = {str(path.relative_to(directory)): path.read_bytes() for path in files - varying}
    return found | {path.name: path.exists() for path in varying} | {"numbers": numbers(directory)}


@pytest.fixture(scope="module")
def once(trained, tmp_path_factory):
    """One run through the real command, shared by the tests that only look at it."""
    directory = tmp_path_factory.mktemp("once")
    settings = {
        "checkpoint": str(trained.checkpoint),
        "prompts": {"jsonl": str(trained.prompts)},
        "reward": "tests.cli.rewards:odd_characters",
        "update": {"num_prompts": 4, "group_size": 4},
        "evaluation": {"total_sequences": 24},
        "probe": {"max_completion_length": 8},
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(settings))
    options = ("--output-dir", directory / "out", "--learning-rate", "8e-7")
    done = execute("run", directory / "run.yaml", *options, command=AS_USERS_DO)
    assert done.returncode == 0, done.stderr
    return directory / "out", done


def test_a_run_directory_holds_the_run(once):
    out, done = once
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yaml", "evaluation.parquet", "figures", "inputs.json", "report.html", "results.json", "update.parquet"
    ]  # fmt: skip
    names = "config.yaml, evaluation.parquet, figures, inputs.json, report.html, results.json, update.parquet"
    assert f"Saved in {out}: {names}\n Open in a browser: {out / 'report.html'}\n" in done.stdout
    figures = [f"{name}.{kind}" for name in ("change", "horizons", "parts") for kind in ("png", "svg")]
    assert sorted(path.name for path in (out / "figures").iterdir()) == figures
    assert "\x1b[" not in done.stdout + done.stderr
    assert all(line[2] == ":" for line in done.stderr.splitlines()), done.stderr
    assert "sample evaluation: 24 of 24" in done.stderr

    result = ProbeResult.load(out)
    assert result.predicted is not None
    assert result.realized is not None
    assert result.difference is not None
    assert result.predicted.value != 0
    assert sum(part.value for part in result.components.values()) == pytest.approx(result.predicted.value, rel=1e-6)
    assert result.difference.value == pytest.approx(result.realized.value - result.predicted.value, abs=1e-15)
    assert result.diagnostics.evaluation_unit == "sequence"
    assert result.optimizer_state.learning_rates[0] == 8e-7
    assert "load checkpoint" in result.timing
    assert len(Rollouts.from_parquet(out / "update.parquet")) == 16
    assert len(Rollouts.from_parquet(out / "evaluation.parquet")) == 24


def test_a_run_repeats_from_its_own_config(once, tmp_path):
    out, _ = once
    again = execute("run", out / "config.yaml", "--output-dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert numbers(tmp_path / "again") == numbers(out)
    for name in ("update.parquet", "evaluation.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_a_run_repeats_from_its_saved_rollouts_without_prompts_or_reward(once, tmp_path):
    out, _ = once
    rollouts = [f"rollouts.{name}={out / name}.parquet" for name in ("update", "evaluation")]
    run(out / "config.yaml", *rollouts, "prompts=null", "reward=null", "--output-dir", tmp_path / "again")
    first, again = numbers(out), numbers(tmp_path / "again")
    for part in ("entropy", "predicted", "realized", "difference"):
        assert again[part]["value"] == pytest.approx(first[part]["value"], rel=1e-4, abs=1e-12), part
        assert again[part]["standard_error"] == pytest.approx(first[part]["standard_error"], rel=1e-4), part
    config = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert config["update"] is None
    assert config["rollouts"]["update"] == str(out / "update.parquet")


def test_report_shows_the_saved_result_as_the_run_did(once):
    out, done = once
    written = (out / "report.html").read_bytes()
    assert b"Agrees" in written or b"Indistinguishable from 0" in written
    assert b"attribution=true" in written
    for target in (out, out / "results.json"):
        (out / "report.html").unlink()
        shown = invoke("report", target)
        assert shown.exit_code == 0
        assert shown.stdout == done.stdout
        assert (out / "report.html").read_bytes() == written


def test_overwrite_replaces_a_run(config, tmp_path, refused):
    out = tmp_path / "out"
    run(config)
    first = numbers(out)
    (out / "notes.txt").write_text("mine")
    line = refused("run", config, "update.seed=7")
    assert line == f"output_dir: {out} holds a run of another update.seed; choose another one, or pass --overwrite to run again"  # noqa: E501  # fmt: skip
    assert numbers(out) == first
    run(config, "--overwrite", "save_rollouts=false", "update.seed=7")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yaml", "figures", "inputs.json", "notes.txt", "report.html", "results.json"
    ]  # fmt: skip
    assert numbers(out)["predicted"] != first["predicted"]
    assert yaml.safe_load((out / "config.yaml").read_text())["update"]["seed"] == 7


def test_rollouts_inside_the_overwritten_directory_survive(config, tmp_path):
    out = tmp_path / "out"
    run(config)
    before = (out / "update.parquet").read_bytes()
    run(config, f"rollouts.update={out}/update.parquet", "save_rollouts=false", "--overwrite")
    assert (out / "update.parquet").read_bytes() == before
    assert not (out / "evaluation.parquet").exists()


def test_dropped_prompts_and_other_notes_reach_the_reader(config, checkpoint, tmp_path, refused):
    # no random response is the right answer, so that every advantage is 0
    edit_json(checkpoint / "trainer_state.json", log_history=[{"reward": 0.5, "kl": 0.25}])
    line = refused("run", config, "reward=exact_match")
    assert "expected different rewards within a prompt, got equal ones for each of 4 prompts" in line
    given = ("reward=exact_match", "update.allow_zero_advantages=true", f"checkpoint={checkpoint}")
    shown = " ".join(run(config, *given).split())
    assert "every prompt has equal rewards" in shown
    assert "not modelled: the KL term to a reference policy (the log has kl, 0.25 last)" in shown
    diagnostics = ProbeResult.load(tmp_path / "out").diagnostics
    assert any(message.startswith("update: every prompt has equal rewards") for message in texts(diagnostics.notes))
    assert len(diagnostics.not_modelled) == 1


def test_one_batch_needs_no_evaluation(config, tmp_path):
    done = execute("run", config, "mode=one_batch", "probe.learning_rate=1e-5")
    assert done.returncode == 0, done.stderr
    result = ProbeResult.load(tmp_path / "out")
    assert result.predicted.se_update_method == "pairs"
    assert result.realized.batch == "own"
    assert set(result.components) == {"gradient", "momentum", "weight_decay"}
    assert result.diagnostics.evaluation_unit == "prompt"
    assert "self-influence out" in done.stdout
    assert not (tmp_path / "out" / "evaluation.parquet").exists()
    again = execute("run", tmp_path / "out" / "config.yaml", "--output-dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert ProbeResult.load(tmp_path / "again").predicted == result.predicted


def test_one_batch_in_the_frozen_geometry_is_the_u_statistic(config, tmp_path):
    frozen = ("probe.geometry=frozen", "probe.frozen_max_scale=1e12", "probe.identity_if_coverage_below=0.1")
    out = run(config, "mode=one_batch", *frozen)
    result = ProbeResult.load(tmp_path / "out")
    assert result.predicted is result.realized is None
    assert result.cross_prompt.num_clusters == 4
    assert result.cross_prompt.delta_h1 != 0
    assert "one batch δH₁" in out


def test_both_modes_side_by_side(config, tmp_path):
    done = execute("run", config, "mode=both", "probe.identity_if_coverage_below=0.1")
    assert done.returncode == 0, done.stderr
    result = ProbeResult.load(tmp_path / "out")
    assert result.predicted is not None
    assert result.cross_prompt is not None
    assert "one batch δH₁" in done.stdout
    assert "predicted δH₁" in done.stdout
    assert "cross-prompt gradients" in result.timing


def test_attribution_fills_tables_that_a_later_run_without_it_removes(config, tmp_path):
    out = tmp_path / "out"
    shown = run(config, "attribution=true", "attribution_folds=4", "mode=both", "probe.frozen_max_scale=1e9")
    tables = ("layers.parquet", "prompts.parquet", "tokens.parquet")
    assert set(tables) < {path.name for path in out.iterdir()}
    result = ProbeResult.load(out)
    assert result.attribution is not None
    assert result.attribution.folds == 4
    assert result.cross_prompt is not None
    assert result.realized is not None
    tokens, prompts = (pd.read_parquet(out / name) for name in ("tokens.parquet", "prompts.parquet"))
    update = Rollouts.from_parquet(out / "update.parquet")
    assert tokens.contribution.sum() == pytest.approx(result.components["gradient"].value, rel=1e-6)
    assert tokens.token_id.tolist() == update.input_ids[update.response_mask].tolist()
    assert prompts.prompt.str.fullmatch(r"\d\+\d=").all()
    assert (prompts.standard_error > 0).any()
    assert "Which prompts did it" in shown
    again = invoke("report", out).stdout
    assert again.partition(" Saved in")[0] == shown.partition(" Saved in")[0]
    run(config, "--overwrite")
    assert not set(tables) & {path.name for path in out.iterdir()}


def test_validate_takes_real_steps_and_report_shows_them_again(config, tmp_path, refused):
    out = tmp_path / "out"
    done = invoke("validate", config, "--subsets", 5, "--seed", 2)
    assert done.exit_code == 0, (done.output, done.exception)
    assert ProbeResult.load(out).attribution.folds == 8, "where nothing is asked"
    found = Validation.load(out)
    assert len(found.steps) == 5
    assert found.seed == 2
    assert "5 real steps on 2 of 4 prompts" in done.stdout
    assert ProbeResult.load(out).attribution is not None
    assert (out / "tokens.parquet").is_file()
    assert "covariance (Cui)" in invoke("report", out).stdout
    own = invoke("validate", config, "mode=one_batch", "--subsets", 4, "--output-dir", tmp_path / "own")
    assert own.exit_code == 0, (own.output, own.exception)
    assert Validation.load(tmp_path / "own").num_sequences == len(
        Rollouts.from_parquet(tmp_path / "own/update.parquet")
    )
    run(config, "--overwrite")
    assert not (out / "validation.json").exists()


def test_an_interrupted_validation_goes_on_with_the_step_it_was_at(config, tmp_path, monkeypatch):
    """The run is not computed again, nor a step that is there, and what comes of it is the same to the byte."""
    options = ("--subsets", 5, "mode=two_batch", "probe.measure_noise_floor=false")
    whole, halted = tmp_path / "out", tmp_path / "halted"
    assert invoke("validate", config, *options).exit_code == 0
    options = (*options, "--output-dir", halted)
    save, saved = MeasuredStep.save, []

    def save_or_stop(self, path):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        return save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(MeasuredStep, "save", save_or_stop)
        stopped = invoke("validate", config, *options)
    assert stopped.exit_code == 130
    assert f"the run itself is complete in {halted}, the same command goes on with its validation" in stopped.stderr
    written = (halted / "results.json").stat().st_mtime_ns
    monkeypatch.setattr(EntropyProbe, "attribute", lambda *_, **__: pytest.fail("attributed again"))
    monkeypatch.setattr(MeasuredStep, "save", lambda self, path: saved.append(path) or save(self, path))
    assert invoke("validate", config, *options).exit_code == 0
    assert [path.name for path in saved] == [f"00{k}.json" for k in range(1, 6)]
    assert (halted / "results.json").stat().st_mtime_ns == written
    assert contents(halted) == contents(whole)


def test_too_few_prompts_to_validate_are_refused_before_any_work(config, refused, once, tmp_path, monkeypatch):
    module = sys.modules["entropy_probe.cli.run"]
    monkeypatch.setattr(module, "open_checkpoint", lambda config: pytest.fail("loaded the checkpoint"))
    expected = "validate: expected at least 4 update prompts to take halves of, got 3; use a larger update batch"
    assert refused("validate", config, "update.num_prompts=3") == expected
    few = Rollouts.from_parquet(once[0] / "update.parquet").select(torch.arange(12))
    few.to_parquet(tmp_path / "few.parquet")
    assert refused("validate", config, f"rollouts.update={tmp_path}/few.parquet") == expected
    assert not (tmp_path / "out").exists()


def test_a_validation_that_fails_leaves_the_finished_run(config, tmp_path, monkeypatch, refused):
    def fail(self, *arguments, **settings):
        raise ValueError("the power is out")

    monkeypatch.setattr(EntropyProbe, "validate", fail)
    done = invoke("validate", config)
    assert done.exit_code == 2
    out = tmp_path / "out"
    said = f"error: the power is out; the run itself is complete in {out}, the same command goes on with its validation"
    assert said in done.stderr
    assert ProbeResult.load(out).attribution is not None
    names = {path.name for path in out.iterdir()}
    assert {"tokens.parquet", "update.parquet", "evaluation.parquet", "report.html", "figures"} <= names
    assert not names & {"validation.json", ".lock"}
    assert invoke("report", out).exit_code == 0
    monkeypatch.undo()
    assert invoke("validate", config).exit_code == 0
    assert "covariance (Cui)" in (out / "report.html").read_text()
    assert "holds a validation; choose another one, or pass --overwrite to replace it" in refused("run", config)
    assert "holds a validation of another subsets; " in refused("validate", config, "--subsets", 5)


def test_two_runs_do_not_work_in_one_directory(config, tmp_path, refused):
    """The second would delete what the first has put aside."""
    with locked(tmp_path / "out"):
        for command in ("run", "validate"):
            line = refused(command, config, "--overwrite")
            assert line.startswith(f"output_dir: another process is working in {tmp_path / 'out'}; wait for it")


def test_a_reward_that_fails_is_one_line_and_leaves_nothing(config, tmp_path):
    done = execute("run", config, "reward=tests.cli.rewards:broken")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "reward tests.cli.rewards:broken, called with prompts, responses: raised KeyError: 'no such" in line
    assert "(rewards.py:16)" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    debug = execute("run", config, "reward=tests.cli.rewards:broken", ENTROPY_PROBE_DEBUG="1")
    assert debug.returncode == 2
    assert "Traceback" in debug.stderr
    assert not (tmp_path / "out").exists()


def test_rollouts_sampled_before_a_failure_are_kept(config, tmp_path):
    """A learning rate that overflows the policy fails after sampling."""
    out = tmp_path / "out"
    failed = invoke("run", config, "probe.learning_rate=1e30")
    assert failed.exit_code == 2
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yaml", "evaluation.parquet", "inputs.json", "update.parquet"
    ]  # fmt: skip
    settings = f"rollouts.update={out}/update.parquet rollouts.evaluation={out}/evaluation.parquet"
    assert f"the rollouts are kept, the same command goes on with them, another one with {settings} --overwrite" in failed.stderr  # noqa: E501  # fmt: skip
    assert "the run is not finished; give the same command again to resume it" in invoke("report", out).stderr
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    other = invoke("run", config)
    assert other.exit_code == 2
    assert f"holds a run of another probe.learning_rate; choose another one, or pass --overwrite to run again, with {settings} to keep" in other.stderr  # noqa: E501  # fmt: skip
    run(config, *settings.split(), "--overwrite")
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")} == before


def test_the_trainers_settings_reach_the_result(config, checkpoint, tmp_path):
    """What the files say, of a copy whose settings are its own; the config says nothing of them."""
    settings = GRPO | {"loss_type": "grpo", "max_grad_norm": 0.25, "max_completion_length": 8, "temperature": 1.0}
    saved_settings(checkpoint, pickled_settings(**settings, mask_truncated_completions=True))
    own = yaml.safe_load(config.read_text()) | {"checkpoint": str(checkpoint), "probe": {"learning_rate": 1e-4}}
    config.write_text(yaml.safe_dump(own))
    done = invoke("run", config)
    assert done.exit_code == 0, done.output
    result = ProbeResult.load(tmp_path / "out")
    assert result.config["loss"]["loss_type"] == "grpo"
    assert (result.config["max_grad_norm"], result.config["max_completion_length"]) == (0.25, 8)
    assert result.config["update_selected"]
    update = Rollouts.from_parquet(tmp_path / "out" / "update.parquet")
    assert not update.response_mask.any(1).all()
    refused = invoke("run", config, "probe.temperature=0.7", "--output-dir", tmp_path / "other")
    assert refused.exit_code == 2
    assert "probe.temperature: expected 1.0, which" in refused.output
    assert not (tmp_path / "other").exists()
    trusted = ("probe.temperature=0.7", "--trust-config", "--output-dir", tmp_path / "other")
    assert invoke("run", config, *trusted).exit_code == 0
    codes = [note.code for note in ProbeResult.load(tmp_path / "other").diagnostics.notes]
    assert "config_trusted" in codes
    assert "logged_gradient_norm" in codes
    assert "logged_entropy" not in codes  # that of the responses that were not masked


def test_a_finished_run_is_shown_again(once, monkeypatch):
    out, done = once
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(sys.modules["entropy_probe.cli.run"], "open_checkpoint", lambda _: pytest.fail("loaded"))
    again = invoke("run", out / "config.yaml")
    assert again.exit_code == 0, again.output
    assert again.stdout == done.stdout
    assert again.stderr == f"note: {out} holds this run, shown as it is; --overwrite starts afresh\n"
    (out / "figures" / "parts.png").unlink()
    (out / "report.html").unlink()
    assert invoke("run", out / "config.yaml").stdout == done.stdout
    assert {path for path in out.rglob("*") if path.is_file()} == {path for path in before if path.is_file()}


def test_what_a_run_is_computed_from_is_compared_by_content(config, trained, tmp_path, refused, monkeypatch):
    """Prompts and rewards are not in the config: a changed file must not be taken for the same run."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = Path("tests/cli/rewards.py").read_text()
    (tmp_path / "own_rewards.py").write_text(source)
    prompts = Path(shutil.copy(trained.prompts, tmp_path / "prompts.jsonl"))
    options = (f"prompts.jsonl={prompts}", "reward=own_rewards:odd_characters", "--allow-code")
    run(config, *options)
    moved = prompts.rename(tmp_path / "moved.jsonl")
    assert "holds this run" in invoke("run", config, f"prompts.jsonl={moved}", *options[1:]).stderr
    moved.write_text("".join(moved.read_text().splitlines(keepends=True)[1:]))
    assert "holds a run of other prompts; choose" in refused("run", config, f"prompts.jsonl={moved}", *options[1:])
    shutil.copy(trained.prompts, prompts)
    (tmp_path / "own_rewards.py").write_text(source + "\n")
    assert "holds a run of other reward code; choose" in refused("run", config, *options)


def test_help_loads_nothing_heavy():
    done = execute(
        command=("-c", "import sys; import entropy_probe.cli; print([m for m in sys.modules if m in "
        "('transformers', 'peft', 'pyarrow', 'entropy_probe.cli.config', 'rich.progress')])")
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
    done = execute("--help")
    assert done.returncode == 0
    for name in ("run", "inspect", "report", "demo"):
        assert name in done.stdout


@pytest.mark.slow
def test_demo_trains_probes_and_reuses_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = execute("demo", command=AS_USERS_DO)
    assert first.returncode == 0, first.stderr
    assert "Open in a browser: runs/demo/report.html" in first.stdout
    before = numbers(tmp_path / "runs" / "demo")
    again = execute("demo")
    assert again.returncode == 0, again.stderr
    assert "warm start" in first.stderr
    assert "warm start" not in again.stderr
    assert numbers(tmp_path / "runs" / "demo") == before


def test_fresh_responses_take_over_where_weights_fail(config, tmp_path):
    options = ["probe.learning_rate=0.1", "probe.on_low_ess=resample"]
    out = run(config, *options)
    first = ProbeResult.load(tmp_path / "out")
    assert first.realized.estimator == "resampled"
    assert first.realized.ess_fraction < 0.5
    assert "fresh responses after the step" in out
    # from saved rollouts the prompts are read off the tokens, and the seed is the same
    rollouts = [f"rollouts.{name}={tmp_path / 'out' / name}.parquet" for name in ("update", "evaluation")]
    run(config, *options, *rollouts, "--output-dir", tmp_path / "again")
    assert ProbeResult.load(tmp_path / "again").realized == first.realized


def test_a_refused_change_is_shown_as_one(config, tmp_path):
    out = run(config, "probe.learning_rate=0.1")
    assert "refused" in out
    assert "Not measured" in out
    assert ProbeResult.load(tmp_path / "out").realized.value is None


def test_resampling_needs_the_largest_length(config, refused, once):
    out, _ = once
    rollouts = [f"rollouts.{name}={out / name}.parquet" for name in ("update", "evaluation")]
    line = refused("run", config, *rollouts, "probe.on_low_ess=resample", "probe.max_completion_length=null")
    assert "probe.max_completion_length: required to sample responses anew" in line


def run_killed_at_sample(number: int, *args: str) -> None:
    """In a process of its own, which ends by SIGKILL as it is about to sample for that time."""
    generate, sampled = HFGenerator.generate, []

    def generate_or_die(self, prompts, *arguments):
        sampled.append(len(prompts))
        if len(sampled) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(self, prompts, *arguments)

    HFGenerator.generate = generate_or_die
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SHARD, 12)
        command_line("run", *args)


def test_a_killed_run_goes_on_with_the_shard_it_was_killed_in(config, tmp_path, monkeypatch):
    out, arguments = tmp_path / "out", (str(config), "evaluation.total_sequences=52")
    shards = [out / "evaluation" / f"shard-0000{k}.parquet" for k in range(5)]
    written: list[int] = []
    # the update batch is sampled first, and only by the first process
    for number, finished in ((4, 2), (2, 3)):
        process = Process(run_killed_at_sample, number, *arguments)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert [shard.exists() for shard in shards] == [k < finished for k in range(5)]
        times = [(out / "update.parquet").stat().st_mtime_ns]
        times += [shard.stat().st_mtime_ns for shard in shards[:finished]]
        assert times[: len(written)] == written, "a finished shard or the update batch was sampled again"
        written = times
        assert not (out / "results.json").exists()
    monkeypatch.setattr(SHARD, 12)
    run(*arguments)
    run(*arguments, "--output-dir", tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def killed_in_turn(names, command, config, directory) -> None:
    """The same command again and again, each time killed before the next of these files appears."""
    for name in names:
        process = Process(killed_before, name, command, str(config), "--output-dir", str(directory))
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"{name} never appeared"
        assert not (directory / name).exists()
        result, report = (directory / "results.json").exists(), (directory / "report.html").exists()
        assert result == (name not in BEFORE_RESULT)
        assert not report or name == "validation.json"


BEFORE_RESULT = [
    "inputs.json", "config.yaml", "update.parquet", "shard-00000.parquet", "shard-00001.parquet", "evaluation.parquet",
    "tokens.parquet", "prompts.parquet", "layers.parquet", "results.json",
]  # fmt: skip
AFTER_RESULT = [*(f"{name}.{kind}" for name in RESULT_FIGURES for kind in ("png", "svg")), "report.html"]


def test_a_run_killed_before_a_file_appears_resumes_to_the_same_numbers(config, tmp_path, monkeypatch):
    killed_in_turn(["update.parquet", "evaluation.parquet", "results.json", "report.html"], "run", config, tmp_path / "out")  # noqa: E501  # fmt: skip
    resumed = execute("run", config)
    assert resumed.returncode == 0, resumed.stderr
    assert "sample" not in resumed.stderr
    monkeypatch.setattr(SHARD, 12)
    whole = " ".join(run(config, "--output-dir", tmp_path / "whole").replace("/whole", "/out").split())
    # who did not sample does not know how long that takes
    assert whole.replace(", less than a minute here", "") == " ".join(resumed.stdout.split())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_validation_killed_before_any_file_appears_resumes_to_the_same_numbers(config, tmp_path, monkeypatch):
    killed_in_turn(
        [*BEFORE_RESULT, "001.json", "003.json", "validation.json", *AFTER_RESULT], "validate", config, tmp_path / "out"
    )
    monkeypatch.setattr(SHARD, 12)
    for directory in ("out", "whole"):
        assert invoke("validate", config, "--output-dir", tmp_path / directory).exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_failure_while_sampling_keeps_the_shards(config, tmp_path, monkeypatch):
    generate, calls = HFGenerator.generate, []

    def fail(self, prompts, *arguments):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise RuntimeError("the power is out")
        return generate(self, prompts, *arguments)

    monkeypatch.setattr(HFGenerator, "generate", fail)
    result = invoke("run", config, "evaluation.total_sequences=520")
    assert "the same command goes on with them" in result.exception.__notes__[0]
    assert [path.name for path in (tmp_path / "out" / "evaluation").iterdir()] == ["shard-00000.parquet"]
    run(config, "evaluation.total_sequences=520")
    assert calls == [16, 256, 256, 256, 8]
    assert not (tmp_path / "out" / "evaluation").exists()


def test_an_interrupt_is_one_line_that_says_how_to_go_on(config, once, tmp_path, monkeypatch):
    module = sys.modules["entropy_probe.cli.run"]

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "open_checkpoint", interrupted)
        early = invoke("run", config)
    assert early.exit_code == 130
    assert early.stderr == "interrupted: nothing is kept, the same command starts afresh\n"
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_run_mode", interrupted)
        late = invoke("run", config)
    assert late.exit_code == 130
    (line,) = [line for line in late.stderr.splitlines() if not line[:2].isdigit()]
    assert line.startswith("interrupted: the rollouts are kept, the same command goes on with them")


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:60] + b"x" * 400])
def test_a_damaged_shard_is_named_and_drawn_again(config, once, tmp_path, monkeypatch, damage):
    """What comes of it is what an undisturbed run gives."""
    with monkeypatch.context() as patch:
        patch.setattr(SHARD, 12)
        patch.setattr("entropy_probe.sampling.evaluation.merge_rollouts", lambda files, path: 1 / 0)
        assert isinstance(invoke("run", config).exception, ZeroDivisionError)
    shard = tmp_path / "out" / "evaluation" / "shard-00001.parquet"
    shard.write_bytes(damage(shard.read_bytes()))
    monkeypatch.setattr(SHARD, 12)
    done = invoke("run", config)
    assert done.exit_code == 0, done.output
    assert f"note: {shard} is damaged and is sampled again (" in done.stderr
    assert not shard.exists()
    drawn, expected = (Rollouts.from_parquet(p / "evaluation.parquet") for p in (tmp_path / "out", once[0]))
    assert torch.equal(drawn.input_ids, expected.input_ids)
