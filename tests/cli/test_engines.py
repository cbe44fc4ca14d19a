"""The seam of sampling engines, by one more member: registered here, named in a config, in no file of the package."""

from __future__ import annotations

import threading

import pytest
import torch

from entropy_probe import ProbeResult, Rollouts
from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.sampling import (
    ENGINES,
    Completion,
    Engine,
    EvaluationSettings,
    GenerationSettings,
    HFGenerator,
    SamplingParameters,
    load_prompts,
    resample_responses,
    sample_evaluation,
)
from tests.cli.conftest import invoke
from tests.scripted_server import NAME, ScriptedServer, draws_of, serving

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


def asking(server: ScriptedServer) -> tuple[str, ...]:
    where = (f"generation.server.url={server.url}/v1", f"generation.server.model={NAME}")
    return ("generation.engine=vllm", "generation.batch_size=4", *where)


def test_a_server_samples_the_batches_of_a_run(trained, config, tmp_path, monkeypatch):
    state = load_checkpoint(trained.checkpoint)
    monkeypatch.setenv("A_KEY", "sk-secret")
    with serving(draws_of(HFGenerator(state.model, state.tokenizer, 1))) as server:
        server.key = "sk-secret"
        done = invoke("run", config, *asking(server), "generation.server.api_key_env=A_KEY")
        assert done.exit_code == 0, done.output
        assert "sk-secret" not in done.output
        assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"sk-secret" in file.read_bytes()]
        count = len(server.requests)
    elsewhere = invoke("run", config, *asking(server), "generation.server.url=http://127.0.0.1:1")
    assert elsewhere.exit_code == 0, elsewhere.output  # where the server listens makes no other run
    assert "on_mismatch: refuse" in (tmp_path / "out" / "config.yaml").read_text()
    assert count == 12 + 16 + 24  # the first to try it
    done = invoke("run", config, f"output_dir={tmp_path / 'hf'}")
    assert done.exit_code == 0, done.output
    asked, own = (ProbeResult.load(tmp_path / name) for name in ("out", "hf"))
    assert asked.predicted.value == pytest.approx(own.predicted.value, rel=1e-4)
    for batch in ("update", "evaluation"):
        files = (tmp_path / name / f"{batch}.parquet" for name in ("out", "hf"))
        a, b = map(Rollouts.from_parquet, files)
        assert torch.equal(a.input_ids, b.input_ids)


@pytest.mark.parametrize("reported", ["of all tokens", pytest.param("of those left", marks=pytest.mark.slow)])
def test_a_server_that_samples_a_part_of_the_distribution_is_refused(trained, config, refused, reported):
    """As one whose model has a top_k in its generation config would, if requests did not state theirs."""
    state, lock = load_checkpoint(trained.checkpoint), threading.Lock()

    @torch.no_grad()
    def draw(prompt, parameters, seed) -> Completion:
        ids, logprobs, random = list(prompt), [], torch.Generator().manual_seed(seed)
        while len(logprobs) < parameters.max_completion_length and ids[-1] != 1:
            with lock:
                logits = state.model(torch.tensor([ids])).logits[0, -1] / parameters.temperature
            shaped = logits.masked_fill(logits < logits.topk(3).values[-1], -torch.inf)
            token = int(shaped.softmax(-1).multinomial(1, generator=random))
            said = logits if reported == "of all tokens" else shaped
            ids.append(token)
            logprobs.append(float(said.log_softmax(-1)[token]))
        return Completion(prompt, tuple(ids[len(prompt) :]), ids[-1] != 1, tuple(logprobs))

    with serving(draw) as server:
        said = refused("run", config, *asking(server))
    assert "the responses do not fit the policy: surprisal minus entropy is -" in said
    assert "on_mismatch refuse" in said
