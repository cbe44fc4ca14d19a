"""A policy among what else its trainer stepped: PPO's value model or head, in the same optimizer.

The entries of the policy are told by their names, or where there are none by place and shape: a wrapper's modules come
one after the other, so in each group the policy's entries are the first or the last.
"""

from __future__ import annotations

import re
from dataclasses import replace

from entropy_probe.checkpoints.errors import MappingError
from entropy_probe.checkpoints.formats import Weights
from entropy_probe.checkpoints.manifest import plain_name
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer
from entropy_probe.checkpoints.parameters import Layout, grouping_rules, names_in_file

__all__ = ["HEADS", "entries_of_policy", "weights_of_policy"]

HEADS = re.compile(r"(v_head|value_head|value_model|critic|score|summary)\b")
"""Names of what is beside a policy."""


def weights_of_policy(weights: Weights, policy: str | None) -> Weights:
    """Full weights without a value model or head beside them.

    Args:
        weights: as stored.
        policy: the policy's name in the module that was saved, where the user said that there is one.
    """
    if policy is None:
        return weights
    inside = {
        name.removeprefix(f"{policy}."): x for name, x in weights.tensors.items() if name.startswith(f"{policy}.")
    }
    rest = {name: x for name, x in weights.tensors.items() if not HEADS.match(name)}
    kept = inside or rest
    same = len(kept) == len(weights.tensors) and not inside
    return weights if same else replace(weights, tensors=kept, pretrained=False)


def entries_of_policy(saved: SavedOptimizer, layout: Layout, policy: str | None) -> tuple[SavedOptimizer, str]:
    """The policy's entries, and for the result how many others were set aside.

    Args:
        saved: the optimizer's state.
        layout: the policy's parameters.
        policy: its name in the module that the optimizer is over. Without it only names can tell.

    Raises:
        MappingError: if it was named, and its entries are not known.
    """
    if any("param_names" in group for group in saved.groups):
        return _by_name(saved, layout, policy)
    if policy is None or saved.num_parameters == len(layout.parameters):
        return saved, ""
    kept = _by_place(saved, layout)
    if len(kept) != 1:
        raise MappingError(
            f"{saved.path}: policy: expected its {len(layout.parameters)} parameters as the first or the last entries "
            f"of each of its groups {' + '.join(map(str, saved.sizes))}, by shape, got {len(kept)} ways; record "
            "the names while training, with an optimizer made from named_parameters()"
        )
    return _only(saved, kept.pop())


def _only(saved: SavedOptimizer, kept: tuple[int, ...]) -> tuple[SavedOptimizer, str]:
    others = saved.num_parameters - len(kept)
    return saved.only(kept), f"; {others} entries beside the policy's set aside" if others else ""


def _by_name(saved: SavedOptimizer, layout: Layout, policy: str | None) -> tuple[SavedOptimizer, str]:
    names = names_in_file(saved)
    shapes = layout.shapes
    if policy is None and set(names) == shapes.keys():
        return saved, ""
    first = next(iter(shapes), "")
    prefixes = {n.removesuffix(first) for n in names if n.endswith(f".{first}")} if policy is None else {f"{policy}."}
    fitting = []
    for prefix in prefixes:
        inside = {n.removeprefix(prefix): i for i, n in enumerate(names) if n.startswith(prefix)}
        kept = [inside[name] for name in shapes if name in inside and saved.shape(inside[name]) in (None, shapes[name])]
        if len(kept) == len(shapes):
            fitting.append((prefix, tuple(sorted(kept))))
    if policy is not None and not fitting:
        raise MappingError(
            f"{saved.path}: policy: expected entries named {policy}.{min(shapes, default='')} and so on, got "
            f"{', '.join(sorted({name.split('.')[0] for name in names})[:5])}; pass the name of the policy there"
        )
    if len(fitting) != 1:
        return saved, ""
    ((prefix, kept),) = fitting
    own, aside = _only(saved, kept)
    groups = tuple(
        group | {"param_names": [plain_name(name).removeprefix(prefix) for name in group["param_names"]]}
        for group in own.groups
    )
    return replace(own, groups=groups), aside


def _by_place(saved: SavedOptimizer, layout: Layout) -> set[tuple[int, ...]]:
    """The policy's entries in each way that fits a rule and all shapes."""
    fitting = set()
    shapes = layout.shapes
    for decay, rest in grouping_rules(layout).values():
        parts = [decay, rest] if len(saved.sizes) == 2 else [decay + rest]
        if len(saved.sizes) != len(parts) or any(len(p) > n for p, n in zip(parts, saved.sizes, strict=True)):
            continue
        for first in (True, False):
            kept: list[int] = []
            for group, names in zip(saved.groups, parts, strict=True):
                own = group["params"]
                kept += own[: len(names)] if first else own[len(own) - len(names) :]
            whose = [name for names in parts for name in names]
            if all(saved.shape(i) in (None, shapes[name]) for i, name in zip(kept, whose, strict=True)):
                fitting.add(tuple(kept))
    return fitting
