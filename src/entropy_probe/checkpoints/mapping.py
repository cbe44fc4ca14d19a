"""Which parameter each entry of an optimizer file belongs to, and what proves it.

A Hugging Face Trainer stores ``{state: {index: {step, exp_avg, …}}, param_groups}``. Indices count
the trainable parameters of the weight-decay group in ``named_parameters()`` order, then those of the other group.
Names come, in this order, from the file itself (``param_names`` in its groups), from the manifest, or from replaying
the rule that decided which parameters decay. That rule changed between versions, so every known one is replayed and
exactly one distinct assignment must fit all group sizes and all shapes. Nothing is ever filled in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from entropy_probe.checkpoints.errors import MappingError
from entropy_probe.checkpoints.layout import Layout
from entropy_probe.checkpoints.manifest import Manifest, plain_name
from entropy_probe.checkpoints.messages import shown
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer
from entropy_probe.checkpoints.weights import Shape

__all__ = ["ParameterMapping", "grouping_rules", "map_parameters"]


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
        recorded.append((_names_in_file(saved), f"names ({saved.num_parameters} tensors)"))
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


def _names_in_file(saved: SavedOptimizer) -> tuple[str, ...]:
    names: list[str] = []
    for i, group in enumerate(saved.groups):
        found = group.get("param_names")
        if not (isinstance(found, list | tuple) and len(found) == len(group["params"])):
            got = len(found) if isinstance(found, list | tuple) else shown(found)
            raise MappingError(
                f"{saved.path}: group {i}: param_names: expected {len(group['params'])} names, got {got}; "
                "save the optimizer again"
            )
        if not all(type(name) is str for name in found):
            raise MappingError(f"{saved.path}: group {i}: param_names: expected names, got {shown(found)}")
        names += map(plain_name, found)
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
            "optimizer over policy and value model, which is not supported (step the value model with an optimizer of "
            "its own); otherwise pass the model this state was trained with, unedited"
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
