"""A parameter without an optimizer entry: accepted only where the weights show that the loss never reached it."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from entropy_probe import EntropyProbe, ProbeConfig
from entropy_probe.checkpoints import MappingError, inspect_checkpoint, load_checkpoint
from tests.checkpoints.conftest import edit_optimizer, edit_tensors
from tests.devices import rollouts
from tests.notes import texts

NORM = "model.norm.weight"


def index_of(checkpoint, name, **arguments):
    """The parameter's place in the optimizer file, found by its moments."""
    state = load_checkpoint(checkpoint, **arguments)
    wanted = state.optimizer.state[dict(state.model.named_parameters())[name]]["exp_avg"]
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    (found,) = [i for i, entry in saved.items() if torch.equal(entry["exp_avg"], wanted)]
    return found


def forget(checkpoint, *indices):
    edit_optimizer(checkpoint, lambda saved: [saved["state"].pop(index) for index in indices])


def test_full_weights_that_are_as_training_began(runs, copy_of):
    base, checkpoint = runs("full").directory / "base", copy_of("full")
    index = index_of(checkpoint, NORM)
    forget(checkpoint, index)
    with pytest.raises(MappingError, match=rf"none for 1 \(index \[{index}\]\), of which {NORM} is not as training"):
        load_checkpoint(checkpoint, base)
    start = load_file(base / "model.safetensors")[NORM]
    edit_tensors(checkpoint / "model.safetensors", lambda tensors: tensors.update({NORM: start}))
    with pytest.raises(MappingError, match="nothing to see by that they never trained; pass base_model"):
        load_checkpoint(checkpoint)
    loaded = load_checkpoint(checkpoint, base)
    parameters = dict(loaded.model.named_parameters())
    assert parameters[NORM] not in loaded.optimizer.state
    assert len(loaded.optimizer.state) == len(parameters) - 1
    report = inspect_checkpoint(checkpoint, base)
    assert report.verdict == "suspicious"
    assert any("step counts differ between parameters (0 to 2)" in reason for reason in report.reasons)
    result = EntropyProbe(loaded.model, loaded.optimizer, ProbeConfig()).predict(
        update=rollouts(4, 4, 0, 40), evaluation=rollouts(16, 1, 1, 40)
    )
    assert any("without a history" in message for message in texts(result.diagnostics.notes))


def test_an_adapter_layer_whose_lora_b_is_still_zero(runs, copy_of):
    checkpoint = copy_of("lora")
    pair = [f"base_model.model.model.layers.1.self_attn.q_proj.lora_{x}.default.weight" for x in "AB"]
    indices = [index_of(checkpoint, name) for name in pair]
    forget(checkpoint, *indices)
    with pytest.raises(MappingError, match=r"none for 2 .* is not as training began"):
        load_checkpoint(checkpoint)
    key = pair[1].replace(".default", "")
    edit_tensors(checkpoint / "adapter_model.safetensors", lambda tensors: tensors[key].zero_())
    loaded = load_checkpoint(checkpoint)
    missing = [n for n, p in loaded.model.named_parameters() if p.requires_grad and p not in loaded.optimizer.state]
    assert missing == pair
    assert inspect_checkpoint(checkpoint).num_with_exp_avg_sq == len(loaded.optimizer.state)


def test_lora_a_alone_is_not_explained(runs, copy_of):
    checkpoint = copy_of("lora")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    forget(checkpoint, index_of(checkpoint, name))
    with pytest.raises(MappingError, match=r"none for 1 .* of which .*lora_A.* is not as training began"):
        load_checkpoint(checkpoint)


def test_lora_b_alone_is_not_explained(runs, copy_of):
    """Though it is 0: the loss cannot reach one of the two and not the other."""
    checkpoint = copy_of("lora")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"
    forget(checkpoint, index_of(checkpoint, name))
    edit_tensors(checkpoint / "adapter_model.safetensors", lambda x: x[name.replace(".default", "")].zero_())
    with pytest.raises(MappingError, match=r"none for 1 .* of which .*lora_B.* or is the only one of its pair"):
        load_checkpoint(checkpoint)


