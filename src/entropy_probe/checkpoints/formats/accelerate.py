"""``optimizer.bin`` of accelerate, and full weights in ``pytorch_model_fsdp.bin`` where FSDP gathered them.

Both are files of ``torch.save``. ``save_state`` numbers the parameters as the Trainer does; FSDP with
``FULL_STATE_DICT`` writes them by name.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from entropy_probe.checkpoints.errors import UnsupportedError, shown
from entropy_probe.checkpoints.formats.base import CheckpointFormat, StoredTensor, Weights, named_weights
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer, read_optimizer
from entropy_probe.checkpoints.safe_read import read_archive


class Accelerate(CheckpointFormat):
    """Two files in the directory; the weights are more often safetensors."""

    def optimizer_at(self, path: Path) -> Path | None:
        """The file."""
        return _file(path / "optimizer.bin")

    def optimizer(self, place: Path) -> SavedOptimizer:
        """Its state, by number or by name."""
        _refuse_several(place)
        return read_optimizer(place)

    def weights_at(self, path: Path) -> Path | None:
        """The file that FSDP gathered."""
        return _file(path / "pytorch_model_fsdp.bin")

    def weights(self, place: Path) -> Weights:
        """Its tensors, of a model or an adapter, mapped from the file."""
        _refuse_several(place)
        state_dict = read_archive(place, "save the model's own state_dict")
        if not (isinstance(state_dict, dict) and state_dict and all(map(_is_weight, state_dict.items()))):
            raise UnsupportedError(
                f"{place}: expected dense tensors by name, got {shown(state_dict)}; save the model's own state_dict"
            )
        tensors = {name: StoredTensor(place, tuple(x.shape), x.detach) for name, x in state_dict.items()}
        return named_weights(place, tensors)


FORMAT = Accelerate()


def _file(file: Path) -> Path | None:
    return file if file.is_file() else None


def _refuse_several(file: Path) -> None:
    """Of several models or optimizers, as of a policy and a value model, accelerate numbers all but the first."""
    second = file.with_name(f"{file.stem}_1{file.suffix}")
    if second.is_file():
        raise UnsupportedError(
            f"{second}: not supported: several models or optimizers; move the files of the others elsewhere and pass "
            "the policy's"
        )


def _is_weight(item: tuple[object, object]) -> bool:
    name, value = item
    dense = isinstance(value, Tensor) and value.layout == torch.strided and value.is_contiguous()
    return isinstance(name, str) and name.isprintable() and dense
