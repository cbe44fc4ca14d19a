"""The state of bitsandbytes' Adam, in 8 bits or paged, as AdamW's: dequantised when it is read.

A moment in 8 bits is a code for each element, a map of 256 values, and a scale for each block of elements: element
``i`` is ``map[code[i]] * scale[i // block]``. Small tensors, and those that a run excepts (embeddings), are in float32.
Today's files have these tensors in a dictionary of their own, older ones beside ``step``. The library's Adam decays as
AdamW does, whatever its class is called.

Its kernel steps from the moments as they are stored, before it quantises the new ones, so AdamW on the dequantised ones
takes the same step: to 1e-5 of it with bitsandbytes 0.50.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.checkpoints.errors import DamagedFileError, InvalidValueError, MismatchError, UnsupportedError, shown

WRAPPED = "__bnb_optimizer_quant_state__"
BLOCKS = (256, 2048)
"""Elements that share a scale: today, and before version 0.44."""
_SETTINGS = ("params", "param_names", "lr", "betas", "eps", "weight_decay", "initial_lr", "min_lr", "max_lr")
_ADDED = ("alpha", "t_alpha", "t_beta3")
"""Settings that only AdEMAMix uses."""
_MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}
_STATE = {f"{what}{i}" for what in ("state", "qmap", "absmax") for i in (1, 2)}
_OTHERS = {
    "unorm_vec": "that bounds the step of each tensor (LAMB, LARS)",
    "gnorm_vec": "with percentile clipping, which scales gradients by earlier ones",
    "max1": "with a scale for each tensor, of a version before blocks of elements",
}
_OTHER_REMEDY = "train with optim: adamw_8bit, paged_adamw_8bit or paged_adamw_32bit, or one of torch"
_DAMAGED = "the file is damaged"


def is_of_bitsandbytes(groups: list[dict[str, Any]], state: Mapping[Any, dict[str, Any]]) -> bool:
    """Whether groups or entries have what only optimizers of bitsandbytes leave."""
    keys = {key for entry in state.values() for key in entry}
    return bool(keys & {WRAPPED, *_STATE, *_OTHERS}) or any("t_alpha" in group for group in groups)


@dataclass(frozen=True)
class EightBitState:
    """What bitsandbytes' ``state_dict`` holds, as torch's AdamW would have it."""

    groups: list[dict[str, Any]]  # the parameter groups
    state: dict[Any, dict[str, Any]]  # entries by index; a moment in 8 bits is without storage until it is read
    stored: dict[Any, dict[str, Tensor]]  # the tensors of the file by index

    @classmethod
    def of(
        cls, path: Path, groups: list[dict[str, Any]], state: Mapping[Any, dict[str, Any]], size: int
    ) -> EightBitState:
        """Check what a file of some bytes holds."""
        stored = {index: _opened(f"{path}: parameter {shown(index)}", entry) for index, entry in state.items()}
        declared = sum(x.nbytes for tensors in stored.values() for key, x in tensors.items() if "qmap" not in key)
        if declared > size:
            raise DamagedFileError(
                f"{path}: expected moments of at most the file's {size:,} bytes, got {declared:,} bytes declared by "
                "tensors that share their data; save the optimizer again"
            )
        return cls(
            [_group(f"{path}: group {i}", group) for i, group in enumerate(groups)],
            {
                index: {"step": entry.get("step"), **{key: _moment(stored[index], i) for key, i in _MOMENTS.items()}}
                for index, entry in state.items()
            },
            stored,
        )

    @property
    def in_8_bits(self) -> bool:
        """Whether any moment is: those of ``paged_adamw_32bit`` are AdamW's own under other names."""
        return any("qmap1" in tensors for tensors in self.stored.values())

    @property
    def size(self) -> int:
        """Bytes of the moments once they are in float32, at most."""
        return 4 * sum(tensors[f"state{i}"].nbytes for tensors in self.stored.values() for i in _MOMENTS.values())

    def read(self, index: int, key: str) -> Tensor:
        """A moment that is in 8 bits, dequantised to float32."""
        codes, values, scales = (self.stored[index][f"{what}{_MOMENTS[key]}"] for what in ("state", "qmap", "absmax"))
        block = _block(codes.numel(), len(scales))
        assert block is not None
        whole = torch.empty(codes.numel(), dtype=torch.float32)
        flat = codes.flatten()
        for start in range(0, len(flat), chunk := block * max(1, 2**22 // block)):  # indices take eight times the bytes
            part = flat[start : start + chunk]
            first = start // block
            scale = scales[first : first + -(-len(part) // block)].repeat_interleave(block)[: len(part)]
            torch.mul(values[part.int()], scale, out=whole[start : start + len(part)])
        return whole.view(codes.shape)


def _moment(stored: Mapping[str, Tensor], i: str) -> Tensor:
    codes = stored[f"state{i}"]
    return codes if f"qmap{i}" not in stored else torch.empty(codes.shape, dtype=torch.float32, device="meta")


def _block(elements: int, scales: int) -> int | None:
    """The elements that share a scale; None if none of the library's numbers fits."""
    return next((n for n in BLOCKS if -(-elements // n) == scales), None)


def _group(where: str, group: dict[str, Any]) -> dict[str, Any]:
    """A group as AdamW has it."""
    unknown = sorted(map(shown, group.keys() - {*_SETTINGS, *_ADDED}))
    betas = group.get("betas")
    if unknown or group.get("alpha") or (isinstance(betas, tuple | list) and len(betas) != 2):
        raise UnsupportedError(
            f"{where}: not supported: of bitsandbytes' optimizers only Adam is read, got settings of another "
            f"({', '.join(unknown) or 'AdEMAMix'}); {_OTHER_REMEDY}"
        )
    own = {key: value for key, value in group.items() if key not in _ADDED}
    return own | {"amsgrad": False, "decoupled_weight_decay": True}


def _opened(where: str, entry: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an entry, checked."""
    inside = entry.get(WRAPPED, {})
    if not isinstance(inside, dict):
        raise DamagedFileError(f"{where}: {WRAPPED}: expected tensors by name, got {shown(inside)}; {_DAMAGED}")
    tensors = {**{key: x for key, x in entry.items() if key not in (WRAPPED, "step")}, **inside}
    other = next((what for key, what in _OTHERS.items() if key in tensors), None)
    if other is None and "state2" not in tensors:
        other = "that keeps no second moment (Lion, SGD, RMSprop, Adagrad)"
    if other is None and getattr(tensors.get("absmax1"), "ndim", 1) > 1:
        other = "with two first moments (AdEMAMix)"
    if other is not None:
        raise UnsupportedError(f"{where}: not supported: an optimizer of bitsandbytes {other}; {_OTHER_REMEDY}")
    expected = _STATE if tensors.keys() & {"qmap1", "absmax1", "qmap2", "absmax2"} else {"state1", "state2"}
    if tensors.keys() != expected:
        raise UnsupportedError(f"{where}: expected {sorted(expected)}, got {shown(list(tensors), 200)}; {_DAMAGED}")
    for i in ("1", "2"):
        if not isinstance(tensors[f"state{i}"], Tensor):
            raise DamagedFileError(
                f"{where}: state{i}: expected a tensor, got {shown(tensors[f'state{i}'])}; {_DAMAGED}"
            )
        if expected is _STATE:
            _check_quantised(where, i, tensors[f"state{i}"], tensors[f"qmap{i}"], tensors[f"absmax{i}"])
    return tensors


def _check_quantised(where: str, i: str, codes: Any, values: Any, scales: Any) -> None:
    """Codes, map and scales are dense, belong together, and are what a moment can be."""
    for key, tensor, dtype in (
        (f"state{i}", codes, torch.uint8),
        (f"qmap{i}", values, torch.float32),
        (f"absmax{i}", scales, torch.float32),
    ):
        dense = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.is_contiguous()
        if not dense or tensor.dtype != dtype:
            got = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise DamagedFileError(f"{where}: {key}: expected a dense tensor of {dtype}, got {got}; {_DAMAGED}")
    if values.shape != (256,) or scales.dim() != 1 or _block(codes.numel(), len(scales)) is None:
        raise MismatchError(
            f"{where}: expected a map of 256 values and a scale for each 256 of {codes.numel():,} elements, "
            f"{math.ceil(codes.numel() / 256):,}, got qmap{i} {list(values.shape)} and absmax{i} {list(scales.shape)}; "
            f"{_DAMAGED}"
        )
    lowest = -1.0 if i == "1" else 0.0
    if not bool((values >= lowest).all() and (values <= 1).all() and (values.diff() > 0).all()):
        raise InvalidValueError(
            f"{where}: qmap{i}: expected rising values from {lowest:g} to 1, got others; {_DAMAGED}"
        )
    if not bool((scales >= 0).all() and torch.isfinite(scales).all()):
        raise InvalidValueError(
            f"{where}: absmax{i}: expected finite scales of at least 0, got others; training diverged before this "
            "save, or the file is damaged"
        )
