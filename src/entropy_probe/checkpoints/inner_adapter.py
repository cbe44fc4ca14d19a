"""An adapter among the tensors of a whole model, as trainers save one that shard the model that peft built."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.adapters import read_adapter_config
from entropy_probe.checkpoints.errors import InvalidValueError, MappingError, MissingFileError
from entropy_probe.checkpoints.formats import CheckpointFormat, Weights, weights_of

__all__ = ["InnerAdapter", "configuration", "inner_adapter"]

_PREFIX = "base_model.model."
_PART = re.compile(r"\.(lora_(?:embedding_)?[AB])\.([^.]+)")


@dataclass(frozen=True)
class InnerAdapter:
    """An adapter and the base model's weights under it.

    Attributes:
        name: of the adapter.
        weights: its tensors, by their names in a file of peft.
        base: the base model's tensors, by their names in it; None where only the adapter was saved.
        home: the folder of the base model's configuration, where the trainer saved it.
        member: the format of the weights.
        rest: names in the files of what is not the adapter's.
    """

    name: str
    weights: Weights
    base: Weights | None
    home: Path | None
    member: CheckpointFormat
    rest: tuple[str, ...]


def inner_adapter(path: Path) -> InnerAdapter | None:
    """The adapter in a directory whose weights are neither safetensors nor those of a plain model; None if none is.

    Raises:
        CheckpointError: if the weights cannot be read.
    """
    if any((path / f"{stem}.safetensors").is_file() for stem in ("adapter_model", "model")):
        return None
    place = weights_of(path)
    if place is None:
        return None
    member, folder = place
    whole = member.weights(folder)
    names = {match[2] for key in whole.tensors if (match := _PART.search(key))}
    if not names:
        return None
    if len(names) > 1:
        raise MappingError(f"{folder}: expected one adapter among the weights, got {sorted(names)[:5]}; train one")
    (name,) = names
    own = {key: x for key, x in whole.tensors.items() if _PART.search(key)}
    rest = {key: x for key, x in whole.tensors.items() if key not in own}
    base = {key.removeprefix(_PREFIX).replace(".base_layer.", "."): x for key, x in rest.items()}
    home = member.configuration_at(path)
    return InnerAdapter(
        name,
        replace(whole, tensors={_PART.sub(r".\1", key): x for key, x in own.items()}),
        replace(whole, tensors=base) if base else None,
        home if (home / "config.json").is_file() else None,
        member,
        tuple(rest),
    )


def configuration(path: Path, adapter: InnerAdapter) -> dict[str, Any]:
    """The configuration as peft has it: its own file's, else what the trainer wrote, and the modules by the names.

    Raises:
        CheckpointError: if nothing says how the adapter is scaled.
    """
    if (path / "adapter_config.json").is_file():
        return read_adapter_config(path)
    said = adapter.member.adapter_config(path)
    if said is None:
        raise MissingFileError(
            f"{path / 'adapter_config.json'}: expected the adapter's configuration, found none, and no file says its "
            "lora_alpha; write one there with peft: LoraConfig(r=…, lora_alpha=…, target_modules=…).save_pretrained"
        )
    if said.get("peft_type") is not None:
        return said
    if not all(type(said.get(key)) in (int, float) and said[key] > 0 for key in ("r", "lora_alpha")):
        raise InvalidValueError(f"{path}: expected r and lora_alpha of the adapter, got {said!r:.100}")
    modules = sorted({re.split(r"\.lora_", key)[0].removeprefix(_PREFIX) for key in adapter.weights.tensors})
    others = {key.removeprefix(_PREFIX).rpartition(".")[0] for key in adapter.rest if ".base_layer." not in key}
    ends = sorted({module.rpartition(".")[2] for module in modules})
    plain = not any(other.rpartition(".")[2] in ends for other in others)
    return {
        "peft_type": "LORA",
        "task_type": said.get("task_type"),
        "r": int(said["r"]),
        "lora_alpha": said["lora_alpha"],
        "target_modules": ends if plain else modules,
    }
