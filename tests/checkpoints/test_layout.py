"""The layout of an adapter from one layer of each kind is that of peft's own adapter on the whole model."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from entropy_probe.checkpoints import UnsupportedError, models
from entropy_probe.checkpoints import parameters as layout_module
from entropy_probe.checkpoints.formats import Weights
from entropy_probe.checkpoints.parameters import layout_of, repeat_layers, thin_out, treats_layers_alike
from tests.tiny import tiny_policy

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft 0.21 with transformers 5.23
    "ignore:.*(tied|tie_word_embeddings|fan_in_fan_out|not match any|no modules were excluded).*:UserWarning",
    "ignore:.*did not match any.*:RuntimeWarning",
    "ignore:.lora_bias=True. was passed|.*LoRA tensor.s. have invalid shape:UserWarning",  # said of every lora_bias
)
NO_FILE = Weights((), {})
LINEAR = ["q_proj", "v_proj", "down_proj"]


def _moe():
    """Layer 1 is dense, the others have experts, layer 3 other attention."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8,
        mlp_only_layers=[1], tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def _qwen2(**config):
    return tiny_policy("qwen2", num_layers=4, **config)[0]


ALIKE = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias of all": {"bias": "all"},
    "bias of lora": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "modules_to_save in layers": {"modules_to_save": ["input_layernorm"], "target_modules": ["v_proj"]},
    "rank_pattern": {"rank_pattern": {"q_proj": 7, "mlp.down_proj": 3}, "alpha_pattern": {"self_attn.v_proj": 5}},
    "exclude_modules": {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["mlp.down_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
}
APART = {
    "layers_to_transform": {"layers_to_transform": [0, 2]},
    "one layer to transform": {"layers_to_transform": 0},
    "an expression": {"target_modules": r".*\.[13]\.self_attn\.q_proj"},
    "a name with a number": {"target_modules": ["1.self_attn.q_proj", "v_proj"]},
    "rank of a layer": {"rank_pattern": {"layers.2.self_attn.q_proj": 7}},
    "rank by an expression": {"rank_pattern": {r"layers\.[0-2]\.self_attn\.q_proj": 7}},
    "excluded layer": {"exclude_modules": ["layers.3.self_attn.q_proj"]},
    "excluded by an expression": {"exclude_modules": r".*layers\.3.*"},
    "replicated layers": {"layer_replication": [[0, 3], [1, 4]]},
    "tokens": {"trainable_token_indices": [1, 2]},
}


def both_ways(tmp_path, build, settings, adapter):
    """What we say trains and is in the file, and what peft makes of the whole model."""
    with torch.device("meta"):
        whole, base = build(), build()
    peft_config = LoraConfig(**({"r": 4, "target_modules": LINEAR} | settings))
    model = get_peft_model(whole, peft_config, adapter_name=adapter, low_cpu_mem_usage=True)
    peft_config.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text()) | settings
    file.write_text(json.dumps(config))
    stored = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    expected = layout_of(model), {name: tuple(x.shape) for name, x in stored.items()}
    if any(key.endswith("base_layer.bias") and key not in stored for key in expected[0].parameters):
        with pytest.raises(UnsupportedError, match="biases that the installed peft does not save"):
            models.adapter_layout(base, tmp_path, adapter, config, NO_FILE)
        pytest.skip("refused: this peft does not save the trained biases")
    return models.adapter_layout(base, tmp_path, adapter, config, NO_FILE), expected, config


@pytest.mark.parametrize("settings", [*ALIKE.values(), *APART.values()], ids=[*ALIKE, *APART])
@pytest.mark.parametrize(
    ("build", "adapter"),
    [(_qwen2, "default"), (lambda: _qwen2(tie_word_embeddings=True), "policy"), (_moe, "default")],
    ids=["qwen2", "tied", "moe"],
)
def test_names_shapes_order_and_norms_are_those_of_peft(tmp_path, build, settings, adapter):
    if build is _moe and settings.keys() & {"use_dora", "lora_bias"}:
        settings = settings | {"target_modules": ["q_proj", "v_proj"]}  # what peft can do on these layers
    (layout, in_file), (expected, stored), _ = both_ways(tmp_path, build, settings, adapter)
    assert list(layout.parameters.items()) == list(expected.parameters.items())
    assert layout.parameters
    assert in_file == stored


