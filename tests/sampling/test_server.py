"""The engine that asks a server: the policy's own samples, and one line for whatever a server does otherwise."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.scripted_server import NAME, Draw, ScriptedServer, draws_of, serving

from entropy_probe.demo.policy import build_model, build_tokenizer
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.sampling import (
    ENGINES,
    Engine,
    EvaluationSettings,
    GenerationSettings,
    HFGenerator,
    Prompt,
    SamplingParameters,
    ServerEngine,
    generate_responses,
    sample_evaluation_file,
)
from entropy_probe.sampling import server as module
from entropy_probe.sampling.engine import ServerSettings

# before Python 3.12 the check of a protocol asks for its properties, and with them the server
pytestmark = pytest.mark.unchecked

PROMPTS = [[2, 3, 4], [2], [3, 3], [4, 2, 2, 3]] * 3
SEEDS = [7 * k + 2**62 for k in range(12)]
PARAMETERS = SamplingParameters(1.0, 8)


@pytest.fixture(scope="module")
def policy() -> HFGenerator:
    """Of five tokens, one sequence at a time, so that equal seeds give equal numbers to the last digit."""
    model = build_model(vocab_size=5, hidden_size=16, num_layers=1, initializer_range=0.3, seed=2)
    return HFGenerator(model, build_tokenizer(), 1)


@pytest.fixture(scope="module")
def draw(policy) -> Draw:
    return draws_of(policy)


@pytest.fixture
def script(draw, monkeypatch) -> Iterator[ScriptedServer]:
    monkeypatch.setattr(module, "BACKOFF", 0.0)
    with serving(draw) as script:
        yield script


def engine(script: ScriptedServer, at_once: int = 4, **settings: Any) -> ServerEngine:
    return ServerEngine(ServerSettings(url=script.url, **settings), [1], at_once)


def sample(engine: Engine, parameters: SamplingParameters = PARAMETERS):
    return generate_responses(engine, PROMPTS, range(len(PROMPTS)), parameters, SEEDS)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_server_samples_what_the_policy_would(script, policy, temperature):
    parameters, done = SamplingParameters(temperature, 8), []
    asked = engine(script)
    assert isinstance(asked, Engine)
    drawn = asked.generate(PROMPTS, parameters, SEEDS, lambda *progress: done.append(progress))
    assert drawn == sample(policy, parameters)
    assert {c.truncated for c in drawn} == {True, False}
    assert done == [(k, 12) for k in range(1, 13)]
    assert asked.context_length == 256
    count = len(script.requests)
    asked.generate(PROMPTS, parameters, SEEDS)
    assert len(script.requests) == count + 12  # the server is tried once


def test_nothing_is_left_to_the_servers_defaults(script):
    sample(engine(script))
    stated = {"model": NAME, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "stop_token_ids": [1], "return_token_ids": True}
    stated |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1}
    assert all(request | stated == request for request in script.requests)
    assert {request["seed"] for request in script.requests} >= set(SEEDS)


def of_choice(**changes: Any) -> Callable[[dict, dict], dict]:
    """An answer with some of its choice's fields changed or, with None, left out."""

    def change(request: dict, answer: dict) -> dict:
        choice = {**answer["choices"][0], **changes}
        return answer | {"choices": [{key: x for key, x in choice.items() if x is not None}]}

    return change


def extended(request: dict, answer: dict) -> dict:
    (choice,) = answer["choices"]
    logprobs = {"token_logprobs": [-1.0, *choice["logprobs"]["token_logprobs"]][: request["max_tokens"]]}
    return of_choice(token_ids=[1, *choice["token_ids"]][: request["max_tokens"]], logprobs=logprobs)(request, answer)


