"""Read a saved optimizer without running anything in it, and refuse what cannot be rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.checkpoints.eight_bit import EightBitState, is_of_bitsandbytes
from entropy_probe.checkpoints.errors import (
    DamagedFileError,
    InvalidValueError,
    MappingError,
    MismatchError,
    UnsupportedError,
    shown,
)
from entropy_probe.checkpoints.optimizers import (
    ADAM,
    ADAMW,
    ADAMW_8BIT,
    REMEDY,
    Content,
    OptimizerKind,
    check_settings,
    number,
    recognise,
)
from entropy_probe.checkpoints.safe_read import read_archive
from entropy_probe.results.checkpoint import GroupReport

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_OTHER_OPTIMIZERS = {
    "train_mode": "a schedule-free optimizer",
    "lambd": "ASGD",
    "etas": "Rprop",
    "history_size": "L-BFGS",
    "correct_bias": "the AdamW that transformers once had",
    "update_proj_gap": "GaLore or APOLLO",
}
"""Keys of a parameter group or of a parameter's state that give an optimizer away which is not rebuilt."""


@dataclass(frozen=True)
class SavedOptimizer:
    """An optimizer file after its structure was checked; ``state[i]`` belongs to the i-th parameter."""

    path: Path  # the file, for messages
    kind: OptimizerKind  # the class of optimizer that it is of
    # the parameter groups, numbers as floats; ``params`` are indices ``0 … n-1`` in order
    groups: tuple[dict[str, Any], ...]
    state: dict[int, dict[str, Any]]  # what is kept for each parameter by index, as stored
    size: int  # bytes of the file, or of the files that it is in
    # how to read a tensor that is without storage yet, by index and key; None where there are none
    read: Callable[[int, str], Tensor] | None = None
    lists_frozen: bool = False  # whether the groups may hold parameters that were frozen, of which nothing is kept

    def loaded(self) -> SavedOptimizer:
        """The same with every tensor read that was left in its files until it was known to fit."""
        if self.read is None:
            return self
        state = {
            index: {
                key: self.read(index, key) if isinstance(value, Tensor) and value.is_meta else value
                for key, value in entry.items()
            }
            for index, entry in self.state.items()
        }
        return replace(self, state=state, read=None)

    def only(self, kept: Sequence[int]) -> SavedOptimizer:
        """The same with some of the parameters, numbered anew."""
        number, read = {old: new for new, old in enumerate(kept)}, self.read
        groups = []
        for group in self.groups:
            at = [k for k, i in enumerate(group["params"]) if i in number]
            names = {"param_names": [group["param_names"][k] for k in at]} if "param_names" in group else {}
            groups.append(group | {"params": [number[group["params"][k]] for k in at], **names})
        return replace(
            self,
            groups=tuple(groups),
            state={number[i]: entry for i, entry in self.state.items() if i in number},
            read=None if read is None else lambda index, key: read(kept[index], key),
        )

    @property
    def num_parameters(self) -> int:
        """Parameter tensors over all groups."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Parameter tensors of each group."""
        return tuple(len(group["params"]) for group in self.groups)

    @property
    def has_names(self) -> bool:
        """Whether its groups name their parameters."""
        return any("param_names" in group for group in self.groups)

    @property
    def is_adam(self) -> bool:
        """Whether it is of ``torch.optim.Adam`` or ``AdamW``, whose step is known in parts."""
        return self.kind in (ADAM, ADAMW, ADAMW_8BIT)

    def shape(self, index: int) -> tuple[int, ...] | None:
        """The shape of a parameter, by what is kept for it; None where nothing is."""
        return self._expected[index][0]

    def dtype(self, index: int) -> torch.dtype | None:
        """The type of what is kept for a parameter; None where nothing is."""
        return next((tensor.dtype for _, _, tensor in self.tensors(index)), None)

    def contents(self, index: int) -> dict[str, Content]:
        """What is kept for a parameter; nothing if the loss has never reached it."""
        return {} if index in self.never_trained else self._expected[index][1]

    @cached_property
    def never_trained(self) -> frozenset[int]:
        """Parameters without the entry that a first gradient would have made."""
        return frozenset(i for i in range(self.num_parameters) if self._expected[i][1] and i not in self.state)

    def refusal_of(self, missing: list[int], why: str) -> MappingError:
        """The error for parameters whose entries should be there."""
        return MappingError(
            f"{self.path}: expected state for each of {self.num_parameters} parameters, got none for {len(missing)} "
            f"(index {missing[:5]}){why}; a fresh state is never substituted: save again after a step that reaches and "
            "moves every parameter, or freeze those that the loss does not reach"
        )

    @cached_property
    def _expected(self) -> dict[int, tuple[tuple[int, ...] | None, dict[str, Content]]]:
        expected = {}
        for index, group in self.with_group():
            shape = self.kind.parameter_shape(self.state.get(index, {}))
            expected[index] = shape, self.kind.contents(group, shape or ())
        return expected

    def tensors(self, index: int) -> Iterator[tuple[str, Content, Tensor]]:
        """What is kept for a parameter besides its step count and single numbers."""
        entry = self.state.get(index, {})
        for key, content in self.contents(index).items():
            if content.form not in ("count", "number"):
                yield key, content, entry[key]

    def group_reports(self) -> tuple[GroupReport, ...]:
        """The groups as plain data."""
        return tuple(
            GroupReport(
                num_parameters=len(group["params"]),
                learning_rate=group["lr"],
                betas=group.get("betas"),
                eps=group["eps"] if isinstance(group.get("eps"), float) else None,
                weight_decay=group["weight_decay"],
                others=_settings(group, lambda x: type(x) in (float, int, str)),
                flags=_settings(group, lambda x: x is None or type(x) is bool),
            )
            for group in self.groups
        )

    def with_group(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every parameter index with its own group."""
        return ((index, group) for group in self.groups for index in group["params"])

    def count(self, key: str) -> int:
        """Parameters whose state has an entry ``key``."""
        return sum(key in self.state.get(index, {}) for index in range(self.num_parameters))


def read_optimizer(path: Path) -> SavedOptimizer:
    """Read an optimizer file without running anything in it, and check groups and hyperparameters.

    Tensors stay in the file, mapped into memory, until they are used.
    """
    return saved_optimizer(path, read_archive(path), path.stat().st_size)


def saved_optimizer(
    path: Path, saved: Any, size: int, read: Callable[[int, str], Tensor] | None = None
) -> SavedOptimizer:
    """Check groups and hyperparameters of what an optimizer's ``state_dict`` saved; tensors may be without storage."""
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        got = shown(list(saved)) if isinstance(saved, dict) else type(saved).__name__
        raise UnsupportedError(f"{path}: expected 'state' and 'param_groups', got {got}; pass a Trainer's checkpoint")
    groups, state = saved["param_groups"], saved["state"]
    if not (isinstance(groups, list) and groups and all(isinstance(g, dict) and "params" in g for g in groups)):
        raise DamagedFileError(f"{path}: expected a list of parameter groups, got {shown(groups)}; the file is damaged")
    groups, state = _numbered(groups, state)
    if not (isinstance(state, dict) and all(isinstance(entry, dict) for entry in state.values())):
        raise DamagedFileError(f"{path}: expected state by parameter index, got {type(state).__name__}")
    strangers = [key for key in state if type(key) is not int]
    if strangers:
        raise MappingError(
            f"{path}: expected state of parameters that are in a group, got entries of {shown(strangers)}; save the "
            "optimizer again"
        )
    eight_bit = None
    if is_of_bitsandbytes(groups, state):
        eight_bit = EightBitState.of(path, groups, state, size)
        groups, state = eight_bit.groups, eight_bit.state
        size, read = max(size, eight_bit.size), eight_bit.read
    _refuse_others(path, groups, state)
    for i, group in enumerate(groups):
        if not (isinstance(group["params"], list) and all(type(index) is int for index in group["params"])):
            raise DamagedFileError(
                f"{path}: group {i}: expected a list of parameter indices, got {shown(group['params'])}; the file is "
                "damaged"
            )
    kind = recognise(str(path), groups, list(state.values()))
    clean = tuple(check_settings(f"{path}: group {i}", kind, group) for i, group in enumerate(groups))
    indices = [index for group in clean for index in group["params"]]
    if indices != list(range(len(indices))):
        raise MappingError(
            f"{path}: expected the groups to number parameters 0, 1, 2 …, got {shown(indices)}; "
            "groups were reordered or edited, save the optimizer again"
        )
    if eight_bit is not None and eight_bit.in_8_bits:
        kind = ADAMW_8BIT
    optimizer = SavedOptimizer(path, kind, clean, state, size, read)
    if optimizer.is_adam and len({group.get("decoupled_weight_decay", True) for group in clean}) > 1:
        raise UnsupportedError(f"{path}: not supported: groups that mix Adam and AdamW; use one of them")
    return optimizer


def _numbered(groups: list[dict[str, Any]], state: Any) -> tuple[list[dict[str, Any]], Any]:
    """Groups and state by index where they go by name, as accelerate writes the gathered state of FSDP."""
    names = [name for group in groups if isinstance(group["params"], list) for name in group["params"]]
    if not names or not isinstance(state, dict) or not all(isinstance(name, str) for name in names):
        return groups, state
    number = {name: index for index, name in enumerate(names)}
    named = [
        group | {"params": [number[name] for name in group["params"]], "param_names": list(group["params"])}
        for group in groups
    ]
    return named, {number.get(name, name): entry for name, entry in state.items()}


def _refuse_others(path: Path, groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]]) -> None:
    """Name the optimizer if its groups or its state give it away."""
    for key, name in _OTHER_OPTIMIZERS.items():
        for index, group in enumerate(groups):
            if key in group:
                raise UnsupportedError(
                    f"{path}: group {index}: not supported: this looks like {name} (it has {key!r}); {REMEDY}"
                )
    for index, entry in state.items():
        for key, name in _OTHER_OPTIMIZERS.items():
            if key in entry:
                raise UnsupportedError(
                    f"{path}: not supported: this looks like {name} (parameter {shown(index)} has {key!r}); {REMEDY}"
                )