@pytest.mark.parametrize("settings", ALIKE.values(), ids=ALIKE)
def test_one_layer_of_each_kind_is_built(tmp_path, settings, monkeypatch):
    sizes = []
    monkeypatch.setattr(models, "repeat_layers", lambda named, *a: sizes.append(len(named)) or repeat_layers(named, *a))
    (layout, _), _, config = both_ways(tmp_path, _qwen2, settings, "default")
    assert treats_layers_alike(config)
    if any("layers." in name for name in layout.parameters):
        assert sizes[0] < len(layout.parameters)


@pytest.mark.parametrize("settings", APART.values(), ids=APART)
def test_a_configuration_that_can_tell_layers_apart_gets_the_whole_model(tmp_path, settings):
    _, _, config = both_ways(tmp_path, _qwen2, settings, "default")
    assert not treats_layers_alike(config)


def test_trained_biases_that_peft_does_not_save_are_refused(tmp_path, monkeypatch):
    """As peft did before 0.21: the checkpoint would load with the biases of the base model."""
    state = models._adapter_state
    without = lambda *a: {key: x for key, x in state(*a).items() if not key.endswith("bias")}  # noqa: E731
    monkeypatch.setattr(models, "_adapter_state", without)
    LoraConfig(r=4, target_modules=LINEAR, bias="lora_only").save_pretrained(str(tmp_path))
    with torch.device("meta"):
        base = _qwen2()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(UnsupportedError, match=r"installed peft does not save .*q_proj\.base_layer\.bias"):
        models.adapter_layout(base, tmp_path, "default", config, NO_FILE)


def test_kinds_are_told_by_structure():
    with torch.device("meta"):
        model = _moe()
        other = _qwen2()
    other.model.layers[2].mlp.down_proj = nn.Linear(3, 5)
    other.model.layers[3].self_attn.q_proj.weight.requires_grad_(False)
    assert thin_out(model, {})["model.layers"] == [0, 1, 0, 0]
    assert thin_out(other, {}) == {"model.layers": [0, 0, 2, 3]}
    assert isinstance(other.model.layers[1], nn.Identity)


def test_layers_that_share_parameters_are_all_kept():
    model = _qwen2()
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    assert thin_out(model, {}) == {}


@pytest.mark.parametrize("name", ["layers", "model"])
def test_a_list_that_may_be_wrapped_as_a_whole_is_kept(name):
    assert thin_out(_qwen2(), {"modules_to_save": [name]}) == {}
    assert thin_out(_qwen2(), {"modules_to_save": ["norm"]}) != {}


def test_nothing_is_repeated_where_nothing_was_left_out():
    named = {"a": 1, "s.0.w": 2, "s.1.w": 3, "z": 4}
    assert repeat_layers(named, {}, "") == named
    assert list(repeat_layers(named, {"s": [0, 1, 1]}, "").items()) == [
        ("a", 1), ("s.0.w", 2), ("s.1.w", 3), ("s.2.w", 3), ("z", 4),
    ]  # fmt: skip


def test_names_without_a_number_are_all_that_is_understood():
    assert layout_module._NAME.fullmatch("mlp.w1")
    assert not any(map(layout_module._NAME.fullmatch, ["0.mlp", "mlp.0", r"mlp\.w", "a..b", "layers.*", "", "[0-9]"]))
    assert re.match(r"(.*\.)?(mlp.w1)$", "layers.5.mlp.w1")  # how peft reads a key of rank_pattern
