"""Real TRL runs, trained once per session: adapters of several kinds, full weights, several kernels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_probe.checkpoints import CheckpointState, load_checkpoint
from tests.tiny import train_grpo

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


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Callable[[str], Run]:
    trained: dict[str, Run] = {}

    def get(name: str) -> Run:
        if name not in trained:
            directory, gradients = tmp_path_factory.mktemp(name), {}
            train_grpo(directory, steps=4, capture=gradients, weight_decay=0.1, **(RUNS | OTHER_RUNS)[name])
            needed = NEEDED.get(name, {})
            if "base_model" in needed:
                needed = {"base_model": str(directory / needed["base_model"])}
            trained[name] = Run(directory, gradients, needed)
        return trained[name]

    return get


@pytest.fixture
def copy_of(runs, tmp_path) -> Callable[..., Path]:
    """A copy of a checkpoint that a test may damage."""

    def copy(name: str, step: int = 2) -> Path:
        return Path(shutil.copytree(runs(name).checkpoint(step), tmp_path / f"{name}-{step}"))

    return copy


def edit_optimizer(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite ``optimizer.pt`` after ``change`` edited it in place."""
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    change(saved)
    torch.save(saved, checkpoint / "optimizer.pt")


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite a safetensors file after ``change`` edited its tensors in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    change(tensors)
    save_file({name: x.clone() for name, x in tensors.items()}, file, metadata={"format": "pt"})
