"""A value model or head that one optimizer stepped beside the policy: its entries are set aside, and counted."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from entropy_probe.checkpoints import CheckpointError, MappingError, load_checkpoint
from entropy_probe.checkpoints.record import record_checkpoint
from entropy_probe.demo.policy import build_model


class Both(nn.Module):
    """As TRL's ``PolicyAndValueWrapper``: the policy, and a model of the same kind with one output."""

    def __init__(self, policy: nn.Module, *, value_first: bool = False) -> None:
        super().__init__()
        model = build_model(seed=1)
        model.lm_head = nn.Linear(64, 1, bias=False)
        parts = {"policy": policy, "value_model": model}
        for name in sorted(parts, reverse=value_first):
            self.add_module(name, parts[name])


class Head(nn.Module):
    """As TRL's ``AutoModelForCausalLMWithValueHead``."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.pretrained_model = policy
        self.v_head = nn.ModuleDict({"summary": nn.Linear(64, 1)})


def groups(model: nn.Module) -> list[dict]:
    """The Trainer's two."""
    named = dict(model.named_parameters())
    rest = {n for n in named if "bias" in n or "norm" in n}
    return [
        {"params": [p for n, p in named.items() if n not in rest], "weight_decay": 0.01},
        {"params": [p for n, p in named.items() if n in rest], "weight_decay": 0.0},
    ]


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    random = torch.Generator().manual_seed(3)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()


def saved(tmp_path, wrap, arrange=groups):
    """The policy's checkpoint after two steps of everything, its moments by name, and the number of other entries."""
    policy = build_model()
    model = wrap(policy)
    optimizer = torch.optim.AdamW(arrange(model), lr=1e-3)
    stepped(model, optimizer)
    policy.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    moments = {name: optimizer.state[p]["exp_avg"] for name, p in policy.named_parameters()}
    return moments, sum(1 for _ in model.parameters()) - len(moments)


def check(state, moments, others):
    parameters = dict(state.model.named_parameters())
    assert all(torch.equal(state.optimizer.state[parameters[name]]["exp_avg"], m) for name, m in moments.items())
    assert f"; {others} entries of another model are set aside" in state.report.optimizer_state.mapping


@pytest.mark.parametrize("value_first", [False, True])
def test_the_entries_of_a_value_model_are_set_aside(tmp_path, value_first):
    moments, others = saved(tmp_path, lambda policy: Both(policy, value_first=value_first))
    with pytest.raises(MappingError, match=r"27 entries more than the 27 .*pass policy"):
        load_checkpoint(tmp_path)
    check(load_checkpoint(tmp_path, policy="policy"), moments, others)


def test_a_manifest_is_recorded_of_the_policy_alone(tmp_path):
    moments, others = saved(tmp_path, Both)
    record_checkpoint(tmp_path, written_by="test", policy="policy")
    check(load_checkpoint(tmp_path, policy="policy"), moments, others)
    with pytest.raises(MappingError, match="or pass the policy where the manifest was recorded with one"):
        load_checkpoint(tmp_path)


def test_so_are_those_in_one_group(tmp_path):
    moments, others = saved(tmp_path, Both, lambda model: list(model.parameters()))
    check(load_checkpoint(tmp_path, policy="policy"), moments, others)


def test_a_value_head_in_the_same_file_is_set_aside(tmp_path):
    moments, others = saved(tmp_path, Head)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file) | {"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.ones(1)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"a value head \(v_head.summary.bias\) beside the policy.*pass policy"):
        load_checkpoint(tmp_path)
    check(load_checkpoint(tmp_path, policy="pretrained_model"), moments, others)


def test_names_tell_by_themselves(tmp_path):
    moments, others = saved(tmp_path, Both, lambda model: list(model.named_parameters()))
    check(load_checkpoint(tmp_path), moments, others)
    check(load_checkpoint(tmp_path, policy="policy"), moments, others)
    with pytest.raises(MappingError, match=r"expected entries named actor\.lm_head.* got policy, value_model"):
        load_checkpoint(tmp_path, policy="actor")


def test_two_policies_of_the_same_shapes_are_not_told_apart(tmp_path):
    class Twins(nn.Module):
        def __init__(self, policy: nn.Module) -> None:
            super().__init__()
            self.policy, self.reference = policy, build_model(seed=1)

    saved(tmp_path, Twins)
    with pytest.raises(MappingError, match=r"policy: expected its 27 parameters as the first or .*got 2 ways"):
        load_checkpoint(tmp_path, policy="policy")
