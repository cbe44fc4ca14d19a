"""What accelerate saves is read: its optimizer by number and by name, and the weights that FSDP gathered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from entropy_probe.checkpoints import CheckpointError, errors, inspect_checkpoint, load_checkpoint
from entropy_probe.steps.adamw import optimizer_parameters, shadow_step
from tests.checkpoints.conftest import assert_same, edit_json, edit_optimizer, parameter_names


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


def test_the_next_step_is_the_next_checkpoint_bitwise(copy_of, runs):
    run = runs("full")
    now, after = (load_checkpoint(gathered(copy_of("full", k), run.load(k))) for k in (2, 3))
    stepped = shadow_step(optimizer_parameters(now.model, now.optimizer), now.optimizer, run.gradients[3])
    expected = optimizer_parameters(after.model, after.optimizer)
    assert [n for n in stepped if not torch.equal(stepped[n], expected[n])] == []


def gathered_adapter(checkpoint: Path, original) -> Path:
    """As FSDP with ``FULL_STATE_DICT`` gathers an adapter; its configuration was put beside."""
    weights = checkpoint / "adapter_model.safetensors"
    tensors = {name.replace(".weight", ".default.weight"): x for name, x in load_file(weights).items()}
    weights.rename(checkpoint / "model.safetensors")
    gathered(checkpoint, original)
    torch.save(tensors, checkpoint / "pytorch_model_fsdp.bin")
    return checkpoint


def test_a_gathered_adapter_is_read(copy_of, runs):
    original = runs("lora").load(2)
    state = load_checkpoint(gathered_adapter(copy_of("lora"), original))
    assert_same(state, original)
    assert (state.report.kind, state.report.verdict) == ("lora", "healthy")


def test_a_gathered_adapter_needs_its_configuration(copy_of, runs):
    place = gathered_adapter(copy_of("lora"), runs("lora").load(2))
    (place / "adapter_config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"adapter_config\.json: expected the configuration .*r=4, lora_alpha=\.\.\."
    ):
        load_checkpoint(place)


def edit_gathered(change: Callable[[dict[str, Any]], Any], file: str = "optimizer.bin") -> Callable[[Path], None]:
    def make(place: Path) -> None:
        saved = torch.load(place / file, weights_only=True)
        change(saved)
        torch.save(saved, place / file)

    return make


def cut(place: Path) -> None:
    file = place / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:-3000])


Q, K = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")


def exchange(saved: dict[str, Any]) -> None:
    saved["state"][Q], saved["state"][K] = saved["state"][K], saved["state"][Q]


FAULTS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "weights missing": (
        lambda p: (p / "pytorch_model_fsdp.bin").unlink(),
        "MissingFileError",
        "expected safetensors weights",
    ),
    "optimizer missing": (
        lambda p: (p / "optimizer.bin").unlink(),
        "MissingFileError",
        "expected the optimizer's state",
    ),
    "cut": (cut, "DamagedFileError", "archive"),
    "payload": (edit_gathered(lambda s: s.update(x=Payload())), "UnsafeFileError", "nothing in it was run"),
    "exchanged, of other shapes": (edit_gathered(exchange), "MappingError", "reordered or transposed"),
    "a name unknown": (
        edit_gathered(lambda s: s["param_groups"][0]["params"].__setitem__(0, "value.weight")),
        "MappingError",
        "got entries of",
    ),
    "a name twice": (
        edit_gathered(lambda s: s["param_groups"][0]["params"].append(Q)),
        "MappingError",
        "0, 1, 2|1 twice|in two",
    ),
    "an entry missing": (edit_gathered(lambda s: s["state"].pop(Q)), "MappingError", "got none for 1"),
    "an entry of no parameter": (
        edit_gathered(lambda s: s["state"].update({"value.weight": s["state"][Q]})),
        "MappingError",
        r"got entries of \['value.weight'\]",
    ),
    "NaN": (
        edit_gathered(lambda s: s["state"][Q]["exp_avg"].view(-1)[3:4].fill_(float("nan"))),
        "InvalidValueError",
        "expected finite values",
    ),
    "NaN in the weights": (
        edit_gathered(lambda s: s[Q].fill_(float("nan")), "pytorch_model_fsdp.bin"),
        "InvalidValueError",
        "expected finite values",
    ),
    "a weight missing": (edit_gathered(lambda s: s.pop(Q), "pytorch_model_fsdp.bin"), "MismatchError", "1 missing"),
    "two names for one weight": (
        edit_gathered(lambda s: s.update({f"_orig_mod.{Q}": s[Q]}), "pytorch_model_fsdp.bin"),
        "MismatchError",
        "expected one tensor for",
    ),
    "a second optimizer": (
        lambda p: (p / "optimizer_1.bin").write_bytes(b""),
        "UnsupportedError",
        r"optimizer_1\.bin: not supported: several",
    ),
    "a second model": (
        lambda p: (p / "pytorch_model_fsdp_1.bin").write_bytes(b""),
        "UnsupportedError",
        r"pytorch_model_fsdp_1\.bin: not supported: several",
    ),
    "another model's configuration": (
        lambda p: edit_json(p / "config.json", hidden_size=32, head_dim=16),
        "MismatchError",
        "expected shape",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line(copy_of, runs, fault, capsys):
    make, error, message = FAULTS[fault]
    place = gathered(copy_of("full"), runs("full").load(2))
    make(place)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(place)
    assert isinstance(caught.value, getattr(errors, error))
    assert "\n" not in str(caught.value)
    assert "it ran" not in capsys.readouterr().out


def test_a_state_of_another_step_is_suspicious(copy_of, runs):
    place = gathered(copy_of("full"), runs("full").load(2))
    edit_json(place / "trainer_state.json", global_step=7)
    assert "two_saves" in [note.code for note in inspect_checkpoint(place).notes]


def test_names_of_wrappers_are_taken_off(copy_of, runs):
    original = runs("full").load(2)
    place = gathered(copy_of("full"), original)
    saved = torch.load(place / "optimizer.bin", weights_only=True)
    saved["state"] = {f"module._orig_mod.{name}": entry for name, entry in saved["state"].items()}
    for group in saved["param_groups"]:
        group["params"] = [f"module._orig_mod.{name}" for name in group["params"]]
    torch.save(saved, place / "optimizer.bin")
    assert_same(load_checkpoint(place), original)
