"""A policy among what else its trainer stepped: PPO's value model or head, in the same optimizer.

The entries of the policy are told by their names, or where there are none by place and shape: a wrapper's modules come
one after the other, so in each group the policy's entries are the first or the last. Which of the two, the user says or
the direction in which the policy's weights have moved.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from entropy_probe.checkpoints.errors import MappingError
from entropy_probe.checkpoints.formats import Weights
from entropy_probe.checkpoints.grouping import grouping_rules, misfit
from entropy_probe.checkpoints.manifest import plain_name
from entropy_probe.checkpoints.mapping import names_in_file
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer
from entropy_probe.checkpoints.parameters import Layout

HEADS = re.compile(r"(v_head|value_head|value_model|critic|score|summary)\b")
"""Names of what is beside a policy."""


def weights_of_policy(weights: Weights, policy: str | None) -> Weights:
    """Full weights without the value model or head beside a policy of some name in the module that was saved."""
    if policy is None:
        return weights
    inside = {
        name.removeprefix(f"{policy}."): x for name, x in weights.tensors.items() if name.startswith(f"{policy}.")
    }
    rest = {name: x for name, x in weights.tensors.items() if not HEADS.match(name)}
    kept = inside or rest
    same = len(kept) == len(weights.tensors) and not inside
    return weights if same else replace(weights, tensors=kept, pretrained=False)


def entries_of_policy(
    saved: SavedOptimizer, layout: Layout, policy: str | None, moved: Callable[[SavedOptimizer, tuple[str, ...]], str]
) -> SavedOptimizer:
    """The policy's entries without those of another model that the optimizer steps too.

    Without the policy's name in the module that the optimizer is over, the parameters' names tell, or how the policy's
    weights have ``moved`` for some entries; where neither singles out one part of the entries, all are returned.
    """
    if saved.has_names:
        return _by_name(saved, layout, policy)
    if saved.num_parameters <= len(layout.parameters):
        return saved
    parts = _by_place(saved, layout)
    if policy is None:
        if saved.never_trained:
            return saved
        parts = {
            kept: rules
            for kept, rules in parts.items()
            if any(moved(saved.only(kept), names) == "consistent" for names in rules)
        }
        return saved.only(next(iter(parts))) if len(parts) == 1 else saved
    if len(parts) != 1:
        raise MappingError(
            f"{saved.path}: policy: expected its {len(layout.parameters)} parameters as the first or the last entries "
            f"of each of its groups {' + '.join(map(str, saved.sizes))}, by shape, got {len(parts)} ways; record "
            "the names while training, with an optimizer made from named_parameters()"
        )
    return saved.only(next(iter(parts)))


def _by_name(saved: SavedOptimizer, layout: Layout, policy: str | None) -> SavedOptimizer:
    names = names_in_file(saved)
    shapes = layout.shapes
    if policy is None and set(names) == shapes.keys():
        return saved
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
        return saved
    ((prefix, kept),) = fitting
    own = saved.only(kept)
    groups = tuple(
        group | {"param_names": [plain_name(name).removeprefix(prefix) for name in group["param_names"]]}
        for group in own.groups
    )
    return replace(own, groups=groups)


def _by_place(saved: SavedOptimizer, layout: Layout) -> dict[tuple[int, ...], list[tuple[str, ...]]]:
    """The policy's entries in each way that fits a rule and all shapes, with the parameters that they would be of."""
    fitting: dict[tuple[int, ...], list[tuple[str, ...]]] = {}
    for rule in grouping_rules(layout).values():
        counts = [len(group) for group in rule.groups]
        if len(counts) != len(saved.sizes) or any(n > size for n, size in zip(counts, saved.sizes, strict=True)):
            continue
        for first in (True, False):
            spans = zip(counts, (group["params"] for group in saved.groups), strict=True)
            kept = tuple(i for n, span in spans for i in (span[:n] if first else span[len(span) - n :]))
            if misfit(saved.only(kept), rule, layout.shapes) is None:
                fitting.setdefault(kept, []).append(rule.names)
    return fitting
