"""The seam of sampling engines, by one more member: registered here, named in a config, in no file of the package."""

from __future__ import annotations

import pytest
import torch

from entropy_probe import Rollouts
from entropy_probe.sampling import (
    ENGINES,
    Completion,
    Engine,
    EvaluationSettings,
    GenerationSettings,
    SamplingParameters,
    load_prompts,
    resample_responses,
    sample_evaluation,
)
from tests.cli.conftest import invoke

SCRIPT = ((4, 5, 1), (6, 1), (5, 5, 6, 4, 1), (4, 1))


class ScriptedEngine:
    """Responses from a list: the seed says which."""

    context_length = None
    notes = ()

    def __init__(self, model, tokenizer, settings: GenerationSettings, agreed=None) -> None:
        assert callable(model)
        self.end, self.batch_size = tokenizer.eos_token_id, settings.batch_size

    def generate(self, prompts, parameters, seeds, progress=None):
        assert parameters.max_completion_length >= max(map(len, SCRIPT))
        return [self.respond(prompt, SCRIPT[seed % len(SCRIPT)]) for prompt, seed in zip(prompts, seeds, strict=True)]

    def respond(self, prompt, response) -> Completion:
        return Completion(tuple(prompt), (*response[:-1], self.end), truncated=False)


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setitem(ENGINES, "scripted", ScriptedEngine)


def responses(rollouts: Rollouts) -> list[tuple[int, ...]]:
    return [tuple(ids[mask].tolist()) for ids, mask in zip(rollouts.input_ids, rollouts.response_mask, strict=True)]


def test_an_engine_that_is_registered_samples_by_its_name(scripted, trained):
    from entropy_probe.demo.policy import build_tokenizer
    from entropy_probe.sampling import PromptSource

    settings, tokenizer = GenerationSettings(engine="scripted", batch_size=3), build_tokenizer()
    engine = ENGINES[settings.engine](abs, tokenizer, settings, None)
    assert isinstance(engine, Engine)
    prompts = load_prompts(PromptSource(jsonl=trained.prompts))
    draws, parameters = EvaluationSettings(total_sequences=20, seed=3), SamplingParameters(1.0, 8)
    rollouts, report = sample_evaluation(engine, tokenizer, prompts, draws, parameters)
    written = {(*response[:-1], tokenizer.eos_token_id) for response in SCRIPT}
    assert set(responses(rollouts)) == written
    assert report.mean_response_length == sum(map(len, responses(rollouts))) / 20
    assert rollouts.sampled_logprobs is None
    again = resample_responses(engine, rollouts, parameters, seed=3)
    assert torch.equal(again.input_ids, rollouts.input_ids)


def test_a_config_names_its_engine(scripted, config, tmp_path):
    done = invoke("run", config, "generation.engine=scripted")
    assert done.exit_code == 0, done.output
    for batch, size in (("update", 16), ("evaluation", 24)):
        found = responses(Rollouts.from_parquet(tmp_path / "out" / f"{batch}.parquet"))
        assert len(found) == size
        assert {response[:-1] for response in found} == {response[:-1] for response in SCRIPT}
    assert "engine: scripted" in (tmp_path / "out" / "config.yaml").read_text()
