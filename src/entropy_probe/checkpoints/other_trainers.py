"""Directories that other trainers leave, recognised by the names of their files, and where checkpoints lie in a run.

Nothing is opened here: a name says who wrote a directory, and so what to say of it in place of "no checkpoint".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

__all__ = ["checkpoints_below", "whose_directory"]

MAX_ENTRIES = 20_000
"""Files and folders that are looked at below a directory."""


@dataclass(frozen=True)
class _Trace:
    """Files that give a trainer away.

    Attributes:
        files: patterns, one of which has to match below the directory.
        what: who wrote it, and what its optimizer's state is kept in.
        remedy: what can be done.
    """

    files: tuple[str, ...]
    what: str
    remedy: str


_ANOTHER_SAVE = "what is read: the Hugging Face Trainer's on one GPU, DDP or FSDP2, and torch.distributed.checkpoint"
_TRACES = (
    _Trace(
        ("optim_world_size_*_rank_*.pt",),
        "a checkpoint of verl, SkyRL or AReaL, whose optimizer's state in optim_world_size_W_rank_R.pt is not read yet",
        f"verl's model merger converts the weights only; {_ANOTHER_SAVE}",
    ),
    _Trace(
        ("*_optim_states.pt", "mp_rank_*_model_states.pt", "zero_to_fp32.py"),
        "a checkpoint of DeepSpeed (OpenRLHF, or the Trainer with it), whose optimizer's state in "
        "global_stepN/*_optim_states.pt is not read yet",
        f"zero_to_fp32.py converts the weights only; {_ANOTHER_SAVE}",
    ),
    _Trace(
        ("mp_rank_*/distrib_optim.pt", "mp_rank_*/model_optim_rng.pt", "common.pt"),
        "a checkpoint of Megatron, whose optimizer's state in buckets of its own is not read",
        f"Megatron-Bridge converts the weights only; {_ANOTHER_SAVE}",
    ),
    _Trace(
        ("recipe_state.pt", "recipe_state", "hf_model_*_of_*.safetensors", "hf_model_[0-9]*.safetensors"),
        "a checkpoint of torchtune, whose optimizer's state in recipe_state.pt, under names of its own, is not read",
        _ANOTHER_SAVE,
    ),
    _Trace(
        ("pytorch_model_fsdp.bin",),
        "a checkpoint of accelerate's FSDP with FULL_STATE_DICT, whose weights in the pickle pytorch_model_fsdp.bin "
        "are not read",
        "load that file with torch.load(weights_only=True), write it with safetensors.torch.save_file to "
        "model.safetensors beside optimizer.bin, and pass base_model for the configuration",
    ),
)


def whose_directory(path: Path) -> str | None:
    """Who wrote a directory that is not read, and what to do; None if no name in it tells.

    Args:
        path: the directory, or one above or right below it.
    """
    for place in (path, path.parent):
        names = list(_below(place, 5 if place == path else 1))
        for trace in _TRACES:
            found = next((name for name in names if any(name.match(pattern) for pattern in trace.files)), None)
            if found is not None:
                return f"got {trace.what} (it has {found.relative_to(place)}); {trace.remedy}"
    return None


def checkpoints_below(path: Path) -> list[Path]:
    """Directories down to three levels below that hold an optimizer's state that is read, in order of their numbers."""
    files = [p for p in _below(path, 5) if p.name in ("optimizer.pt", "optimizer.bin", ".metadata")]
    found = {file.parent.parent if file.parent.name in _OPTIMIZER_FOLDERS else file.parent for file in files}
    return sorted(
        (place for place in found - {path} if place.is_relative_to(path)),
        key=lambda place: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", str(place))],
    )


_OPTIMIZER_FOLDERS = ("optimizer_0", "pytorch_model_fsdp_0", "optimizer", "model", "weights")


def _below(path: Path, depth: int) -> Iterator[Path]:
    """Files and folders down to some depth, links not followed, up to a bound."""

    def walk(place: Path, left: int) -> Iterator[Path]:
        try:
            entries = sorted(place.iterdir())
        except OSError:
            return
        yield from entries
        for entry in entries:
            if left > 1 and entry.is_dir() and not entry.is_symlink():
                yield from walk(entry, left - 1)

    return islice(walk(path, depth), MAX_ENTRIES)
