"""What accelerate saves is read: its optimizer by number and by name, and the weights that FSDP gathered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from entropy_probe.checkpoints import CheckpointError, inspect_checkpoint, load_checkpoint
from tests.checkpoints.conftest import edit_optimizer


def parameter_names(state) -> list[str]:
    """Of the optimizer's parameters, in the order of its groups."""
    name = {id(p): n for n, p in state.model.named_parameters()}
    return [name[id(p)] for group in state.optimizer.param_groups for p in group["params"]]


def first_moments(state) -> dict[str, torch.Tensor]:
    name = {id(p): n for n, p in state.model.named_parameters()}
    return {name[id(p)]: entry["exp_avg"] for p, entry in state.optimizer.state.items()}


def assert_same(found, expected) -> None:
    weights, wanted = found.model.state_dict(), expected.model.state_dict()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    moments, wanted = first_moments(found), first_moments(expected)
    assert moments.keys() == wanted.keys()
    assert all(torch.equal(moments[name], wanted[name]) for name in wanted)


def gathered(checkpoint: Path, original) -> Path:
    """As FSDP with ``FULL_STATE_DICT``: everything by name, in two files of ``torch.save``."""
    names = parameter_names(original)

    def rename(saved: dict[str, Any]) -> None:
        saved["state"] = {names[i]: entry for i, entry in saved["state"].items()}
        for group in saved["param_groups"]:
            group["params"] = [names[i] for i in group["params"]]

    edit_optimizer(checkpoint, rename)
    (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer.bin")
    weights = checkpoint / "model.safetensors"
    torch.save(load_file(weights), checkpoint / "pytorch_model_fsdp.bin")
    weights.unlink()
    return checkpoint


def test_the_state_of_save_state_is_by_number(copy_of, runs):
    checkpoint = copy_of("full")
    (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer.bin")
    assert_same(load_checkpoint(checkpoint), runs("full").load(2))


def test_the_state_that_fsdp_gathers_is_by_name(copy_of, runs):
    original = runs("full").load(2)
    found = load_checkpoint(gathered(copy_of("full"), original))
    assert_same(found, original)
    assert found.report.optimizer_state.mapping == f"names ({len(parameter_names(original))} tensors)"
    assert found.report.verdict == "healthy"


def test_safetensors_come_before_the_gathered_weights(copy_of, runs):
    checkpoint = copy_of("full")
    (checkpoint / "pytorch_model_fsdp.bin").write_bytes(b"not looked at")
    assert_same(load_checkpoint(checkpoint), runs("full").load(2))


class Payload:
    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        (Payload(), "expected tensors and plain values.*nothing in it was run; save the model's own state_dict"),
        ([torch.ones(2)], "expected dense tensors by name, got"),
        ({"model.norm.weight": 1.0}, "expected dense tensors by name, got"),
        ({"model.norm.weight": torch.ones(1).expand(64)}, "expected dense tensors by name, got"),
        ({}, "expected dense tensors by name, got"),
    ],
)
def test_weights_that_are_none_are_refused(copy_of, runs, content, refusal, capsys):
    checkpoint = gathered(copy_of("full"), runs("full").load(2))
    torch.save(content, checkpoint / "pytorch_model_fsdp.bin")
    with pytest.raises(CheckpointError, match=refusal):
        load_checkpoint(checkpoint)
    assert inspect_checkpoint(checkpoint).verdict == "unusable"
    assert "it ran" not in capsys.readouterr().out


def test_a_flipped_bit_in_the_weights_is_seen(copy_of, runs):
    file = gathered(copy_of("full"), runs("full").load(2)) / "pytorch_model_fsdp.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="got a wrong checksum"):
        load_checkpoint(file.parent)
