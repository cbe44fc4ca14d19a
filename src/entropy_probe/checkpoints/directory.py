"""A directory before anything in it is opened: is it a checkpoint, whose, and does everything in it stay in it.

Directories that other trainers leave are recognised by the names of their files, so that they are called by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from entropy_probe.checkpoints.errors import InvalidValueError, MissingFileError, UnsafeFileError, UnsupportedError
from entropy_probe.checkpoints.formats import CheckpointFormat, optimizer_of, weights_of
from entropy_probe.checkpoints.safe_read import read_json
from entropy_probe.results.record import check_utf8

MAX_ENTRIES = 20_000
"""Files and folders that are looked at below a directory."""


def open_directory(path: Path) -> Path:
    """The checkpoint directory, of which nothing is known yet but that it is one."""
    if not path.is_dir():
        raise MissingFileError(f"{path}: expected a checkpoint directory, found none; check the path")
    try:
        check_utf8(path)
    except ValueError as error:
        raise UnsupportedError(f"checkpoint: {error}") from error
    if any((path / name).is_file() for name in ("config.json", "model.safetensors")):
        return path
    if not adapters_of(path) and weights_of(path) is None:
        inside = [str(place.relative_to(path)) for place in checkpoints_below(path)]
        if inside and optimizer_of(path) is None:
            raise MissingFileError(
                f"{path}: expected a checkpoint, got a directory of checkpoints; pass one of "
                f"{', '.join(inside[-3:])} inside it"
            )
        _refuse_other_trainers(path, "a checkpoint that is read")
        raise MissingFileError(
            f"{path}: expected adapter_config.json, config.json or weights, found none; pass a checkpoint-N of the "
            "Trainer, or a directory of torch.distributed.checkpoint"
        )
    return path


def adapters_of(path: Path) -> dict[str, Path]:
    """Adapters by name: ``default`` in the checkpoint itself, every other in a folder of its name."""
    adapters = {"default": path} if (path / "adapter_config.json").is_file() else {}
    folders = [file.parent for file in sorted(path.glob("*/adapter_config.json"))]
    return adapters | {folder.name: folder for folder in folders if optimizer_of(folder) is None}


def find_optimizer(path: Path) -> tuple[CheckpointFormat, Path]:
    """The format of the optimizer's state, and its place."""
    optimizer = optimizer_of(path)
    if optimizer is None:
        _refuse_other_trainers(path, "optimizer.pt")
        raise MissingFileError(
            f"{path / 'optimizer.pt'}: expected the optimizer's state, found no such file; train with "
            "save_only_model=False, or copy the whole checkpoint again"
        )
    return optimizer


def _refuse_other_trainers(path: Path, expected: str) -> None:
    whose = whose_directory(path)
    if whose is not None:
        raise UnsupportedError(f"{path}: expected {expected}, {whose}")


def check_contained(path: Path) -> None:
    """Check that no entry of a directory leads outside or could block.

    A link may point within the directory, or into ``blobs/`` of the Hugging Face cache the directory is in.
    """
    allowed = [path.resolve(), *_cache_blobs(path)]
    for entry in sorted(path.rglob("*")):
        target = entry.resolve()
        if entry.is_symlink() and not any(target.is_relative_to(root) for root in allowed):
            raise UnsafeFileError(
                f"{entry}: expected a file of the checkpoint, got a link to {target} outside it; replace it by a copy "
                "if you trust it"
            )
        if target.exists() and not (target.is_file() or target.is_dir()):
            raise UnsafeFileError(f"{entry}: expected a file, got a pipe or device; delete it")


def _cache_blobs(path: Path) -> Iterator[Path]:
    """Where the links of a Hugging Face cache point: ``<repo>/blobs`` beside ``<repo>/snapshots/<revision>``."""
    for parent in (path.absolute(), *path.absolute().parents):
        if parent.parent.name == "snapshots":
            yield (parent.parent.parent / "blobs").resolve()


def read_global_step(path: Path) -> int | None:
    """Optimizer steps taken, from ``trainer_state.json``; None when the file is not there."""
    file = path / "trainer_state.json"
    if not file.is_file():
        return None
    step = read_json(file).get("global_step")
    if type(step) is not int or step < 0:
        raise InvalidValueError(
            f"{file}: global_step: expected a whole number, got {step!r:.60}; copy the checkpoint again"
        )
    return step


