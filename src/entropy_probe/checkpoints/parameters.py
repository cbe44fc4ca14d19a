"""The parameters that train, and which of them each entry of an optimizer file belongs to.

A Hugging Face Trainer stores ``{state: {index: {step, exp_avg, …}}, param_groups}``. Indices count
the trainable parameters of the weight-decay group in ``named_parameters()`` order, then those of the other group.
Names come, in this order, from the file itself (``param_names`` in its groups), from the manifest, or from replaying
the rule that decided which parameters decay. That rule changed between versions, so every known one is replayed and
exactly one distinct assignment must fit all group sizes and all shapes. Nothing is ever filled in.

Building an adapter on a deep model takes peft long, and nearly all of it goes into layers that are alike. So of each
kind of layer only one is built, and the layout repeats its parameters under the names of the others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import nn

from entropy_probe.checkpoints.errors import MappingError, shown
from entropy_probe.checkpoints.manifest import Manifest, plain_name
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer

__all__ = [
    "Layout",
    "ParameterFacts",
    "ParameterMapping",
    "Stacks",
    "grouping_rules",
    "layout_of",
    "map_parameters",
    "names_in_file",
    "repeat_layers",
    "thin_out",
    "treats_layers_alike",
]

Value = TypeVar("Value")

Shape = tuple[int, ...]

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
    """The parameters that train, in ``named_parameters()`` order, by name."""

    parameters: dict[str, ParameterFacts]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: facts.shape for name, facts in self.parameters.items()}

    def without(self, frozen: Collection[str]) -> Layout:
        """The layout of the same model with some parameters frozen."""
        return Layout({name: facts for name, facts in self.parameters.items() if name not in frozen})


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
        }
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
    """Leave in each list of layers one layer of each kind, and empty modules in place of the others.

    Layers are of one kind if they print alike and have parameters of the same names and shapes.

    Args:
        model: the base model; it is changed.
        config: the adapter's configuration, which must treat layers alike.
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

    Args:
        named: entries by parameter name, those of one stack next to each other, as in a module's own order.
        stacks: what :func:`thin_out` returned.
        prefix: what stands before the stacks' paths in the names.

    Returns:
        The entries in the order that the whole model has.
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


@dataclass(frozen=True)
class ParameterMapping:
    """Which parameter each saved index belongs to.

    Attributes:
        names: parameter names, in index order.
        how: where the names came from and what confirmed them.
        others_frozen: whether parameters of the model that are not among the names were frozen, as where names were
            recorded.
    """

    names: tuple[str, ...]
    how: str
    others_frozen: bool = False


def map_parameters(saved: SavedOptimizer, layout: Layout, manifest: Manifest | None = None) -> ParameterMapping:
    """Match saved indices to the model's parameters.

    Args:
        saved: the optimizer file, entries checked.
        layout: the model's parameters that train.
        manifest: the checkpoint's manifest, if it has one.

    Raises:
        MappingError: if recorded names do not fit the file or the model; without recorded names, unless exactly one
            distinct assignment of the Trainer's rules fits the group sizes and every shape.
    """
    if saved.num_parameters == 0:
        raise MappingError(f"{saved.path}: expected at least one trained parameter, got none; nothing would step")
    shapes = layout.shapes
    recorded: list[tuple[tuple[str, ...], str]] = []
    if any("param_names" in group for group in saved.groups):
        by = "the model's files, in order" if saved.lists_frozen else "names"
        recorded.append((names_in_file(saved), f"{by} ({saved.num_parameters} tensors)"))
    if manifest is not None:
        manifest.check_optimizer(saved.path, saved.groups)
        recorded.append((manifest.names, manifest.proof))
    for names, how in recorded:
        _check_names(saved, names, how, shapes)
    if manifest is not None:
        manifest.check_shapes(saved.path, shapes)
    if len({names for names, _ in recorded}) > 1:
        raise MappingError(
            f"{saved.path}: expected its param_names to be those of the manifest, got others; one of the two files is "
            "of another save, copy the checkpoint again"
        )
    if recorded:
        return ParameterMapping(*recorded[0], others_frozen=True)
    return _replay_rules(saved, layout)


def names_in_file(saved: SavedOptimizer) -> tuple[str, ...]:
    """The names that its groups have, in the order of entries and of the unwrapped model.

    Raises:
        MappingError: if a group has not one for each of its parameters.
    """
    names: list[str] = []
    for i, group in enumerate(saved.groups):
        group_names = group.get("param_names")
        if not (isinstance(group_names, list | tuple) and len(group_names) == len(group["params"])):
            got = len(group_names) if isinstance(group_names, list | tuple) else shown(group_names)
            raise MappingError(
                f"{saved.path}: group {i}: param_names: expected {len(group['params'])} names, got {got}; "
                "save the optimizer again"
            )
        if not all(type(name) is str for name in group_names):
            raise MappingError(f"{saved.path}: group {i}: param_names: expected names, got {shown(group_names)}")
        names += map(plain_name, group_names)
    return tuple(names)


def _check_names(saved: SavedOptimizer, names: tuple[str, ...], how: str, shapes: Mapping[str, Shape]) -> None:
    """Recorded names are distinct, of the model, and every entry has the shape of its parameter."""
    duplicates = len(names) - len(set(names))
    unknown = sorted(set(names) - shapes.keys())
    if duplicates or unknown or len(names) != saved.num_parameters:
        raise MappingError(
            f"{saved.path}: {how}: expected {saved.num_parameters} distinct trainable parameters of the model, got "
            f"{len(names)} names, {duplicates} twice, {len(unknown)} unknown {unknown[:2]}; pass the model this state "
            "was trained with, unedited"
        )
    problem = _wrong_shape(saved, names, shapes)
    if problem:
        raise MappingError(
            f"{saved.path}: {how}: expected every entry to have its parameter's shape, got {problem}; entries were "
            "reordered or transposed, copy the checkpoint again"
        )


