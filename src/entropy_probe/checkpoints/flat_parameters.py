"""FSDP1's optimizers: which parameters each of the flat ones, that the state goes by, is made of.

FSDP1 joins the parameters of a unit (a decoder layer; with LoRA each adapter module too) into one flat parameter, fills
it up with zeros to a multiple of the ranks, and gives each rank an equal piece. Nothing in the files says which
parameters: they are replayed, and sizes and zeros have to confirm it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod

from torch import Tensor

from entropy_probe.checkpoints.pieces import Whole, check_padding, shaped, span

Shapes = Mapping[str, tuple[int, ...]]
_LAYER = re.compile(r"(?:^|.*?\.)\d+(?=\.)")
"""A member of a list of modules, the outermost: what ``_no_split_modules`` of transformers' models are."""


def units_of(names: Sequence[str], trained_modules: Sequence[str] = ()) -> list[list[str]]:
    """Parameters by unit, as FSDP1 wraps a model's layers, and modules of an adapter by themselves.

    The units are in the order of the optimizer: what is in none below, then the others as their modules come.
    """
    layers = {match[0] for name in names if (match := _LAYER.match(name))}
    modules = layers | set(trained_modules)
    units: dict[str, list[str]] = {"": []}
    for name in names:
        path = name.split(".")
        around = [m for i in range(1, len(path)) if (m := ".".join(path[:i])) in modules]
        for module in around:
            units.setdefault(module, [])
        units[around[-1] if around else ""].append(name)
    return [unit for unit in units.values() if unit]


def unflattened(
    where: str, pieces: Mapping[int, Sequence[Tensor]], units: Sequence[Sequence[str]], shapes: Shapes, count: int
) -> dict[str, Whole] | None:
    """Each parameter's own part of the flat tensors; None if these are not the units: their number or a size differs.

    ``pieces`` are those of the ranks in order, of the flat parameters of which something is kept, out of ``count``.
    """
    if len(units) != count or not pieces.keys() <= set(range(count)):
        return None
    parts: dict[str, Whole] = {}
    padding = []
    for index, own in pieces.items():
        ends = [0]
        for name in units[index]:
            ends.append(ends[-1] + prod(shapes[name]))
            parts[name] = shaped(own, ends[-2], shapes[name])
        total = sum(map(len, own))
        if len({len(piece) for piece in own}) > 1 or not 0 <= total - ends[-1] < len(own):
            return None
        padding.append((index, span(own, ends[-1], total)))
    for index, rest in padding:
        check_padding(f"{where}: flat parameter {index}", rest)
    return parts


def pieces_of_parameters(
    pieces: Mapping[int, Sequence[Tensor]], names: Sequence[str], shapes: Shapes, count: int
) -> dict[str, Whole] | None:
    """The same with ``use_orig_params``, where each rank has its piece of each parameter, or none; None likewise."""
    if len(names) != count or not pieces.keys() <= set(range(count)):
        return None
    if any(sum(map(len, own)) != prod(shapes[names[index]]) for index, own in pieces.items()):
        return None
    return {names[index]: shaped(own, 0, shapes[names[index]]) for index, own in pieces.items()}
