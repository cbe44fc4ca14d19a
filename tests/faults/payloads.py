"""Pickles that make a directory when they are loaded the unsafe way, in the three formats torch reads."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def zip_pickle(path: Path, value: Any) -> None:
    torch.save(value, path)


def legacy_pickle(path: Path, value: Any) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def raw_pickle(path: Path, value: Any) -> None:
    path.write_bytes(pickle.dumps(value))
