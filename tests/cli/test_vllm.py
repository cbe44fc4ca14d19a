"""vLLM's own server on the CPU, with a generation config that would shape the samples; run by ``make test-vllm``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import urllib3
import yaml

from entropy_probe import ProbeResult
from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.sampling import SamplingParameters, ServerEngine, generate_responses
from entropy_probe.sampling.decoding import ModelCall, plain_logprobs
from entropy_probe.sampling.engine import ServerSettings
from tests.cli.conftest import invoke
from tests.tiny import train_grpo

pytestmark = [pytest.mark.vllm, pytest.mark.unchecked]

HEADS_OF_64 = {"hidden_size": 128, "num_heads": 2, "num_key_value_heads": 1}
"""The CPU's kernels take heads of 32 numbers and more."""
FLAGS = "--dtype float32 --enforce-eager --max-model-len 256 --logprobs-mode processed_logprobs --enable-lora"
PROMPTS = [[3, 13, 4, 14], [5, 13, 2, 14], [9, 13, 9, 14]] * 8
SEEDS = [2**62 + k for k in range(24)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("vllm")
    checkpoint = train_grpo(directory, lora=True, steps=2, save_steps=2, policy=HEADS_OF_64)
    generation = directory / "base" / "generation_config.json"
    generation.write_text(
        json.dumps(json.loads(generation.read_text()) | {"do_sample": True, "top_k": 3, "top_p": 0.5})
    )
    return checkpoint


@pytest.fixture(scope="module")
def url(checkpoint, tmp_path_factory) -> Iterator[str]:
    """Where the server listens, with the base model under the name ``base``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "server.log"
    command = [os.environ["VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", *FLAGS.split()]
    command += ["--model", str(checkpoint.parent / "base"), "--served-model-name", "base", "--port", str(port)]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": "", **environment}
        ) as server,
    ):
        try:
            ready = urllib3.Retry(300, backoff_factor=1, backoff_max=2)
            urllib3.request("GET", f"http://127.0.0.1:{port}/health", retries=ready)
            assert server.poll() is None, log.read_text()[-3000:]
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def engine(url: str, at_once: int = 24, **settings) -> ServerEngine:
    return ServerEngine(ServerSettings(url=url, **settings), [1], at_once)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_responses_are_the_policys_and_depend_on_their_seed_alone(url, checkpoint, temperature):
    parameters = SamplingParameters(temperature, 16)
    together, alone = (
        generate_responses(engine(url, n, adapter=checkpoint), PROMPTS, range(24), parameters, SEEDS) for n in (24, 1)
    )
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert len({c.token_ids for c in together}) > 20
    call = ModelCall(load_checkpoint(checkpoint).model)
    for c in together:
        plain, _ = plain_logprobs(call, c.prompt_token_ids, c.token_ids, temperature, 99)
        torch.testing.assert_close(torch.tensor(c.logprobs), plain, rtol=1e-4, atol=1e-4)


@pytest.fixture
def config(checkpoint, url, tmp_path) -> Path:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"{a}+{b}="}) for a in range(10) for b in range(5)))
    settings = {
        "checkpoint": str(checkpoint),
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "prompts": {"jsonl": str(prompts)},
        "reward": "tests.cli.rewards:odd_characters",
        "generation": {"engine": "vllm", "server": {"url": url, "adapter": str(checkpoint)}},
        "update": {"num_prompts": 8, "group_size": 4},
        "evaluation": {"total_sequences": 512},
        "probe": {"max_completion_length": 8},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_run_with_the_adapter(config, tmp_path):
    done = invoke("run", config)
    assert done.exit_code == 0, done.output
    said = ProbeResult.load(tmp_path / "out").diagnostics
    assert (said.policy_fit.update.status, said.policy_fit.evaluation.status) == ("ok", "ok")
    assert max(said.mismatch.max, said.update_mismatch.max) < 1e-3


def test_a_run_with_the_base_model_is_refused(config, refused, tmp_path):
    none, base = "generation.server.adapter=null", ("generation.server.model=base", "probe.max_mismatch=1e-3")
    assert "on_mismatch refuse" in refused("run", config, none, *base)  # two steps of training are near it
    elsewhere = ("--output-dir", tmp_path / "elsewhere", none)
    assert "expected the adapter that is probed" in refused("run", config, *elsewhere)
    other = (*elsewhere, "--overwrite", "generation.server.model=b")
    assert "expected model 'b', got 'base'" in refused("run", config, *other)


def test_an_adapter_that_is_none_is_refused(url, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"load_lora_adapter, got status \d+: .*--enable-lora"):
        generate_responses(engine(url, adapter=tmp_path), PROMPTS, range(24), SamplingParameters(1.0, 4), SEEDS)
