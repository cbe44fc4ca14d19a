"""Flat buffers of DeepSpeed's ZeRO: which elements of which rank a parameter is made of.

Stages 1 and 2 flatten a group, cut it into a partition for each rank, and write down for each rank which parameters it
has elements of. Stage 3 cuts every parameter by itself, fills the last piece up, and joins a rank's pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.checkpoints.errors import DamagedFileError, MismatchError, UnsupportedError, shown
from entropy_probe.checkpoints.manifest import plain_name
from entropy_probe.checkpoints.pieces import COPY, Whole, check_padding, shaped, span

Shapes = dict[str, tuple[int, ...]]
"""Parameters of a group in order."""


@dataclass(frozen=True)
class Buffers:
    """What the ranks hold of one parameter group."""

    kept: dict[str, list[Tensor]]  # by key of the optimizer's state, each rank's flat buffer
    masters: list[Tensor]  # each rank's flat float32 weights
    numbers: dict[str, Any]  # by key, what all have alike, as step counts
    # for each rank the parameters it has elements of: (number, start) in its buffers. Empty in stage 3
    slices: list[dict[str, tuple[int, int]]]

    @classmethod
    def of_ranks(cls, files: Sequence[Path], ranks: Sequence[Sequence[Mapping[str, Any]]]) -> Buffers:
        """Those of a group, its sub-groups joined, from what each rank holds of each sub-group."""
        keys = {key for key in ranks[0][0] if key not in ("master", "slices")}
        numbers: dict[str, Any] = {}
        for file, own in zip(files, ranks, strict=True):
            for part in own:
                if {key for key in part if key not in ("master", "slices")} != keys:
                    raise MismatchError(f"{file}: expected {sorted(keys)} for every flat buffer, got others; {COPY}")
                for key in keys:
                    value = part[key]
                    if isinstance(value, Tensor) and value.dim():
                        continue
                    plain = value.item() if isinstance(value, Tensor) else value
                    if numbers.setdefault(key, plain) != plain:
                        raise MismatchError(
                            f"{file}: {key}: expected {shown(numbers[key])}, as in the others, got {shown(plain)}; "
                            f"files of two saves, {COPY}"
                        )
        kept = {
            key: [_flat(file, key, [part[key] for part in own]) for file, own in zip(files, ranks, strict=True)]
            for key in sorted(keys - numbers.keys())
        }
        masters = [
            _flat(file, "master", [part["master"] for part in own]) for file, own in zip(files, ranks, strict=True)
        ]
        slices = [_slices(file, own[0]["slices"]) for file, own in zip(files, ranks, strict=True)]
        return cls(kept, masters, numbers, slices)

    def in_order(self, shapes: Shapes) -> Buffers:
        """With slices by the order of a group's parameters, which is that of the buffers, where theirs is another.

        With ``round_robin_gradients`` DeepSpeed reorders the parameters before it flattens them, and goes by the order
        before when it writes slices down.
        """
        starts = ((rank, start, name) for rank, own in enumerate(self.slices) for name, (_, start) in own.items())
        told = list(dict.fromkeys(name for *_, name in sorted(starts)))
        if set(told) != shapes.keys() or told == list(shapes):
            return self
        slices: list[dict[str, tuple[int, int]]] = [{} for _ in self.masters]
        rank = at = 0
        for name, shape in shapes.items():
            left = prod(shape)
            while left and rank < len(slices):
                number = min(left, len(self.masters[rank]) - at)
                if number:
                    slices[rank][name] = number, at
                left, at = left - number, at + number
                if left:
                    rank, at = rank + 1, 0
        return replace(self, slices=slices)

    def pieces(self, key: str) -> list[Tensor]:
        """Each rank's buffer under a key, ``master`` for the weights."""
        return self.masters if key == "master" else self.kept[key]


def _flat(file: Path, key: str, parts: Sequence[Any]) -> Tensor:
    if not all(isinstance(x, Tensor) and x.dim() == 1 for x in parts):
        raise DamagedFileError(f"{file}: {key}: expected a flat buffer, got {shown([type(x).__name__ for x in parts])}")
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _slices(file: Path, saved: Any) -> dict[str, tuple[int, int]]:
    slices: dict[str, tuple[int, int]] = {}
    for name, address in (saved or {}).items():
        number, start = (vars(address).get(key) for key in ("numel", "start"))
        if not (type(number) is int and type(start) is int and number > 0 and start >= 0):
            raise DamagedFileError(f"{file}: {name}: expected numel and start, got {shown((number, start))}; {COPY}")
        slices[plain_name(name)] = number, start
    return slices


