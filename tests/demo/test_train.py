from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropy_probe.demo import train
from entropy_probe.demo.policy import build_tokenizer
from entropy_probe.demo.train import quiet_single_thread, train_demo

SHORT = {
    "warm_start_steps": 5,
    "steps": 4,
    "save_steps": 2,
    "prompts_per_step": 2,
    "generations_per_prompt": 4,
    "num_prompts": 16,
}


def _logged(checkpoint: Path, key: str) -> list[float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "tiny"
    threads, lines = torch.get_num_threads(), []
    checkpoint = train_demo(directory, **SHORT, on_progress=lines.append)
    assert torch.get_num_threads() == threads
    return directory, checkpoint, lines


def test_the_checkpoint_is_complete(trained):
    directory, checkpoint, _ = trained
    assert checkpoint == directory / "checkpoint-4"
    assert sorted(p.name for p in directory.parent.iterdir()) == ["tiny"]
    for step in (2, 4):
        names = {p.name for p in (directory / f"checkpoint-{step}").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= names
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 2  # layers, linear layers of each, A and B
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert [len(group["params"]) for group in state["param_groups"]] == [28, 0]
    assert state["param_groups"][0]["lr"] == pytest.approx(3e-4)
    assert all(entry["step"] == 4 for entry in state["state"].values())
    assert _logged(checkpoint, "step") == [1, 2, 3, 4]


def test_the_checkpoint_loads_from_its_own_config(trained):
    directory, checkpoint, _ = trained
    base = PeftConfig.from_pretrained(checkpoint).base_model_name_or_path
    assert base == str(directory / "base")
    with quiet_single_thread():
        model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        adapted = PeftModel.from_pretrained(model, checkpoint)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    saved, loaded = load_file(checkpoint / "adapter_model.safetensors"), get_peft_model_state_dict(adapted)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_prompts_have_right_answers(trained):
    directory, _, _ = trained
    problems = [json.loads(line) for line in (directory / "prompts.jsonl").read_text().splitlines()]
    assert len({problem["prompt"] for problem in problems}) == len(problems) == 16
    for problem in problems:
        digits = [int(digit) for digit in problem["prompt"].removesuffix("=").split("+")]
        assert 2 <= len(digits) <= 6
        assert problem["answer"] == ",".join(str(sum(digits[: i + 1])) for i in range(len(digits)))


def test_a_line_of_progress_per_phase_and_checkpoint(trained):
    assert [line.split(",")[0] for line in trained[2]] == [
        "demo: supervised warm start",
        "demo: GRPO",
        "demo: step 2 of 4",
        "demo: step 4 of 4",
    ]


def test_a_second_call_changes_nothing(trained):
    directory, checkpoint, _ = trained
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    lines = []
    assert train_demo(directory, **SHORT, on_progress=lines.append) == checkpoint
    assert lines == []
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


def test_training_is_quiet_and_reproducible(trained, tmp_path, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        checkpoint = train_demo(tmp_path / "tiny", **SHORT, on_progress=lambda line: None)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    first, second = (load_file(path.parent / "base/model.safetensors") for path in (trained[1], checkpoint))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert _logged(checkpoint, "entropy") == _logged(trained[1], "entropy")


def test_a_failure_leaves_nothing_behind(tmp_path):
    threads = torch.get_num_threads()

    def fail_at_a_checkpoint(line: str) -> None:
        if "step 2 of 4" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_demo(tmp_path / "tiny", **SHORT, on_progress=fail_at_a_checkpoint)
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads


def test_another_directory_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"expected a demo with checkpoint-4, or nothing, got something else"):
        train_demo(tmp_path, **SHORT)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_the_last_step_must_be_saved(tmp_path):
    with pytest.raises(ValueError, match="save_steps: expected a divisor of steps = 4, got 3"):
        train_demo(tmp_path / "tiny", **(SHORT | {"save_steps": 3}))
    assert not (tmp_path / "tiny").exists()


def test_stray_spaces_only_follow_commas():
    problems = train._problems(train.random.Random(0), 200, stray_spaces=0.5)
    spaces = sum(answer.count(", ") for _, answer in problems)
    commas = sum(answer.count(",") for _, answer in problems)
    assert spaces == sum(answer.count(" ") for _, answer in problems)
    assert 0.4 < spaces / commas < 0.6


@pytest.mark.slow
def test_the_real_demo_learns_and_loses_entropy(tmp_path):
    checkpoint = train_demo(tmp_path / "tiny")
    rewards, entropies = _logged(checkpoint, "reward"), _logged(checkpoint, "entropy")
    assert len(rewards) == 20
    assert 0.25 < sum(rewards) / 20 < 0.75
    assert sum(rewards[10:]) > sum(rewards[:10])
    assert 0.05 < sum(entropies[15:]) / 5 < sum(entropies[:5]) / 5 - 0.01
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert all(weight.abs().max() > 1e-4 for weight in adapter.values())