_NAMED = re.compile(r"checkpoint-(\d+)|(?:global_step_?|step_|iter_)(\d+)(?:_hf)?")


def named_step(path: Path) -> int | None:
    """The trainer's step: of ``trainer_state.json``, else of the name of the directory, or of one around it.

    Other than the optimizer's where a trainer takes several optimizer steps on the rollouts of one.
    """
    told = read_global_step(path)
    if told is not None:
        return told
    optimizer = optimizer_of(path)
    places = (*([] if optimizer is None else [optimizer[1]]), path.absolute(), *path.absolute().parents[:2])
    matches = filter(None, (_NAMED.fullmatch(place.name) for place in places))
    return next((int(match[1] or match[2]) for match in matches), None)


class _Trace(NamedTuple):
    """Patterns of files, of which one below a directory gives a trainer away; who wrote it, and what can be done."""

    files: tuple[str, ...]
    what: str
    remedy: str


_ANOTHER_SAVE = (
    "what is read: the Hugging Face Trainer's, DeepSpeed's, verl's with FSDP, and torch.distributed.checkpoint"
)
_TRACES = (
    _Trace(
        ("*_world_size_*_rank_*.pt",),
        "a folder of verl, SkyRL or AReaL's that is none",
        "pass the one with optim_world_size_W_rank_R.pt and model_world_size_W_rank_R.pt of every rank (actor or "
        "policy), saved with save_contents: [model, optimizer, extra]",
    ),
    _Trace(
        ("*_optim_states.pt", "*mp_rank_*_model_states.pt", "zero_to_fp32.py"),
        "a folder of DeepSpeed's (OpenRLHF, or the Trainer with it) that is none",
        "pass the one with *_optim_states.pt of every rank, global_stepN or that above with latest; every rank saves "
        "on its own machine, copy the files of all into one folder",
    ),
    _Trace(
        ("zero/*/exp_avg.pt",),
        "a checkpoint of DeepSpeed-Universal, with a file per parameter, which is not read",
        "pass the global_stepN that it was converted from",
    ),
    _Trace(
        ("mp_rank_*/distrib_optim.pt", "mp_rank_*/model_optim_rng.pt", "common.pt"),
        "a checkpoint of Megatron (slime, Miles, verl, NeMo-RL or ms-swift with it), whose optimizer's state is not "
        "read: buckets without names, of tensors that are fused and stacked over layers",
        f"no conversion keeps it, Megatron-Bridge has the weights only, so save from the FSDP backend; {_ANOTHER_SAVE}",
    ),
    _Trace(
        ("shard-[0-9]*-model-[0-9]*.safetensors", ".hf_metadata"),
        "weights of NeMo AutoModel (NeMo-RL's DTensor v2) as safetensors in a piece for each rank, which are not read",
        f"save with model_save_format: torch_save; {_ANOTHER_SAVE}",
    ),
    _Trace(
        ("recipe_state.pt", "recipe_state", "hf_model_*_of_*.safetensors", "hf_model_[0-9]*.safetensors"),
        "a checkpoint of torchtune, whose optimizer's state in recipe_state.pt, under names of its own models, is not "
        "read",
        f"no conversion keeps it; {_ANOTHER_SAVE}",
    ),
)


def whose_directory(path: Path) -> str | None:
    """Who wrote a directory, or one above or right below it, and what to do; None if no name in it tells."""
    for place in (path, path.parent):
        names = list(_below(place, 5 if place == path else 1))
        for trace in _TRACES:
            file = next((name for name in names if any(name.match(pattern) for pattern in trace.files)), None)
            if file is not None:
                return f"got {trace.what} (it has {file.relative_to(place)}); {trace.remedy}"
    return None


def checkpoints_below(path: Path) -> list[Path]:
    """Directories down to four levels below that hold an optimizer's state that is read, in order of their numbers."""
    checkpoints: list[Path] = []
    for place in _below(path, 4):
        inside = any(parent in checkpoints for parent in place.parents)  # a checkpoint's own folders are none
        if not inside and place.is_dir() and optimizer_of(place) is not None:
            checkpoints.append(place)
    return sorted(checkpoints, key=lambda place: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", str(place))])


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