def grouping_rules(layout: Layout) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """The trainable parameters that decay and those that do not, in order, by each known rule of the Trainer.

    * ``hf-trainer-patterns``, today's: no decay in ``nn.LayerNorm`` and for names that match bias or norm.
    * ``hf-trainer-layer-types``, before: no decay in ``nn.LayerNorm`` and for names that contain bias.
    * ``hf-trainer-registered-norms``, before: the same, with the model's own norm class registered as one.
    * ``named-parameters``: one group in the model's order, as ``AdamW(model.parameters())`` makes.
    """
    patterns = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
    names = layout.parameters
    in_layer_norm = {name for name, facts in names.items() if facts.in_layer_norm}
    in_any_norm = {name for name, facts in names.items() if facts.in_norm}
    undecayed = {
        "hf-trainer-patterns": {n for n in names if n in in_layer_norm or patterns.search(n.lower())},
        "hf-trainer-layer-types": {n for n in names if n in in_layer_norm or "bias" in n},
        "hf-trainer-registered-norms": {n for n in names if n in in_any_norm or "bias" in n},
    }
    rules = {
        rule: (tuple(n for n in names if n not in no_decay), tuple(n for n in names if n in no_decay))
        for rule, no_decay in undecayed.items()
    }
    return rules | {"named-parameters": (tuple(names), ())}


def _replay_rules(saved: SavedOptimizer, layout: Layout) -> ParameterMapping:
    fitting: dict[tuple[str, ...], str] = {}
    tried = []
    for rule, (decay, no_decay) in grouping_rules(layout).items():
        problem = _misfit(saved, decay, no_decay, layout.shapes)
        tried.append(f"{rule} ({len(decay)} + {len(no_decay)}): {problem or 'fits'}")
        if problem is None:
            fitting.setdefault(decay + no_decay, rule)
    if len(saved.sizes) == 1 and fitting:
        # the Trainer's two groups merged into one, as a hand might do, must not pass for the model's order
        for rule, (decay, no_decay) in grouping_rules(layout).items():
            if len(decay + no_decay) == saved.num_parameters and not _wrong_shape(
                saved, decay + no_decay, layout.shapes
            ):
                fitting.setdefault(decay + no_decay, f"{rule}, merged")
    if len(fitting) != 1:
        got = "none does" if not fitting else f"{len(fitting)} different ones do"
        sizes = " + ".join(map(str, saved.sizes)) if len(saved.sizes) <= 8 else f"{len(saved.sizes)} groups of"
        raise MappingError(
            f"{saved.path}: expected one assignment of its {sizes} entries to the model's parameters to fit, "
            f"{got}; tried {'; '.join(tried)}; {_what_to_do(saved, len(layout.parameters), bool(fitting))}"
        )
    ((names, rule),) = fitting.items()
    proof = "shapes" if any(saved.state.values()) else "group sizes, nothing is kept for parameters"
    return ParameterMapping(names, f"rule:{rule} + {proof} ({len(names)} tensors)")


def _what_to_do(saved: SavedOptimizer, trainable: int, several: bool) -> str:
    """What the numbers of entries and of parameters suggest, as a remedy."""
    record = (
        "record the names while training, with integrations.trl.ManifestCallback or an optimizer made from "
        "named_parameters()"
    )
    if several:
        return f"shapes do not tell which, and the names are not in the file: {record}"
    if saved.num_parameters == trainable:
        return (
            f"as many entries as trainable parameters, so its groups are others than the Trainer's (LoRA+, a rate for "
            f"embeddings or for each layer), and their names are not in the file: {record}"
        )
    if saved.num_parameters > trainable:
        return (
            f"{saved.num_parameters - trainable} entries more than the {trainable} trainable parameters: with PPO, one "
            "optimizer over policy and value model, pass policy, the policy's name in the module that both are in "
            "(policy: policy); otherwise pass the model this state was trained with, unedited"
        )
    return (
        f"{trainable - saved.num_parameters} entries fewer than the {trainable} trainable parameters: if a part was "
        f"frozen, pass base_model, the model that training started from, or {record}"
    )


def _misfit(
    saved: SavedOptimizer, decay: tuple[str, ...], no_decay: tuple[str, ...], shapes: Mapping[str, Shape]
) -> str | None:
    """Why the groups of one rule cannot be those of the file; None when they fit."""
    sizes = (len(decay), len(no_decay))
    if saved.sizes != sizes and not (0 in sizes and saved.sizes == (sum(sizes),)):
        return "group sizes differ"
    if len(saved.groups) == 2 and saved.groups[1]["weight_decay"] != 0:
        return f"group 1 must not decay, has weight decay {saved.groups[1]['weight_decay']}"
    return _wrong_shape(saved, decay + no_decay, shapes)


def _wrong_shape(saved: SavedOptimizer, names: tuple[str, ...], shapes: Mapping[str, Shape]) -> str | None:
    """The first entry whose moments do not have its parameter's shape."""
    for index, name in enumerate(names):
        got = saved.shape(index)
        if got is not None and got != shapes[name]:
            return f"index {index} is {list(got)}, {name} is {list(shapes[name])}"
    return None
