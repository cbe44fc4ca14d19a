"""Tiny random models of the causal language model classes that transformers registers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 64
MAX_PARAMETERS = 1_000_000


def _sizes(*groups: tuple[int, str]) -> dict[str, Any]:
    return {name: size for size, names in groups for name in names.split()}


# What a configuration calls its sizes, whatever its class.
SIZES = _sizes(
    (VOCABULARY, "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    (32, "hidden_size d_model n_embd embedding_size emb_dim embedding_dim word_embed_proj_dim lru_width"),
    (32, "attention_hidden_size backbone_hidden_size input_embedding_size output_embedding_size mamba_d_ssm"),
    (2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_blocks"),
    (2, "num_decoder_layers n_input_layers n_recurrent_layers n_output_layers num_layers_per_stack"),
    (4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    (4, "num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads"),
    (4, "mamba_n_heads mamba_num_heads linear_num_value_heads linear_num_heads index_n_heads"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_global_key_value_heads"),
    (8, "head_dim swa_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim dim_head d_head attention_head_size"),
    (8, "kv_channels linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim global_head_dim"),
    (8, "state_size mamba_d_state ssm_state_size mamba_d_head mamba_head_dim rotary_dim chunk_size mamba_chunk_size"),
    (16, "qk_head_dim q_lora_rank kv_lora_rank o_lora_rank index_topk d_rel"),
    (48, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim dim_ff dff ffn_hidden_size d_inner"),
    (48, "feed_forward_size shared_expert_intermediate_size shared_experts_intermediate_size intermediate_size_mlp"),
    (48, "shared_intermediate_size dense_intermediate_size"),
    (16, "moe_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size router_hidden_size"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k n_groups"),
    (1, "n_group topk_group num_expert_group"),
    (4, "time_step_rank mamba_dt_rank hidden_size_per_layer_input laurel_rank adapter_rank"),
    (16, "sliding_window sliding_window_size attention_chunk_size window_size attention_window_size local_attention"),
    (256, "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions context_length"),
    (0, "pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
)


MLA = {"num_key_value_heads": 4}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "per_layer_config": {}}
INDEXED = {"layer_types": ["linear_attention", "indexed_attention"], "hc_lowrank": 4, "ple_embed_dim": 8,
           "ngram_vocab_size_base": 50, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
           "indexer_budget": 8, "indexer_compress_ratio": 2}  # fmt: skip
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}

# What the table above does not settle.
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys((
        "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
        "sarvam_mla", "youtu",
    ), MLA),
    **{name: {"is_decoder": True} for name in (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "rembert", "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl",
    )},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), LINEAR),
    **{name: {"text_config": LINEAR} for name in ("qwen3_5", "qwen3_5_moe")},
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), WINDOWED),
    "bailing_hybrid": LINEAR | MLA,
    "kimi_linear": LINEAR | MLA,
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 32, "encoder_hash_byte_group_size": [3],
            "encoder_config": {"hidden_size_global": 32}, "decoder_config": {"hidden_size_global": 32}},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
    },
    "cpmant": {"position_bias_num_buckets": 32, "prompt_length": 4},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
    "dory": {"num_hidden_layers": 6},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": MLA | {"index_topk": 64},  # the index of a tiny model has ties
    "dots3_note": {"text_config": MLA | {"per_layer_config": {}}},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": 48,
                     "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "activation_sparsity_pattern": [0.0] * 4},
    "gemma4": {"text_config": WINDOWED, "vision_config": {"position_embedding_size": 64}},
    "gemma4_unified": {"text_config": WINDOWED, "vision_config": {"mm_embed_dim": 16, "mm_posemb_size": 16}},
    "got_ocr2": {"vision_config": {"output_channels": 16}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, **LINEAR},
    "hrm_text": {"num_hidden_layers": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "sliding_attention"]},
    "longcat_flash": {"zero_expert_num": 2, **MLA},
    "mamba2": {"num_heads": 8},
    "minicpm3": MLA | {"dim_model_base": 32, "scale_emb": 1},
    "minimax": {"block_size": 4},
    "moshi": {"depth_decoder_config": {"input_size": 32, "audio_vocab_size": 32}, "audio_vocab_size": 32},
    "olmo_hybrid": LINEAR,
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 16, "depthwise_separable_out_channel": 16,
                                         "ext_pw_out_channel": 32}},
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "roc_bert": {"is_decoder": True, "pronunciation_vocab_size": 64, "pronunciation_embed_dim": 16,
                 "shape_vocab_size": 64, "shape_embed_dim": 16},
    "rwkv": {"pad_token_id": None},
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "ffn_round_up_to_multiple_of": 16, "qk_dim_factor": 1.0},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
              "attention_head_dim": 16, "attention_hidden_size": 64},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
               "attention_head_dim": 16, "attention_hidden_size": 64, "mamba_headdim": 8, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}


def _longrope(original: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = ROPE | factors | {"rope_type": "longrope", "original_max_position_embeddings": original}
    return {"original_max_position_embeddings": original, "rope_parameters": rope}


# Other settings of a class that its layout depends on: name, model type, settings.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, is_decoder: false": ("bert", {"is_decoder": False}),
    "falcon, alibi": ("falcon", {
        "alibi": True, "num_kv_heads": 4, "new_decoder_architecture": False, "multi_query": False}),
    "falcon, new_decoder_architecture": ("falcon", {"new_decoder_architecture": True}),
    "gemma3n_text, activation sparsity": ("gemma3n_text", {"activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]}),
    "llama, dynamic NTK": ("llama", {
        "rope_parameters": {"rope_type": "dynamic", **ROPE}, "max_position_embeddings": 24}),
    "llama, yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", **ROPE}}),
    "mistral, sliding_window: 8": ("mistral", {"sliding_window": 8}),
    "phi3, LongRoPE": ("phi3", _longrope(24)),
    "phi3, LongRoPE, crossed": ("phi3", _longrope(14)),
    "rwkv, 8 layers": ("rwkv", {"num_hidden_layers": 8, "pad_token_id": None}),
}  # fmt: skip
# How far weights are from the class's own start; the recurrence of some multiplies rounding.
SPREAD = {"dory": 0.02}
UNBUILT = {
    "dots3_note": "its text part sets layers by number; dots3_note_text is the same class",
    "gemma3n": "needs the package timm; gemma3n_text is its text part",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "drafts for another model, from its hidden states"
    ),
}


def register() -> tuple[str, ...]:
    """Every model type that has a causal language model class."""
    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of a registered type or variant with random weights, whose distributions are neither flat nor certain."""
    model_type, settings = VARIANTS.get(name, (name, {}))
    kind = CONFIG_MAPPING[model_type]
    config: Any = kind(**_small(kind, OVERRIDES.get(model_type, {}) | settings))
    make = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    if not isinstance(config, make.config_class):
        parts = (getattr(config, part) for part in config.sub_configs)
        config = next((part for part in parts if isinstance(part, make.config_class)), config)
    with torch.device("meta"):
        large = _large(make(config).named_parameters())
    if large:
        raise ValueError(f"{name}: expected a tiny model, got {large}")
    torch.manual_seed(seed)
    model = make(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(SPREAD.get(name, 0.15) * torch.randn_like(parameter))
    return model


def _small(kind: type[PretrainedConfig], settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration, its parts' included, with every known size small."""
    accepted = set(inspect.signature(kind).parameters)
    small = {name: size for name, size in SIZES.items() if name in accepted}
    for name, part in kind.sub_configs.items():
        if part is AutoConfig:
            part = type(getattr(kind(), name))
        if name in accepted and issubclass(part, PretrainedConfig):
            small[name] = part(**_small(part, settings.get(name, {})))
    return small | {name: x for name, x in settings.items() if name not in kind.sub_configs}


def _large(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, list[int]]:
    sizes = {name: list(p.shape) for name, p in named if p.numel() > 150_000}
    return dict(list(sizes.items())[:4])
