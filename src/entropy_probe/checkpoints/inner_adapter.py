"""An adapter among the tensors of a whole model, as trainers save one that shard the model that peft built."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.adapters import check_adapter_config
from entropy_probe.checkpoints.errors import InvalidValueError, MappingError, MissingFileError
from entropy_probe.checkpoints.formats import StoredTensor, Weights, weights_of
from entropy_probe.checkpoints.peft_names import PREFIX, is_adapters, is_wrapped, name_in_base, name_in_file

_NAMED = re.compile(r"\.lora_(?:[AB]\.([^.]+)\.weight|embedding_[AB]\.([^.]+))$")


def written_config(path: Path) -> dict[str, Any] | None:
    """What the trainer wrote of the configuration of an adapter among the weights; None where it wrote nothing."""
    place = weights_of(path)
    return None if place is None else place[0].adapter_config(path)


def configuration(path: Path, written: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """The configuration as peft has it: what the trainer wrote, and where that is not all, the modules by the names."""
    if written.get("peft_type") is not None:
        return check_adapter_config(path, dict(written))
    if not all(type(written.get(key)) in (int, float) and written[key] > 0 for key in ("r", "lora_alpha")):
        raise InvalidValueError(f"{path}: expected r and lora_alpha of the adapter, got {dict(written)!r:.100}")
    own = {name for name in weights.tensors if is_adapters(name)}
    if any(".trainable_tokens_delta" in name for name in own):
        raise MissingFileError(
            f"{path / 'adapter_config.json'}: expected the configuration of an adapter that trains some rows of an "
            "embedding, since no name says which, found none; write it with peft, with the trainable_token_indices of "
            "training"
        )
    modules, whole = (
        sorted({name.partition(mark)[0].removeprefix(PREFIX) for name in own if mark in name})
        for mark in (".lora_", ".modules_to_save.")
    )
    others = {name_in_base(name).rpartition(".")[0] for name in weights.tensors.keys() - own if not is_wrapped(name)}
    ends = sorted({module.rpartition(".")[2] for module in modules})
    plain = not any(other.rpartition(".")[2] in ends for other in others)
    return {
        "peft_type": "LORA",
        "task_type": written.get("task_type"),
        "r": int(written["r"]),
        "lora_alpha": written["lora_alpha"],
        "target_modules": ends if plain else modules,
        "modules_to_save": whole or None,
        "use_dora": any(".lora_magnitude_vector." in name for name in own),
    }


def name_among(weights: Weights, asked: str | None) -> str:
    """The adapter's name in the model that peft built; ``default`` where names do not have it."""
    names = {match[1] or match[2] for name in weights.tensors if (match := _NAMED.search(name))}
    if asked is not None and names:
        names &= {asked}
        if not names:
            raise MappingError(f"{weights.files[0]}: adapter: expected {asked!r:.60} among the weights, got others")
    if len(names) > 1:
        raise MappingError(
            f"{weights.files[0]}: expected one adapter among the weights, got {sorted(names)[:5]}; train one"
        )
    return names.pop() if names else asked or "default"


def base_among(weights: Weights) -> Weights:
    """The tensors that are not the adapter's, by the base model's names; trained biases of the base are among them."""
    tensors = {name_in_base(name): tensor for name, tensor in weights.tensors.items() if not is_adapters(name)}
    return replace(weights, tensors=tensors)


def as_in_file(weights: Weights, adapter: str) -> Weights:
    """Weights by a model's own names, by those that a file of peft has."""
    return replace(weights, tensors={name_in_file(name, adapter): x for name, x in weights.tensors.items()})


def split_adapter(weights: Weights, expected: Collection[str], base: Collection[str]) -> tuple[Weights, Weights]:
    """Weights as of an adapter's file, and the frozen base's among them by its own names.

    Of the adapter's are those that are ``expected`` in its file, and those that are not in the ``base`` either.
    """
    own, frozen = dict[str, StoredTensor](), dict[str, StoredTensor]()
    for name, tensor in weights.tensors.items():
        below = name_in_base(name)
        kept = name not in expected and below in base
        (frozen if kept else own)[below if kept else name] = tensor
    return replace(weights, tensors=own), replace(weights, tensors=frozen)


def refuse_adapter(path: Path, weights: Weights) -> None:
    """Refuse an adapter whose configuration the trainer did not save, as with FSDP and in OpenRLHF."""
    ranks = {name.split(".lora_A.")[0]: x.shape[0] for name, x in weights.tensors.items() if ".lora_A." in name}
    if ranks:
        modules = sorted({name.rpartition(".")[2] for name in ranks})
        raise MissingFileError(
            f"{path / 'adapter_config.json'}: expected the configuration of the adapter in {weights.files[0]}, found "
            "none, and no file says its lora_alpha; write one with peft, with the lora_alpha of training: "
            f"LoraConfig(task_type='CAUSAL_LM', r={max(ranks.values())}, lora_alpha=..., "
            f"target_modules={modules}).save_pretrained({str(path)!r}), and pass base_model"
        )
