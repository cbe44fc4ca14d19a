"""Dumps that are pickles, read without running anything in them: archives of ``torch.save``, SkyRL's batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entropy_probe.checkpoints.errors import UnsupportedError
from entropy_probe.checkpoints.objects import read_objects
from entropy_probe.checkpoints.safe_read import StandIn, read_archived, read_with_stand_ins

_OTHER = "expected a dump of plain values and tensors; write the batch with Rollouts.to_parquet"
_NUMPY = {
    **{
        (f"numpy{core}.multiarray", name): StandIn
        for core in (".core", "._core")
        for name in ("_reconstruct", "scalar")
    },
    **{("numpy", name): StandIn for name in ("ndarray", "dtype")},
    ("_codecs", "encode"): StandIn,
}
_MODULES = ("skyrl.backends.skyrl_train.training_batch", "skyrl_train.training_batch")


class _Batch(dict[Any, Any]):
    """In place of SkyRL's batch: what was stored, and what it would have been filled with."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _rebuilt(_: Any, state: Any) -> _Batch:
    batch = _Batch()
    batch.state = state
    return batch


_BATCHES: dict[tuple[str, str], Any] = {
    **{(module, name): _Batch for module in _MODULES for name in ("TrainingInputBatch", "TensorBatch")},
    **{(module, "_rebuild_tensor_batch"): _rebuilt for module in _MODULES},
    **{(module, "TensorList"): StandIn for module in _MODULES},
    **{("torch._utils", name): StandIn for name in ("_rebuild_tensor", "_rebuild_tensor_v2")},
    ("torch.storage", "_load_from_bytes"): StandIn,
    ("torch", "device"): StandIn,
    ("collections", "OrderedDict"): dict,
}


def archived_record(path: Path) -> dict[str, Any]:
    """The record in an archive of ``torch.save``.

    Raises:
        ValueError: if it is damaged, holds anything but tensors and plain values, or is no record.
    """
    record = read_objects(path, _NUMPY, _OTHER)
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a record by name, got {type(record).__name__}; {_OTHER}")
    return record


def batch_record(path: Path) -> dict[str, Any]:
    """The tensors of a batch that SkyRL pickled, by name, and its ``metadata``.

    Raises:
        ValueError: if the pickle names anything else, is damaged, or is no batch.
    """

    def build(batch: Any) -> dict[str, Any]:
        state = batch.state if isinstance(batch, _Batch) else None
        if not isinstance(state, dict) or not isinstance(state.get("batch_dict"), dict):
            raise UnsupportedError(f"{path}: expected a batch of SkyRL, got {type(batch).__name__}; {_OTHER}")
        tensors = {name: _tensor(path, value) for name, value in state["batch_dict"].items() if isinstance(value, dict)}
        return {**{k: x for k, x in tensors.items() if x is not None}, "metadata": state.get("metadata")}

    return read_with_stand_ins(path, {**_BATCHES, **_NUMPY}, "pickled batch of rollouts", build)


def _tensor(path: Path, stored: dict[str, Any]) -> Tensor | None:
    """A tensor from its bytes; ``None`` for a list of tensors (images)."""
    if "data" not in stored:
        return None
    if stored.get("format") == "torch":
        return read_archived(stored["data"], str(path))
    flat = np.frombuffer(stored["data"], dtype=np.dtype(str(stored["dtype"])))
    return torch.from_numpy(flat.reshape(tuple(stored["shape"])).copy())
