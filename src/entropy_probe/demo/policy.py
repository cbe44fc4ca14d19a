"""A character tokenizer and small random causal language models, built without a network."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


Architecture = Literal["qwen2", "qwen3", "llama"]
PAD, EOS = "<pad>", "<eos>"
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per ASCII character plus ``<pad>`` (id 0) and ``<eos>`` (id 1).

    It adds no special tokens when encoding, pads on the left, and survives ``save_pretrained``. Beside a model's
    ``config.json``, ``AutoTokenizer`` of transformers 5 would load it as that model's own tokenizer class and encode
    differently: load it with ``PreTrainedTokenizerFast.from_pretrained``. Encoding any other character raises, since
    there is no unknown token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(
    architecture: Architecture = "qwen2",
    vocab_size: int = len(CHARACTERS) + 2,
    hidden_size: int = 64,
    num_layers: int = 2,
    *,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    max_position_embeddings: int = 256,
    tie_word_embeddings: bool = False,
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """A small random causal language model in float32, in eval mode, on the CPU.

    The global random state is left as it was. ``pad_token_id`` and ``eos_token_id`` are those of
    :func:`build_tokenizer`.

    Args:
        architecture: ``qwen2``, ``qwen3`` or ``llama``.
        vocab_size: rows of the embedding; by default those of :func:`build_tokenizer`.
        hidden_size: width of the residual stream, a multiple of ``num_heads``; the MLP is twice as wide.
        num_layers: transformer blocks.
        num_heads: attention heads.
        num_key_value_heads: heads shared by groups of queries; divides ``num_heads``.
        max_position_embeddings: the longest sequence in tokens.
        tie_word_embeddings: whether the LM head is the embedding.
        seed: seed of the random weights.
        **config: further fields of the model's configuration, such as ``initializer_range``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tie_word_embeddings,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **(fields | config)))
    return model.float().eval()
