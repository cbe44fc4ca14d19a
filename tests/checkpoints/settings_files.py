"""Files of trainers' settings, instruction by instruction."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import torch

from entropy_probe.checkpoints.trainer_settings import TRAINING_ARGS

__all__ = ["GRPO", "pickled_settings", "saved_settings"]

GRPO = {"loss_type": "dapo", "beta": 0.0, "epsilon": 0.2, "num_generations": 4, "use_bias_correction_kl": True}
"""Some of what ``GRPOConfig`` has."""


def saved_settings(directory: Path, pickled: bytes) -> Path:
    """A directory with that pickle in the archive that ``torch.save`` makes."""
    stream, made = io.BytesIO(), directory / TRAINING_ARGS
    torch.save(0, stream)
    source = zipfile.ZipFile(stream)
    with zipfile.ZipFile(made, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, pickled if name.endswith("data.pkl") else source.read(name))
    return directory


def pickled_settings(named: str = "trl.trainer.grpo_config GRPOConfig", inside: bytes = b"", **state: object) -> bytes:
    """The pickle of an object of a class with this state, and more instructions inside that set further items."""
    module, _, name = named.partition(" ")
    new = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")\x81"
    return new + pickle.dumps(state, 2)[2:-1] + inside + b"b."
