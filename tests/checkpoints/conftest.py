"""Real TRL runs, trained once per session: LoRA, full weights, and full weights with tied embeddings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import train_grpo

RUNS: dict[str, dict[str, Any]] = {
    "lora": {"lora": True},
    "full": {"lora": False, "lr_scheduler_type": "linear"},
    "tied": {"lora": False, "tie_word_embeddings": True},
    "fused": {"lora": False, "optim": "adamw_torch_fused"},
}


@dataclass(frozen=True)
class Run:
    """Checkpoints 1 to 4 of a run and the clipped gradients of each step."""

    directory: Path
    gradients: dict[int, dict[str, torch.Tensor]]

    def checkpoint(self, step: int) -> Path:
        return self.directory / f"checkpoint-{step}"


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Callable[[str], Run]:
    trained: dict[str, Run] = {}

    def get(name: str) -> Run:
        if name not in trained:
            directory, gradients = tmp_path_factory.mktemp(name), {}
            train_grpo(directory, steps=4, capture=gradients, weight_decay=0.1, **RUNS[name])
            trained[name] = Run(directory, gradients)
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
