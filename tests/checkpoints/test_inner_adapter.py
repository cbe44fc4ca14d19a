"""An adapter among the tensors of a whole model: its name, and its configuration where peft has written none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from entropy_probe.checkpoints import CheckpointError
from entropy_probe.checkpoints.errors import MappingError, UnsafeFileError
from entropy_probe.checkpoints.formats import StoredTensor, Weights
from entropy_probe.checkpoints.inner_adapter import base_among, configuration, name_among

Q = "base_model.model.model.layers.0.self_attn.q_proj"
FILE = Path("actor")


def weights(*names: str) -> Weights:
    return Weights((FILE,), {name: StoredTensor(FILE, (2,), lambda: torch.zeros(2)) for name in names})


def test_the_name_is_that_in_the_model():
    assert name_among(weights(f"{Q}.lora_A.policy.weight", f"{Q}.base_layer.weight"), None) == "policy"
    assert name_among(weights("model.embed_tokens.lora_embedding_A.policy"), None) == "policy"
    assert name_among(weights(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"), None) == "default"  # as accelerate saves it


def test_one_of_several_is_asked_for():
    several = weights(f"{Q}.lora_A.policy.weight", f"{Q}.lora_A.ref.weight")
    assert name_among(several, "ref") == "ref"
    with pytest.raises(MappingError, match=r"expected one adapter among the weights, got \['policy', 'ref'\]"):
        name_among(several, None)
    with pytest.raises(MappingError, match="expected 'other' among the weights, got others"):
        name_among(several, "other")


def test_the_base_model_is_what_is_not_the_adapters():
    stored = weights(
        f"{Q}.base_layer.weight",
        f"{Q}.lora_A.default.weight",
        f"{Q}.lora_magnitude_vector.default.weight",
        "base_model.model.lm_head.original_module.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
    )
    assert list(base_among(stored).tensors) == ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]


def test_modules_are_told_by_the_names_where_only_the_scale_is_written():
    stored = weights(f"{Q}.base_layer.weight", f"{Q}.lora_A.default.weight", "base_model.model.value.q_proj.weight")
    written = {"r": 4, "lora_alpha": 8}
    apart = configuration(FILE, written, stored)
    assert (apart["r"], apart["lora_alpha"]) == (4, 8)
    assert apart["target_modules"] == ["model.layers.0.self_attn.q_proj"]  # another q_proj has no adapter
    assert configuration(FILE, written, weights(*list(stored.tensors)[:2]))["target_modules"] == ["q_proj"]


@pytest.mark.parametrize("written", [{"r": 4}, {"r": 0, "lora_alpha": 8}, {"r": 4, "lora_alpha": "8"}])
def test_a_scale_that_is_none_is_refused(written):
    with pytest.raises(CheckpointError, match="expected r and lora_alpha of the adapter"):
        configuration(FILE, written, weights(f"{Q}.lora_A.default.weight"))


def test_a_configuration_of_peft_is_checked_wherever_it_is():
    with pytest.raises(UnsafeFileError, match="megatron_config: expected nothing"):
        configuration(FILE, {"peft_type": "LORA", "lora_alpha": 8, "megatron_config": {}}, weights())