def by_mappings(file: Path, own: Buffers, key: str, shapes: Shapes) -> dict[str, Whole]:
    """Stages 1 and 2: each parameter from the slices that the ranks say they have, in the order of ranks."""
    pieces = own.pieces(key)
    strangers = sorted({name for mapping in own.slices for name in mapping} - shapes.keys())
    if strangers:
        raise MismatchError(f"{file}: expected slices of the model's parameters, got {shown(strangers)}; {COPY}")
    whole: dict[str, Whole] = {}
    for name, shape in shapes.items():
        inside = [(rank, *mapping[name]) for rank, mapping in enumerate(own.slices) if name in mapping]
        total = sum(number for _, number, _ in inside)
        ends = [start + number == len(pieces[rank]) for rank, number, start in inside[:-1]]
        begins = [start == 0 for _, _, start in inside[1:]]
        if total != prod(shape) or any(start + number > len(pieces[rank]) for rank, number, start in inside):
            raise DamagedFileError(
                f"{file}: {name}: {key}: expected slices of {prod(shape):,} elements, got {total:,} of buffers of "
                f"{[len(x) for x in pieces][:4]}; {COPY}"
            )
        if not (all(ends) and all(begins)):
            raise MismatchError(
                f"{file}: {name}: expected its slices from the end of one rank's buffer to the beginning of the next, "
                f"got others; files of ranks were swapped, {COPY}"
            )
        parts = [pieces[rank][start : start + number] for rank, number, start in inside]
        whole[name] = shaped(parts, 0, shape)
    if key != "master":
        for rank, (piece, mapping) in enumerate(zip(pieces, own.slices, strict=True)):
            _check_rest(f"{file}: {key} of rank {rank}", piece, sorted((s, n) for n, s in mapping.values()))
    return whole


def _check_rest(where: str, piece: Tensor, used: Sequence[tuple[int, int]]) -> None:
    """No two slices overlap, and what is in none is 0."""
    at = 0
    for start, number in [*used, (len(piece), 0)]:
        if start < at:
            raise DamagedFileError(f"{where}: expected slices one after the other, got two at {start:,}; {COPY}")
        check_padding(where, piece[at:start])
        at = start + number


def by_parameters(file: Path, own: Buffers, key: str, shapes: Shapes) -> dict[str, Whole]:
    """Stage 3: each parameter from the ranks' equal pieces of it."""
    pieces, whole, at = own.pieces(key), {}, 0
    for name, shape in shapes.items():
        number = prod(shape)
        length = -(-number // len(pieces))
        parts = [piece[at : at + length] for piece in pieces]
        if any(len(part) != length for part in parts):
            break
        if key != "master":
            check_padding(f"{file}: {name}: {key}", span(parts, number, length * len(parts)))
        whole[name] = shaped(parts, 0, shape)
        at += length
    if len(whole) != len(shapes) or any(len(piece) != at for piece in pieces):
        raise DamagedFileError(
            f"{file}: {key}: expected {at:,} elements on each rank, got {[len(piece) for piece in pieces][:4]}; {COPY}"
        )
    return whole


def frozen_tensors(file: Path, models: Sequence[Mapping[str, Any]], trained: set[str]) -> dict[str, Whole]:
    """Tensors of the model that were not trained: whole in one file, or with ZeRO 3 in pieces in all."""
    frozen = {
        plain_name(name): Whole(tuple(tensor.shape), tensor.dtype, tensor.clone)
        for name, tensor in models[0]["module"].items()
        if plain_name(name) not in trained and tensor.numel()
    }
    shapes = models[0].get("frozen_param_shapes") or {}
    if len(models) > 1 and shapes:
        pieces = [model.get("frozen_param_fragments") or {} for model in models]
        if any(own.keys() != shapes.keys() for own in pieces):
            raise DamagedFileError(f"{file}: expected every rank's part of what was frozen, got fewer; {COPY}")
        for name, size in shapes.items():
            parts, shape = [own[name] for own in pieces], tuple(size)
            if not 0 <= sum(map(len, parts)) - prod(shape) < len(parts):
                raise DamagedFileError(f"{file}: {name}: expected pieces of {list(shape)}, got other sizes; {COPY}")
            frozen[plain_name(name)] = shaped(parts, 0, shape)
    return frozen


def settings_of_group(file: Path, group: dict[str, Any], config: Any) -> dict[str, Any]:
    """A group as torch's Adam has it; DeepSpeed's own have the same step, and other settings that say so.

    Args:
        file: for messages.
        group: of the optimizer's.
        config: DeepSpeed's own.

    Raises:
        UnsupportedError: if it is Adam without bias correction.
    """
    own = {key: value for key, value in group.items() if key not in ("step", "bias_correction")}
    if not group.get("bias_correction", True):
        raise UnsupportedError(f"{file}: not supported: Adam without bias correction; train with it")
    if "bias_correction" in group:
        own.setdefault("amsgrad", False)
        made = (config or {}).get("optimizer") or {}  # by DeepSpeed from its configuration, else by the trainer
        kind, decoupled = str(made.get("type")).lower(), (made.get("params") or {}).get("adam_w_mode", True)
        if kind in ("adam", "adamw"):
            own.setdefault("decoupled_weight_decay", kind == "adamw" or bool(decoupled))
    return own


def check_steps(file: Path, model: Mapping[str, Any], buffers: Sequence[Buffers]) -> None:
    """Check that the optimizer has taken the steps that the model's files count.

    Args:
        file: of the optimizer, for messages.
        model: a file of the model.
        buffers: of the optimizer.

    Raises:
        MismatchError: if not.
    """
    taken = {int(own.numbers["step"]) for own in buffers if "step" in own.numbers}
    counted = (model.get("global_steps"), model.get("skipped_steps") or 0)
    if all(type(x) is int for x in counted) and taken and taken != {counted[0] - counted[1]}:  # type: ignore[operator]
        raise MismatchError(
            f"{file}: expected state after {counted[0]} steps ({counted[1]} skipped), as the model's file counts, got "
            f"after {sorted(taken)}; files of two saves, {COPY}"
        )
