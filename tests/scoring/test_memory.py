"""How many tokens fit: by the width of all layers, the type of the weights and the memory there is."""

import pytest
import torch
from torch import nn

from entropy_probe.demo.policy import build_model
from entropy_probe.scoring import memory as module
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.memory import fitting_tokens


class Experts(nn.Module):
    """A layer whose weights are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 30, 20))


def layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    """1,000 inputs and outputs per token."""
    quantised = nn.Linear(400, 450)
    quantised.weight = nn.Parameter(torch.zeros(90000, 1))
    return nn.Sequential(nn.Embedding(5000, 40), quantised, nn.LayerNorm(40), Experts(), nn.Linear(60, 40)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "memory", "tokens"),
    [
        (torch.float32, 8 * 4000 * 1024, 1024),
        (torch.float32, 8 * 4000 * 1023, 512),
        (torch.float32, 8 * 4000 * 2047, 1024),
        (torch.bfloat16, 8 * 4000 * 1024, 2048),
        (torch.float32, 2**60, 8192),
        (torch.float32, 1, 256),
    ],
)
def test_as_many_as_an_eighth_of_the_memory_holds(monkeypatch, dtype, memory, tokens):
    monkeypatch.setattr(module, "_memory", lambda device: memory)
    assert fitting_tokens(layers(dtype)) == tokens
    assert Scorer(layers(dtype), 1.0, None).max_tokens == tokens
    assert Scorer(layers(dtype), 1.0, 100).max_tokens == 100


def test_the_memory_is_that_of_the_container(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(module, "CGROUP_LIMIT", limit)
    machine = module._memory(torch.device("cpu"))
    assert 2**20 < machine < 2**60
    for text, expected in (("max\n", machine), (f"{2**20}\n", 2**20), (f"{2**60}\n", machine)):
        limit.write_text(text)
        assert module._memory(torch.device("cpu")) == expected


def test_small_policies_take_the_most():
    assert fitting_tokens(build_model()) == 8192
