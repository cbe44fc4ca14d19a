"""The checkpoint formats that are read, one module each: a new one is one file beside these, with a ``FORMAT``."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from entropy_probe.checkpoints.formats.base import CheckpointFormat, StoredTensor, Weights

__all__ = ["FORMATS", "CheckpointFormat", "StoredTensor", "Weights", "folders", "home_of", "optimizer_of", "weights_of"]


def _members() -> tuple[CheckpointFormat, ...]:
    names = {module.name for module in pkgutil.iter_modules(__path__)} - {"base"}
    return tuple(
        importlib.import_module(f"{__name__}.{name}").FORMAT
        for name in sorted(names, key=lambda name: (name != "trainer", name))
    )


FORMATS = _members()
"""In the order in which they are asked: the Hugging Face Trainer's own first."""


def optimizer_of(path: Path) -> tuple[CheckpointFormat, Path] | None:
    """The format of a directory's optimizer state, and its place; None if it has none that is read."""
    places = ((member, member.optimizer_at(path)) for member in FORMATS)
    return next(((member, place) for member, place in places if place is not None), None)


def weights_of(path: Path) -> tuple[CheckpointFormat, Path] | None:
    """The same of full weights other than safetensors."""
    places = ((member, member.weights_at(path)) for member in FORMATS)
    return next(((member, place) for member, place in places if place is not None), None)


def home_of(path: Path) -> Path:
    """The folder of a directory's configuration and tokenizer."""
    place = weights_of(path) or optimizer_of(path)
    return path if place is None or (path / "config.json").is_file() else place[0].configuration_at(path)


def folders(path: Path) -> set[Path]:
    """The folders, the directory itself among them, of which every file belongs to its state."""
    return {place for _, place in filter(None, (optimizer_of(path), weights_of(path))) if place.is_dir()}
