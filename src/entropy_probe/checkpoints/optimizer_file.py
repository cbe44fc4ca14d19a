"""Read a saved Adam optimizer without running anything in it, and refuse what is not one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from entropy_probe.checkpoint_results import GroupReport
from entropy_probe.checkpoints.archive import read_archive
from entropy_probe.checkpoints.errors import (
    DamagedFileError,
    InvalidValueError,
    MappingError,
    MismatchError,
    UnsupportedError,
)

__all__ = ["MOMENTS", "SavedOptimizer", "check_entries", "read_optimizer"]

_FLAGS = ("amsgrad", "foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay")
_NUMBERS = ("lr", "eps", "weight_decay")
_OPTIONAL = ("initial_lr", "min_lr", "max_lr", "param_names")
_REQUIRED = {"params", "betas", "amsgrad", *_NUMBERS}
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_OTHER_OPTIMIZERS = {
    "train_mode": "a schedule-free optimizer",
    "beta2_decay": "Adafactor",
    "scale_parameter": "Adafactor",
    "exp_avg_sq_row": "Adafactor",
    "row_var": "Adafactor",
    "variance": "Adafactor",
    "ns_steps": "Muon",
    "dampening": "SGD",
    "momentum_buffer": "SGD or Muon",
    "__bnb_optimizer_quant_state__": "an optimizer of bitsandbytes",
    "t_alpha": "an optimizer of bitsandbytes",
    "qmap1": "8-bit Adam of bitsandbytes",
    "absmax1": "8-bit Adam of bitsandbytes",
    "state1": "an optimizer of bitsandbytes",
    "centered": "RMSprop",
    "momentum_decay": "NAdam",
    "lr_decay": "Adagrad",
    "rho": "Adadelta",
    "lambd": "ASGD",
    "etas": "Rprop",
    "history_size": "L-BFGS",
    "square_avg": "RMSprop",
    "mu_product": "NAdam",
    "exp_inf": "Adamax",
    "correct_bias": "the AdamW that transformers once had",
    "update_proj_gap": "GaLore or APOLLO",
}
"""Keys of a parameter group or of a parameter's state that give another optimizer away."""

_REMEDY = "only Adam and AdamW load from files; for another optimizer of torch pass the live one to EntropyProbe"


