"""The parameters that train, in the model's order.

Building an adapter on a deep model takes peft long, and nearly all of it goes into layers that are alike. So of each
kind of layer only one is built, and the layout repeats its parameters under the names of the others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import nn

Value = TypeVar("Value")

Stacks = dict[str, list[int]]
"""For each list of layers, by its path, the index of the layer that stands for each layer."""

_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern")
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class ParameterFacts(NamedTuple):
    """Shape of a parameter, and whether it is in an ``nn.LayerNorm`` and in any module whose class is named a norm."""

    shape: tuple[int, ...]
    in_layer_norm: bool
    in_norm: bool


@dataclass(frozen=True)
class Layout:
    """A model's parameters in ``named_parameters()`` order."""

    parameters: dict[str, ParameterFacts]  # those that train, by name
    names: tuple[str, ...]  # all, the frozen ones too

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: facts.shape for name, facts in self.parameters.items()}

    def without(self, frozen: Collection[str]) -> Layout:
        """The layout of the same model with some parameters frozen."""
        return Layout({name: facts for name, facts in self.parameters.items() if name not in frozen}, self.names)


def layout_of(model: nn.Module) -> Layout:
    """The layout of a model, which may be without storage."""
    in_layer_norm: set[str] = set()
    in_norm: set[str] = set()
    for prefix, module in model.named_modules():
        named_norm = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
        if module is model or not (named_norm or isinstance(module, nn.LayerNorm)):
            continue
        inside = {name for name, _ in module.named_parameters(prefix)}
        in_norm |= inside
        if isinstance(module, nn.LayerNorm):
            in_layer_norm |= inside
    return Layout(
        {
            name: ParameterFacts(tuple(p.shape), name in in_layer_norm, name in in_norm)
            for name, p in model.named_parameters()
            if p.requires_grad
        },
        tuple(name for name, _ in model.named_parameters()),
    )


def treats_layers_alike(config: Mapping[str, Any]) -> bool:
    """Whether nothing in an adapter's configuration can tell one layer of a stack from an equal one.

    It can by a layer's number. So modules may be selected only by lists of plain names without one, which peft compares
    with the end of a module's name (as the ends of regular expressions in ``rank_pattern``), never by an expression
    over the whole; and every setting that is not known here must be empty or a plain value.
    """
    if config.get("layers_to_transform") is not None or config.get("layers_pattern"):
        return False
    for key, value in config.items():
        if key in _NAMES:
            plain = isinstance(value, list | dict) and all(isinstance(n, str) and _NAME.fullmatch(n) for n in value)
            if value and not plain:
                return False
        elif isinstance(value, list | dict) and value and key != "auto_mapping":  # which only says the base's class
            return False
    return True


def thin_out(model: nn.Module, config: Mapping[str, Any]) -> Stacks:
    """Leave in each list of layers of a model one layer of each kind, and empty modules in place of the others.

    Layers are of one kind if they print alike and have parameters of the same names and shapes; the adapter's
    configuration must treat them alike.
    """
    stacks: Stacks = {}
    for path, layers in list(model.named_modules()):
        inside_another = any(path.startswith(f"{stack}.") for stack in stacks)
        if not isinstance(layers, nn.ModuleList) or inside_another or _may_be_saved_whole(path, config):
            continue
        held = [id(p) for layer in layers for p in layer.parameters()]
        if len(held) != len(set(held)):  # layers that share parameters: only the first would show them
            continue
        kinds: dict[Any, int] = {}
        stacks[path] = [kinds.setdefault(_kind(layer), i) for i, layer in enumerate(layers)]
        for i, standing in enumerate(stacks[path]):
            if standing != i:
                layers[i] = nn.Identity()
    return stacks


def _may_be_saved_whole(path: str, config: Mapping[str, Any]) -> bool:
    """Whether peft could wrap the list itself, or a module around it, which gives its layers other names."""
    names = [name for key in _NAMES[:3] for name in config.get(key) or ()]
    parts = path.split(".")
    around = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(place.endswith(name) for place in around for name in names)


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    return repr(layer), *((name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters())


def repeat_layers(named: Mapping[str, Value], stacks: Stacks, prefix: str) -> dict[str, Value]:
    """Entries of a thinned-out model by name, with those of each layer repeated for the layers it stands for.

    They are in the order that the whole model has; ``prefix`` is what stands before the stacks' paths in their names.
    """
    starts = {f"{prefix}{path}.": standing for path, standing in stacks.items()}
    inside: dict[str, dict[int, list[tuple[str, Value]]]] = {}
    order: list[str] = []
    for name, value in named.items():
        start = next((s for s in starts if name.startswith(s)), None)
        if start is None:
            order.append(name)
            continue
        index, _, rest = name[len(start) :].partition(".")
        if start not in inside:
            order.append(start)
        inside.setdefault(start, {}).setdefault(int(index), []).append((rest, value))
    whole: dict[str, Value] = {}
    for name in order:
        if name not in starts:
            whole[name] = named[name]
            continue
        for i, standing in enumerate(starts[name]):
            whole |= {f"{name}{i}.{rest}": value for rest, value in inside[name].get(standing, ())}
    return whole
