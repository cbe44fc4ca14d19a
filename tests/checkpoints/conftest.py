"""Copies of the runs of ``tests/trained.py`` that a test may damage, and ways to damage them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SAYS_DECOUPLED = "decoupled_weight_decay" in torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
UNDECIDED = () if SAYS_DECOUPLED else (
    "the file does not say whether weight decay is decoupled; taken as AdamW, the Trainer's",
)  # fmt: skip
"""The one doubt about every AdamW checkpoint that torch 2.6 wrote."""
NO_OTHER_DOUBTS = ("suspicious" if UNDECIDED else "healthy", UNDECIDED)


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


def parameter_names(state) -> list[str]:
    """Of the optimizer's parameters, in the order of its groups."""
    name = {id(p): n for n, p in state.model.named_parameters()}
    return [name[id(p)] for group in state.optimizer.param_groups for p in group["params"]]


def first_moments(state) -> dict[str, torch.Tensor]:
    name = {id(p): n for n, p in state.model.named_parameters()}
    return {name[id(p)]: entry["exp_avg"] for p, entry in state.optimizer.state.items()}


def assert_same(found, expected) -> None:
    """The same weights and first moments, by name and to the bit."""
    weights, wanted = found.model.state_dict(), expected.model.state_dict()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    moments, wanted = first_moments(found), first_moments(expected)
    assert moments.keys() == wanted.keys()
    assert all(torch.equal(moments[name], wanted[name]) for name in wanted)
