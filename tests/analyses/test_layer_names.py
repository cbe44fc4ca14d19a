"""Layers and modules by parameter name."""

import pytest

from entropy_probe.analyses.layer_names import layer_and_module

NAMES = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": ("model.layers.0", "q_proj"),
    "base_model.model.model.layers.11.mlp.down_proj.lora_magnitude_vector.default.weight": (
        "model.layers.11",
        "down_proj",
    ),
    "base_model.model.lm_head.modules_to_save.default.weight": ("lm_head", "lm_head"),
    "base_model.model.model.layers.1.mlp.up_proj.base_layer.bias": ("model.layers.1", "up_proj"),
    "model.embed_tokens.weight": ("embed_tokens", "embed_tokens"),
    "model.norm.weight": ("norm", "norm"),
    "model.layers.3.input_layernorm.weight": ("model.layers.3", "input_layernorm"),
    "transformer.h.2.attn.c_attn.bias": ("transformer.h.2", "c_attn"),
    "model.layers.3.mlp.experts.5.w1.weight": ("model.layers.3", "w1"),
    "0.weight": ("0", "0"),
    "inner.bias": ("inner", "inner"),
    "scale": ("(model)", "(model)"),
}


@pytest.mark.parametrize("name", NAMES)
def test_layer_and_module(name):
    assert layer_and_module(name) == NAMES[name]
