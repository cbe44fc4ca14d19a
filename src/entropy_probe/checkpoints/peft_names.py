"""How peft calls the tensors of an adapter and of the model below it: in the model that it built, and in its files."""

from __future__ import annotations

import re

PREFIX = "base_model.model."
_OWN = re.compile(r"\.(?:lora_\w+|modules_to_save|trainable_tokens_delta)\b")
_INSIDE = re.compile(r"\.(?:token_adapter\.base_layer|base_layer|original_module)(?=\.)")
"""The module that peft wraps."""


def is_adapters(name: str) -> bool:
    """Whether a tensor is an adapter's, by its name in the model."""
    return bool(_OWN.search(name))


def is_wrapped(name: str) -> bool:
    """Whether a tensor is of a module that the adapter is put on, by its name in the model."""
    return bool(_INSIDE.search(name))


def name_in_base(name: str) -> str:
    """A name in the base model, of one in the model or in a file."""
    return _INSIDE.sub("", name.removeprefix(PREFIX))


def name_in_file(name: str, adapter: str) -> str:
    """A name in a file, of one in the model with an adapter of some name."""
    name = re.sub(rf"\.modules_to_save\.(?:{re.escape(adapter)}\.)?", ".", name)
    name = name.removesuffix(f".{adapter}").replace(f".{adapter}.", ".")
    return re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", name)
