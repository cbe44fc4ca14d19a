"""Which parameter each entry of an optimizer file belongs to.

Names come, in this order, from the file itself (``param_names`` in its groups), from the manifest, from what the user
states, or from the rules by which trainers group parameters. Nothing is ever filled in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from entropy_probe.checkpoints.errors import CheckpointError, MappingError, MissingFileError, shown
from entropy_probe.checkpoints.grouping import Moved, match_rules, wrong_shape
from entropy_probe.checkpoints.manifest import Manifest, plain_name
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer
from entropy_probe.checkpoints.parameters import Layout

Shape = tuple[int, ...]
StatedMapping = str | Path | Mapping[str, int]
"""A file with the name of each entry's parameter on a line, or for expressions the group of parameters they match."""


@dataclass(frozen=True)
class ParameterMapping:
    """Which parameter each saved index belongs to."""

    names: tuple[str, ...]  # parameter names, in index order
    how: str  # where the names came from and what confirmed them
    # whether parameters of the model that are not among the names were frozen, as where names were recorded
    others_frozen: bool = False


def map_parameters(
    saved: SavedOptimizer,
    layout: Layout,
    manifest: Manifest | None = None,
    stated: StatedMapping | None = None,
    moved: Moved = lambda _: "inconclusive",
) -> ParameterMapping:
    """Match saved indices to the model's parameters, with what its manifest or the user (``stated``) says.

    ``moved`` gives the status of the movement check for an assignment. Without names exactly one has to fit by the
    rules.
    """
    if saved.num_parameters == 0:
        raise MappingError(f"{saved.path}: expected at least one trained parameter, got none; nothing would step")
    shapes = layout.shapes
    recorded: list[tuple[tuple[str, ...], str]] = []
    if saved.has_names:
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
    if stated is not None:
        if recorded:
            raise MappingError(f"{saved.path}: mapping: expected none, as the names are {recorded[0][1]}; leave it out")
        return _stated(saved, layout, stated, moved)
    if recorded:
        return ParameterMapping(*recorded[0], others_frozen=True)
    return ParameterMapping(*match_rules(saved, layout, moved))


def _stated(saved: SavedOptimizer, layout: Layout, stated: StatedMapping, moved: Moved) -> ParameterMapping:
    """The mapping that the user states, by the same evidence as a rule's."""
    names = _listed(Path(stated)) if isinstance(stated, str | Path) else _by_expressions(saved, layout, stated)
    how = f"stated + shapes ({len(names)} tensors)"
    _check_names(saved, names, how, layout.shapes)
    status = moved(names)
    if status == "exchanged":
        raise MappingError(
            f"{saved.path}: mapping: expected the weights to have moved along the moments that it assigns to them, got "
            "movement along those of others; put the order right: parameters of a group are in the model's order"
        )
    return ParameterMapping(names, how.replace(" (", " + movement (") if status == "consistent" else how, True)


def _listed(file: Path) -> tuple[str, ...]:
    if not file.is_file():
        raise MissingFileError(f"mapping: {file}: expected a file with a parameter's name on each line, found none")
    try:
        lines = file.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"mapping: {file}: expected names as text, got other bytes; write one name a line"
        ) from error
    return tuple(map(plain_name, lines))


def _by_expressions(saved: SavedOptimizer, layout: Layout, groups: Mapping[str, int]) -> tuple[str, ...]:
    """Each parameter in the group of the first expression that is found in its name; others were frozen."""
    inside: list[list[str]] = [[] for _ in saved.groups]
    try:
        expressions = {re.compile(text): group for text, group in groups.items()}
    except re.error as error:
        raise CheckpointError(f"mapping: expected regular expressions, got {shown(groups)}: {error}") from error
    if not all(type(group) is int and 0 <= group < len(inside) for group in groups.values()):
        raise CheckpointError(f"mapping: expected groups 0 to {len(inside) - 1} of the file, got {shown(groups)}")
    for name in layout.parameters:
        group = next((group for text, group in expressions.items() if text.search(name)), None)
        if group is not None:
            inside[group].append(name)
    sizes = tuple(map(len, inside))
    if sizes != saved.sizes:
        raise MappingError(
            f"{saved.path}: mapping: expected groups of the file's sizes {list(saved.sizes)}, got {list(sizes)} "
            "parameters that match; parameters go to the first expression that is found in their name"
        )
    return tuple(name for group in inside for name in group)


def without_frozen(saved: SavedOptimizer, layout: Layout) -> SavedOptimizer:
    """The state without the frozen parameters that an optimizer over all of a model's lists and never steps.

    By their names where the file has them, else where the entries are those of exactly the parameters that train.
    """
    if len(layout.names) == len(layout.parameters):
        return saved
    if saved.has_names:
        frozen = set(layout.names) - layout.parameters.keys()
        kept = [i for i, name in enumerate(names_in_file(saved)) if i in saved.state or name not in frozen]
    else:
        kept = [i for i, name in enumerate(layout.names) if name in layout.parameters]
        if saved.num_parameters != len(layout.names) or not saved.state.keys() <= set(kept):
            return saved
    return saved if len(kept) == saved.num_parameters else saved.only(kept)


def names_in_file(saved: SavedOptimizer) -> tuple[str, ...]:
    """The parameter of each entry, by the names in the groups."""
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
    problem = wrong_shape(saved, names, shapes)
    if problem:
        raise MappingError(
            f"{saved.path}: {how}: expected every entry to have its parameter's shape, got {problem}; entries were "
            "reordered or transposed, copy the checkpoint again"
        )