FAULTS = {
    "no choice": (lambda r, a: a | {"choices": []}, r"choices: list should have at least 1 item"),
    "two choices": (lambda r, a: a | {"choices": a["choices"] * 2}, r"choices: list should have at most 1 item"),
    "no log-probabilities": (of_choice(logprobs=None), r"choices\.0\.logprobs: field required"),
    "an empty answer": (lambda r, a: {}, r"model: field required"),
    "no object": (lambda r, a: [a], r"an answer as vLLM gives it, got one with input should be an object"),
    "null in log-probabilities": (
        of_choice(logprobs={"token_logprobs": [None] * 8}),
        r"choices\.0\.logprobs\.token_logprobs\.0: input should be a valid number",
    ),
    "text for log-probabilities": (of_choice(logprobs={"token_logprobs": ["-1"]}), r"should be a valid number"),
    "fewer log-probabilities": (of_choice(logprobs={"token_logprobs": []}), r"a log-probability for each of \d"),
    "infinite": (
        lambda r, a: of_choice(logprobs={"token_logprobs": [-float("inf")] * len(a["choices"][0]["token_ids"])})(r, a),
        r"expected finite log-probabilities",
    ),
    "probabilities": (of_choice(logprobs={"token_logprobs": [0.4]}), r"log-probabilities of at most 0, got 0\.4"),
    "no ids": (of_choice(token_ids=None), r"choices\.0\.token_ids: field required; use a server of vLLM, or trl"),
    "no token": (of_choice(token_ids=[]), r"token_ids: list should have at least 1 item"),
    "another prompt": (of_choice(prompt_token_ids=[0, 2]), r"prompt 0: expected the completion to repeat its prompt"),
    "another model": (lambda r, a: a | {"model": "other"}, r"an answer of model 'policy', got one of 'other'"),
    "aborted": (of_choice(finish_reason="abort"), r"finish_reason: input should be 'stop' or 'length'"),
    "ends with another token": (
        of_choice(token_ids=[3], logprobs={"token_logprobs": [-1.0]}),
        r"end with token 1 or after 8 tokens, got one that ends with token 3 after 1 \(.*--generation-config vllm",
    ),
    "goes on after the end": (extended, r"end with the policy's end token 1, got one that goes on after it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_server_answers_is_checked(script, fault):
    script.after, match = FAULTS[fault]
    with pytest.raises(ValueError, match=match) as caught:
        sample(engine(script))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith((f"generation.server {script.url}: expected ", "ServerEngine: prompt 0: "))


@pytest.mark.parametrize(
    ("seed", "match"),
    [
        (lambda seed, count: 10**6 * count, "equal tokens for an equal seed, got others for"),
        (lambda seed, count: 8, "other tokens for other seeds, got the same"),
    ],
)
def test_a_server_that_ignores_the_seed_is_refused(script, seed, match):
    script.before = lambda request: request | {"seed": seed(request["seed"], len(script.requests))}
    with pytest.raises(ValueError, match=match):
        sample(engine(script))


def test_a_policy_without_a_choice_gives_any_seed_the_same(script):
    """At this temperature it has one response to a prompt, so equal tokens say nothing of seeds."""
    parameters = SamplingParameters(0.002, 8)
    script.before = lambda request: request | {"seed": 5}
    assert len({c.token_ids for c in sample(engine(script), parameters)}) <= 4


def before_temperature(request: dict, answer: dict) -> dict:
    (choice,) = answer["choices"]
    tops = [{"likeliest": -0.5} for _ in choice["token_ids"]]
    return of_choice(logprobs=choice["logprobs"] | {"top_logprobs": tops})(request, answer)


def test_log_probabilities_before_the_temperature_are_refused(script):
    script.after = before_temperature
    assert len(sample(engine(script))) == 12  # the same at temperature 1
    with pytest.raises(ValueError, match=r"at temperature 0\.7, got those at 1; .*--logprobs-mode processed_logprobs"):
        sample(engine(script), SamplingParameters(0.7, 8))


def failing(script: ScriptedServer, times: int, status: int, route: str = "/v1/completions") -> list[str]:
    """Refuse the first requests to a route; all that were asked."""
    routes: list[str] = []

    def instead(asked: str):
        routes.append(asked)
        return (status, b"overloaded\nnow") if routes.count(route) <= times and asked == route else None

    script.instead = instead
    return routes


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again(script, policy, status):
    routes = failing(script, 3, status)
    assert sample(engine(script)) == sample(policy)
    assert routes.count("/v1/completions") == 3 + 12 + 12


@pytest.mark.parametrize(
    ("status", "tries", "match"),
    [
        (503, 3, r"an answer to /v1/completions, got none in 3 tries \(ResponseError: too many 503 error responses\)"),
        (500, 1, r"an answer to /v1/completions, got status 500: overloaded now; see the server's log"),
        (401, 1, r"got status 401"),
        (307, 1, r"got status 307"),
    ],
)
def test_a_server_that_does_not_answer_is_one_line(script, status, tries, match):
    routes = failing(script, 10**6, status)
    with pytest.raises(ValueError, match=match) as caught:
        sample(engine(script, at_once=1, retries=2))
    assert "\n" not in str(caught.value)
    assert routes.count("/v1/completions") in (tries, 2 * tries)  # the next may be on its way


def test_a_key_comes_from_the_environment(script, policy, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-right")
    script.key = "sk-right"
    assert sample(engine(script, api_key_env="A_KEY")) == sample(policy)
    with pytest.raises(ValueError, match=r"status 401: .*; set generation\.server\.api_key_env to the environment"):
        sample(engine(script))


@pytest.mark.parametrize("key", ["sk-wrong", "sk-wrong" + 400 * "x"])
def test_no_message_has_the_key(script, monkeypatch, key):
    """Not even where the server gives it back, or its answer is cut off within it."""
    monkeypatch.setenv("A_KEY", key)
    script.key = "sk-right"
    with pytest.raises(ValueError, match=r"Incorrect API key provided: Bearer \(the key\)") as caught:
        sample(engine(script, api_key_env="A_KEY"))
    assert "sk-wrong" not in str(caught.value)


@pytest.mark.parametrize("held", [None, "", "two words", "line\n", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_one_line_without_it(script, monkeypatch, held):
    monkeypatch.delenv("A_KEY", raising=False)
    if held is not None:
        monkeypatch.setenv("A_KEY", held)
    got = "one with spaces" if held else "none"
    with pytest.raises(ValueError, match=rf"the server's key in the environment variable A_KEY, got {got}") as caught:
        engine(script, api_key_env="A_KEY")
    assert not held or held not in str(caught.value)
    assert script.requests == []


@pytest.mark.parametrize("given", ["sk-live-123", "sk_live_abc", 123456, ["sk-abc"], "A KEY"])
def test_a_key_in_the_place_of_a_variables_name_is_not_shown(given):
    with pytest.raises(ValidationError, match=r"name of an environment variable .*, got something else") as caught:
        GenerationSettings(server={"url": "http://localhost:8000", "api_key_env": given})
    assert str(given) not in str(caught.value)


def test_a_body_that_breaks_off_is_asked_for_again(script, policy):
    script.short = {3: 40, 9: 1}
    assert sample(engine(script, at_once=1)) == sample(policy)
    assert len(script.requests) == 12 + 12 + 2
    script.short = dict.fromkeys(range(1000), 7)
    with pytest.raises(ValueError, match=r"got none in 2 tries \((ProtocolError|IncompleteRead)"):
        sample(engine(script, retries=1))


def test_an_answer_that_is_not_whole_is_one_line(script):
    script.instead = lambda route: (200, b'{"model": "pol') if route == "/v1/completions" else None
    with pytest.raises(ValueError, match=r"got one with invalid JSON: EOF while parsing"):
        sample(engine(script))


def test_where_no_server_is_one_line(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    asked = ServerEngine(ServerSettings(url=url), [1])
    with pytest.raises(
        ValueError, match=r"an answer to /v1/models, got none in 4 tries \(NewConnectionError: .*refused"
    ):
        sample(asked)


def test_an_answer_is_not_waited_for_beyond_the_timeout(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = ServerSettings(url=f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.05, retries=1)
        with pytest.raises(ValueError, match=r"got none in 2 tries \(ReadTimeoutError"):
            sample(ServerEngine(settings, [1]))


def test_the_model_is_the_only_one_or_named(script):
    script.models.append({"id": "other", "parent": None, "max_model_len": 10})
    with pytest.raises(ValueError, match=r"expected one model, got 'policy', 'other'; set generation\.server\.model"):
        sample(engine(script))
    with pytest.raises(ValueError, match=r"expected model 'mine', got 'policy', 'other'"):
        sample(engine(script, model="mine"))
    assert engine(script, model="other").context_length == 10
    script.models = []
    with pytest.raises(ValueError, match=r"data: list should have at least 1 item"):
        sample(engine(script))


@pytest.fixture
def adapter(tmp_path) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"first")
    return tmp_path


def test_an_adapter_is_loaded_once_under_a_name_of_its_content(script, adapter):
    first = engine(script, adapter=adapter)
    sample(first)
    assert first.context_length == 256
    (loaded,) = script.loaded
    assert loaded == {"lora_name": loaded["lora_name"], "lora_path": str(adapter), "load_inplace": True}
    assert {request["model"] for request in script.requests} == {loaded["lora_name"]}
    sample(engine(script, adapter=adapter))
    assert script.loaded == [loaded]
    (adapter / "adapter_model.safetensors").write_bytes(b"second")
    sample(engine(script, adapter=adapter))
    assert len({body["lora_name"] for body in script.loaded}) == 2


def test_an_adapter_that_cannot_be_loaded_is_one_line(script, adapter):
    failing(script, 1, 404, "/v1/load_lora_adapter")
    with pytest.raises(
        ValueError, match=r"load_lora_adapter, got status 404: overloaded now; start it with --enable-lora"
    ):
        sample(engine(script, adapter=adapter))
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter: expected a directory with .* without adapter_config\.json"):
        engine(script, adapter=adapter)


def test_an_adapter_is_not_sampled_as_its_base(script, model, tokenizer):
    settings = GenerationSettings(engine="vllm", server=ServerSettings(url=script.url))
    assert len(sample(ENGINES["vllm"](model, tokenizer, settings, None))) == 12
    model.peft_config = {}
    with pytest.raises(ValueError, match=r"expected the adapter that is probed, got a server alone"):
        ENGINES["vllm"](model, tokenizer, settings, None)


def test_sampling_goes_on_with_the_shard_that_the_server_failed_in(script, policy, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("entropy_probe.sampling.evaluation.SHARD_SEQUENCES", 8)
    prompts = [Prompt(k, text) for k, text in enumerate(["0", "012", "11"])]

    def into(engine: Engine, directory: Path) -> Rollouts:
        directory.mkdir(exist_ok=True)
        draws = EvaluationSettings(total_sequences=24)
        file = directory / "evaluation.parquet"
        where = {"shards": directory / "shards", "policy": "p"}
        sample_evaluation_file(engine, tokenizer, prompts, draws, PARAMETERS, file, **where)
        return Rollouts.from_parquet(file)

    script.instead = lambda route: (500, b"out of memory") if len(script.requests) >= 12 + 10 else None
    with pytest.raises(ValueError, match="status 500: out of memory"):
        into(engine(script), tmp_path / "server")
    assert [file.name for file in (tmp_path / "server" / "shards").iterdir()] == ["shard-00000.parquet"]
    script.instead, before = lambda route: None, len(script.requests)
    resumed = into(engine(script), tmp_path / "server")
    assert len(script.requests) - before == 12 + 16
    expected = into(policy, tmp_path / "hf")
    assert torch.equal(resumed.input_ids, expected.input_ids)
    assert torch.equal(resumed.sampled_logprobs, expected.sampled_logprobs)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"engine": "vllm"}, "server: required by engine vllm, but missing"),
        ({"server": {"url": "http://localhost"}}, "server: expected engine vllm beside it, got hf"),
        *(
            ({"engine": "vllm", "server": {"url": url}}, r"the address of a server such as http://localhost:8000")
            for url in (
                "localhost:8000",
                "ftp://host",
                "http://",
                "http://a:b",
                "http://h?x=1",
                "file:///etc",
                "http://[",
            )
        ),
        ({"engine": "vllm", "server": {"url": "http://a:b@host"}}, "without name and password"),
        ({"engine": "vllm", "server": {"url": "http://host", "timeout": 0}}, "greater than 0"),
    ],
)
def test_settings_of_a_server_are_checked(settings, match):
    with pytest.raises(ValidationError, match=match):
        GenerationSettings.model_validate(settings)


def test_the_address_may_end_as_openai_clients_have_it():
    assert ServerSettings(url="https://host:1/api/v1/").url == "https://host:1/api"