def check_entries(saved: SavedOptimizer) -> None:
    """Check that every parameter has what its optimizer keeps: tensors that fit one shape, and a step count.

    Adam's may lack entries, which the weights then have to explain; not all of them.
    """
    path, size = saved.path, saved.size
    expected = {index for index in range(saved.num_parameters) if saved.contents(index)}
    missing = sorted(saved.never_trained)
    # an entry that holds nothing is none
    extra = [i for i in saved.state.keys() - expected if any(x is not None for x in saved.state[i].values())]
    if extra or (missing and not (saved.is_adam and expected)):
        raise saved.refusal_of(missing, f" and {len(extra)} entries that belong to no parameter ({shown(extra)})")
    for index in sorted(expected):
        _check_entry(f"{path}: parameter {index}", saved, index, size)
    declared = sum(x.nbytes for index in expected for _, _, x in saved.tensors(index))
    if declared > size:
        raise DamagedFileError(
            f"{path}: expected moments of at most the file's {size:,} bytes, got {declared:,} bytes declared by "
            "tensors that share their data; save the optimizer again"
        )


def _check_entry(where: str, saved: SavedOptimizer, index: int, size: int) -> None:
    entry, expected, shape = saved.state[index], saved.contents(index), saved.shape(index)
    name = saved.kind.name
    if entry.keys() != expected.keys():
        raise UnsupportedError(
            f"{where}: expected {name}'s {sorted(expected)}, got {shown(list(entry), 200)}; save plain {name} state"
        )
    for key, content in expected.items():
        if content.form == "count":
            step = number(f"{where}: {key}", entry[key])
            if step < 1 or step != int(step):
                raise InvalidValueError(
                    f"{where}: expected a whole number of steps, at least 1, got {step}; the file is damaged"
                )
        elif content.form == "number" and number(f"{where}: {key}", entry[key]) < content.low:
            raise InvalidValueError(f"{where}: {key}: expected at least {content.low:g}, got {entry[key]}")
    for key, content, tensor in saved.tensors(index):
        _check_tensor(f"{where}: {key}", tensor, size)
        if shape is None or tuple(tensor.shape) != saved.kind.shape_of(content, shape):
            fitting = list(saved.kind.shape_of(content, shape)) if shape is not None else "one"
            raise MismatchError(
                f"{where}: {key}: expected the shape {fitting}, as of the entry's others, got {list(tensor.shape)}; "
                "the file is damaged"
            )
    if saved.kind.matrices_only and len(shape or ()) != 2:
        raise MismatchError(f"{where}: expected a matrix, as {name} takes no others, got shape {list(shape or ())}")


def _check_tensor(where: str, tensor: Any, size: int) -> None:
    if not (type(tensor) is Tensor and tensor.layout == torch.strided and tensor.dtype in _FLOATS):
        got = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UnsupportedError(f"{where}: expected a dense floating-point tensor, got {got}; save plain tensors")
    if any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise DamagedFileError(
            f"{where}: expected data for each of {tensor.numel():,} elements, got a tensor that repeats "
            f"its data (strides {list(tensor.stride())}) in a file of {size:,} bytes; save the optimizer again"
        )


def _settings(group: dict[str, Any], wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """Settings of one type, without those that every report has."""
    shown = ("lr", "eps", "weight_decay", "params", "initial_lr", "min_lr", "max_lr")
    return {key: value for key, value in group.items() if key not in shown and wanted(value)}