@dataclass(frozen=True)
class SavedOptimizer:
    """An optimizer file after its structure was checked; ``state[i]`` belongs to the i-th parameter.

    Attributes:
        path: the file, for messages.
        groups: the parameter groups as stored; ``params`` are indices ``0 … n-1`` in order.
        state: moments and step count by index, as stored.
    """

    path: Path
    groups: tuple[dict[str, Any], ...]
    state: dict[int, dict[str, Any]]

    @property
    def num_parameters(self) -> int:
        """Parameter tensors over all groups."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Parameter tensors of each group."""
        return tuple(len(group["params"]) for group in self.groups)

    @property
    def kind(self) -> Literal["AdamW", "Adam"]:
        """The optimizer class; files of torch before 2.7 do not say, and the Trainer only uses AdamW."""
        return "AdamW" if self.groups[0].get("decoupled_weight_decay", True) else "Adam"

    def group_reports(self) -> tuple[GroupReport, ...]:
        """The groups as plain data."""
        return tuple(
            GroupReport(
                num_parameters=len(group["params"]),
                learning_rate=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                flags={name: group[name] for name in _FLAGS if name in group},
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

    Raises:
        CheckpointError: if the file is missing, damaged, holds anything but tensors and plain values, or its
            groups are not those of ``torch.optim.Adam`` or ``AdamW`` minimising a loss.
    """
    saved = read_archive(path)
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        got = sorted(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        raise UnsupportedError(f"{path}: expected 'state' and 'param_groups', got {got}; pass a Trainer's checkpoint")
    groups, state = saved["param_groups"], saved["state"]
    if not (isinstance(groups, list) and groups and all(isinstance(g, dict) and "params" in g for g in groups)):
        raise DamagedFileError(f"{path}: expected a list of parameter groups, got {groups!r:.80}; the file is damaged")
    if not (isinstance(state, dict) and all(isinstance(entry, dict) for entry in state.values())):
        raise DamagedFileError(f"{path}: expected state by parameter index, got {type(state).__name__}")
    _refuse_others(path, groups, state)
    clean = tuple(_check_group(f"{path}: group {i}", group) for i, group in enumerate(groups))
    indices = [index for group in clean for index in group["params"]]
    if indices != list(range(len(indices))):
        raise MappingError(
            f"{path}: expected the groups to number parameters 0, 1, 2 …, got {str(indices)[:60]} …; "
            "groups were reordered or edited, save the optimizer again"
        )
    if len({group.get("decoupled_weight_decay", True) for group in clean}) > 1:
        raise UnsupportedError(f"{path}: not supported: groups that mix Adam and AdamW; use one of them")
    return SavedOptimizer(path, clean, state)


def _refuse_others(path: Path, groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]]) -> None:
    """Name the optimizer if its groups or its state give it away."""
    for key, name in _OTHER_OPTIMIZERS.items():
        for index, group in enumerate(groups):
            if key in group:
                raise UnsupportedError(
                    f"{path}: group {index}: not supported: this looks like {name} (it has {key!r}); {_REMEDY}"
                )
    for index, entry in state.items():
        for key, name in _OTHER_OPTIMIZERS.items():
            if key in entry:
                raise UnsupportedError(
                    f"{path}: not supported: this looks like {name} (parameter {index!r:.60} has {key!r}); {_REMEDY}"
                )


def _check_group(where: str, group: dict[str, Any]) -> dict[str, Any]:
    """The group with plain numbers, or an error."""
    unknown = group.keys() - _REQUIRED - {*_FLAGS, *_OPTIONAL}
    missing = _REQUIRED - group.keys()
    if unknown or missing:
        raise UnsupportedError(
            f"{where}: not supported: expected the settings of torch.optim.Adam or AdamW, missing "
            f"{sorted(missing)}, unknown {sorted(map(str, unknown))}; {_REMEDY}"
        )
    if not (isinstance(group["params"], list) and all(type(index) is int for index in group["params"])):
        raise DamagedFileError(f"{where}: expected a list of parameter indices, got {group['params']!r:.60}")
    clean = dict(group)
    for key in _NUMBERS:
        clean[key] = _number(f"{where}: {key}", group[key])
        if clean[key] < 0:
            raise InvalidValueError(f"{where}: {key}: expected at least 0, got {clean[key]}; the file is damaged")
    betas = group["betas"]
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        raise InvalidValueError(f"{where}: expected two betas, got {betas!r:.60}; the file is damaged")
    clean["betas"] = tuple(_number(f"{where}: betas", beta) for beta in betas)
    if not all(0 <= beta < 1 for beta in clean["betas"]):
        raise InvalidValueError(f"{where}: expected betas in [0, 1), got {betas}; the file is damaged")
    for key in _FLAGS:
        if not (clean.get(key) is None or isinstance(clean[key], bool)):
            raise InvalidValueError(f"{where}: {key}: expected true, false or nothing, got {clean[key]!r:.60}")
    if clean.get("maximize"):
        raise UnsupportedError(f"{where}: not supported: maximize=True; trainers minimise a loss, so the sign is wrong")
    return clean


def _number(where: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not float or not math.isfinite(value):
        raise InvalidValueError(f"{where}: expected a finite number, got {value!r:.60}; the file is damaged")
    return value


def check_entries(saved: SavedOptimizer) -> None:
    """Check that every parameter has the state of Adam, with tensors of one shape and a step count.

    Raises:
        CheckpointError: if an entry is missing, extra, of another optimizer, or malformed, or if tensors claim more
            data than the file has.
    """
    path = saved.path
    size = path.stat().st_size
    expected = set(range(saved.num_parameters))
    missing, extra = sorted(expected - saved.state.keys()), sorted(saved.state.keys() - expected, key=str)
    if missing or extra:
        raise MappingError(
            f"{path}: expected state for each of {len(expected)} parameters, got none for {len(missing)} "
            f"(index {missing[:5]}) and {len(extra)} entries that belong to no parameter ({extra[:5]}); "
            "a fresh state is never substituted, so save the optimizer again after a full step"
        )
    for index, group in saved.with_group():
        _check_entry(f"{path}: parameter {index}", saved.state[index], group, size)
    declared = sum(entry[key].nbytes for entry in saved.state.values() for key in entry.keys() & {*MOMENTS})
    if declared > size:
        raise DamagedFileError(
            f"{path}: expected moments of at most the file's {size:,} bytes, got {declared:,} bytes declared by "
            "tensors that share their data; save the optimizer again"
        )


def _check_entry(where: str, entry: dict[str, Any], group: dict[str, Any], size: int) -> None:
    moments = MOMENTS if group["amsgrad"] else MOMENTS[:2]
    expected = {"step", *moments}
    if entry.keys() != expected:
        raise UnsupportedError(f"{where}: expected Adam's {sorted(expected)}, got {sorted(map(str, entry))}; {_REMEDY}")
    step = _number(f"{where}: step", entry["step"])
    if step < 1 or step != int(step):
        raise InvalidValueError(
            f"{where}: expected a whole number of steps, at least 1, got {step}; the file is damaged"
        )
    for key in moments:
        moment = entry[key]
        if not (type(moment) is Tensor and moment.layout == torch.strided and moment.dtype in _FLOATS):
            got = f"{moment.dtype}, {moment.layout}" if isinstance(moment, Tensor) else type(moment).__name__
            raise UnsupportedError(f"{where}: {key}: expected a dense floating-point tensor, got {got}; use plain Adam")
        if moment.shape != entry["exp_avg"].shape:
            raise MismatchError(
                f"{where}: {key}: expected the shape of exp_avg {list(entry['exp_avg'].shape)}, got "
                f"{list(moment.shape)}; the file is damaged"
            )
        if any(n > 1 and stride == 0 for n, stride in zip(moment.shape, moment.stride(), strict=True)):
            raise DamagedFileError(
                f"{where}: {key}: expected data for each of {moment.numel():,} elements, got a tensor that repeats "
                f"its data (strides {list(moment.stride())}) in a file of {size:,} bytes; save the optimizer again"
            )