def zero_b(tensors):
    for name, x in tensors.items():
        if ".lora_B." in name:
            x.zero_()


def test_nothing_shows_while_the_rate_was_0(runs, copy_of):
    """As in the first step of a warm-up: what trained is as training began too."""
    base, checkpoint = runs("full").directory / "base", copy_of("full")
    forget(checkpoint, index_of(checkpoint, NORM))
    shutil.copy(base / "model.safetensors", checkpoint / "model.safetensors")
    with pytest.raises(MappingError, match=r"do not show whether they trained: model\.\S+ did and is as training"):
        load_checkpoint(checkpoint, base)
    checkpoint = copy_of("lora")
    pair = [f"base_model.model.model.layers.1.self_attn.q_proj.lora_{x}.default.weight" for x in "AB"]
    forget(checkpoint, *[index_of(checkpoint, name) for name in pair])
    edit_tensors(checkpoint / "adapter_model.safetensors", zero_b)
    with pytest.raises(MappingError, match=r"do not show whether they trained: \S+lora_B\S+ did and is as training"):
        load_checkpoint(checkpoint)


def test_one_trained_parameter_that_did_not_move_is_enough(runs, copy_of):
    other = "model.layers.0.input_layernorm.weight"
    base, checkpoint = runs("full").directory / "base", copy_of("full")
    forget(checkpoint, index_of(checkpoint, NORM))
    start = load_file(base / "model.safetensors")
    edit_tensors(checkpoint / "model.safetensors", lambda x: x.update({name: start[name] for name in (NORM, other)}))
    with pytest.raises(MappingError, match=f"do not show whether they trained: {other} did"):
        load_checkpoint(checkpoint, base)


def test_half_precision_hides_small_steps(runs, copy_of):
    base, checkpoint = runs("full").directory / "base", copy_of("full")
    forget(checkpoint, index_of(checkpoint, NORM))
    start = load_file(base / "model.safetensors")[NORM]
    assert (start == 1).all()
    trained = (start + 1e-3).bfloat16()  # as far as ten steps of 1e-4 would take it
    edit_tensors(checkpoint / "model.safetensors", lambda tensors: tensors.update({NORM: trained}))
    with pytest.raises(MappingError, match=rf"{NORM} is stored in torch\.bfloat16, where it may have trained"):
        load_checkpoint(checkpoint, base)


@pytest.mark.parametrize(("dtype", "refused"), [(torch.bfloat16, False), (torch.float16, True)])
def test_from_0_only_float16_hides_them(runs, copy_of, dtype, refused):
    checkpoint = copy_of("lora")
    pair = [f"base_model.model.model.layers.1.self_attn.q_proj.lora_{x}.default.weight" for x in "AB"]
    forget(checkpoint, *[index_of(checkpoint, name) for name in pair])
    still = pair[1].replace(".default", "")
    edit_tensors(
        checkpoint / "adapter_model.safetensors", lambda x: x.update({still: torch.zeros_like(x[still], dtype=dtype)})
    )
    if refused:
        with pytest.raises(MappingError, match=r"lora_B\S+ is stored in torch\.float16"):
            load_checkpoint(checkpoint)
    else:
        assert len(load_checkpoint(checkpoint).optimizer.state) == 26


def test_other_optimizers_and_empty_states_get_nothing_for_granted(runs, copy_of):
    base = runs("full").directory / "base"
    checkpoint = copy_of("full")
    edit_optimizer(checkpoint, lambda saved: saved["state"].clear())
    with pytest.raises(MappingError, match="got none for 27"):
        load_checkpoint(checkpoint, base)
    checkpoint = copy_of("adafactor")
    forget(checkpoint, 0)
    with pytest.raises(MappingError, match="got none for 1"):
        load_checkpoint(checkpoint, runs("adafactor").directory / "base")
