"""Checkpoints that many tests read, trained once: fixtures of the whole session, shared by its processes.

A test that damages one does so to a copy.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from entropy_probe.checkpoints import CheckpointState, load_checkpoint
from tests.checkpoints.sharded_run import one_rank
from tests.processes import Process, run_all
from tests.tiny import train_grpo

__all__ = ["LOW_RUNS", "OTHER_RUNS", "RUNS", "Run", "Trained", "made_once", "runs", "sharded", "trained"]
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"lora": True},
    "full": {"lora": False, "lr_scheduler_type": "linear"},
    "tied": {"lora": False, "tie_word_embeddings": True},
    "fused": {"lora": False, "optim": "adamw_torch_fused"},
    "foreach": {"lora": True, "optimizer": {"foreach": True}},
    "amsgrad": {"lora": True, "optimizer": {"amsgrad": True}},
    "two rates": {"lora": False, "optimizer": {"lr": (1e-3, 3e-4)}},
    "frozen subset": {"lora": False, "prepare": "frozen"},
    "two adapters": {"lora": False, "prepare": "adapters"},
    "trl reference": {"lora": False, "prepare": "adapter", "beta": 0.1},
    "dora": {"lora": True, "adapter": {"use_dora": True}},
    "rslora": {"lora": True, "adapter": {"use_rslora": True}},
    "modules_to_save": {"lora": True, "adapter": {"modules_to_save": ["embed_tokens", "lm_head"]}},
    "biases": {"lora": True, "adapter": {"bias": "lora_only"}},
}
OTHER_RUNS: dict[str, dict[str, Any]] = {
    "adafactor": {"lora": False, "optim": "adafactor"},
    "sgd": {"lora": False, "optim": "sgd", "learning_rate": 0.1},
    "rmsprop": {"lora": True, "optim": "rmsprop"},
    "adagrad": {"lora": True, "optim": "adagrad"},
}
"""The same with optimizers whose step is taken on a copy."""
LOW_RUNS: dict[str, dict[str, Any]] = {
    "bfloat16": {"lora": False, "prepare": "bfloat16"},
    "bfloat16, fused": {"lora": False, "prepare": "bfloat16", "optim": "adamw_torch_fused"},
    "bfloat16, foreach": {"lora": False, "prepare": "bfloat16", "optimizer": {"foreach": True}},
    "bfloat16, sgd": {"lora": False, "prepare": "bfloat16", "optim": "sgd", "learning_rate": 0.1},
    "bfloat16, adafactor": {"lora": False, "prepare": "bfloat16", "optim": "adafactor"},
}
"""Weights and, but for Adafactor, state in bfloat16."""
NEEDED: dict[str, dict[str, str]] = {"frozen subset": {"base_model": "base"}, "two adapters": {"adapter": "policy"}}
"""What these runs' directories do not say, to be passed when they are loaded."""


@dataclass(frozen=True)
class Run:
    """Checkpoints 1 to 4 of a run and the clipped gradients of each step."""

    directory: Path
    gradients: dict[int, dict[str, torch.Tensor]]

    needed: dict[str, str] = field(default_factory=dict)

    def checkpoint(self, step: int) -> Path:
        return self.directory / f"checkpoint-{step}"

    def load(self, step: int, **arguments: Any) -> CheckpointState:
        return load_checkpoint(self.checkpoint(step), **(self.needed | arguments))


@dataclass(frozen=True)
class Trained:
    """A run's directory (``base/``, ``checkpoint-2/``) and a JSONL file of prompts."""

    directory: Path
    checkpoint: Path
    prompts: Path


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Any]], Path]:
    """A directory by name, filled by the first of the session's processes that asks for it while others wait."""
    temporary = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        temporary = temporary.parent
    place = temporary / "made-once"
    place.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], Any]) -> Path:
        directory, finished = place / name, place / f"{name}.finished"
        with (place / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not finished.exists():
                shutil.rmtree(directory, ignore_errors=True)  # of a process that failed half-way
                directory.mkdir()
                make(directory)
                finished.touch()
        return directory

    return made


@pytest.fixture(scope="session")
def runs(made_once) -> Callable[[str], Run]:
    """A run of ``RUNS``, ``OTHER_RUNS`` or ``LOW_RUNS`` by name."""

    def train(name: str, directory: Path) -> None:
        gradients: dict[int, dict[str, torch.Tensor]] = {}
        train_grpo(directory, steps=4, capture=gradients, weight_decay=0.1, **(RUNS | OTHER_RUNS | LOW_RUNS)[name])
        torch.save(gradients, directory / "gradients.pt")

    @cache
    def get(name: str) -> Run:
        directory = made_once(name, partial(train, name))
        if name == "biases":
            saved = load_file(directory / "checkpoint-2" / "adapter_model.safetensors")
            if not any(key.endswith("bias") for key in saved):
                pytest.skip("this peft does not save the trained biases; test_layout has the refusal")
        needed = NEEDED.get(name, {})
        if "base_model" in needed:
            needed = {"base_model": str(directory / needed["base_model"])}
        return Run(directory, torch.load(directory / "gradients.pt", weights_only=True), needed)

    return get


@pytest.fixture(scope="session")
def trained(made_once) -> Trained:
    """Two steps with LoRA, and prompts to probe their checkpoint with."""

    def make(directory: Path) -> None:
        train_grpo(directory, lora=True, steps=2, save_steps=2)
        lines = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a in range(10) for b in range(5)]
        (directory / "prompts.jsonl").write_text("\n".join(lines))

    directory = made_once("trained", make)
    return Trained(directory, directory / "checkpoint-2", directory / "prompts.jsonl")


@pytest.fixture(scope="session")
def sharded(made_once) -> Path:
    """The directory of ``tests/checkpoints/sharded_run.py``."""

    return made_once("sharded", lambda directory: run_all(*(Process(one_rank, directory, rank) for rank in (0, 1))))
