"""The manifest: which parameter each optimizer entry belongs to, and a hash of every file, beside the checkpoint.

Written during training it holds names from the live optimizer and model, so the mapping is proven. Written later it
holds what was established then, and says so. The format is described in ``docs/checkpoints.md``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from entropy_probe.checkpoints.errors import (
    CheckpointError,
    DamagedFileError,
    MappingError,
    MismatchError,
    MissingFileError,
    UnsafeFileError,
)
from entropy_probe.results.record import write_atomically

MANIFEST_FILE = "entropy-probe-manifest.json"
NEVER_READ = ("scheduler.pt", "rng_state")
"""Beginnings of the names of files that loading never opens, so that their hashes are recorded but not verified."""

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Module names that ``torch.compile``, FSDP and activation checkpointing insert anywhere in a path."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """Size in bytes and SHA-256 of a file; the hash is null where it was not wanted."""

    size: int
    sha256: str | None


class ParameterRecord(_Record):
    """One parameter, in the optimizer's order; ``dtype`` is null where it is not known."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None

    @classmethod
    def of(cls, name: str, shape: Sequence[int], dtype: torch.dtype | None) -> ParameterRecord:
        """The record of a parameter."""
        known = None if dtype is None else str(dtype).removeprefix("torch.")
        return cls(name=name, shape=tuple(shape), dtype=known)


class GroupRecord(_Record):
    """One parameter group: its parameters in order, and its plain settings (``lr``, ``betas``, ``weight_decay`` …)."""

    parameters: tuple[ParameterRecord, ...]
    settings: dict[str, Any]


class BaseModelRecord(_Record):
    """The model under an adapter, or the one full weights started from; files only where it is a local directory."""

    name: str
    files: dict[str, FileRecord] | None


class Manifest(_Record):
    """What ``entropy-probe-manifest.json`` holds.

    Attributes:
        format: the name of the format.
        version: of the format.
        recorded: during ``training``, from the live optimizer and model, or by ``inspection`` of the files later.
        mapping: how the names were established.
        written_by: this package's version.
        global_step: optimizer steps taken; null when it was not known.
        optimizer: the optimizer's class.
        adapter: the name of the adapter that was trained; null for full weights and where several were.
        groups: its parameter groups.
        files: the files of the directory by name, those of an adapter in a folder of its own as ``folder/name``.
        base_model: see :class:`BaseModelRecord`.
        quantization: the settings with which the base model was quantised in training; null for plain weights, and by
            inspection, which cannot know.
    """

    format: Literal["entropy-probe-manifest"] = "entropy-probe-manifest"
    version: Literal[1] = 1
    recorded: Literal["training", "inspection"]
    mapping: str
    written_by: str
    global_step: int | None
    optimizer: str
    adapter: str | None = None
    groups: tuple[GroupRecord, ...]
    files: dict[str, FileRecord]
    base_model: BaseModelRecord | None = None
    quantization: dict[str, Any] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names in the optimizer's order."""
        return tuple(parameter.name for group in self.groups for parameter in group.parameters)

    @property
    def proof(self) -> str:
        """How the mapping is established by this manifest, for reports; never more than it records."""
        count = len(self.names)
        if self.recorded == "training":
            return f"manifest (from the live optimizer, {count} tensors)"
        return f"manifest (by inspection: {self.mapping})"

    def check_optimizer(self, path: Path, groups: Sequence[Mapping[str, Any]]) -> None:
        """Check that an optimizer file has the recorded groups with the recorded settings."""
        sizes = [len(group["params"]) for group in groups]
        recorded = [len(group.parameters) for group in self.groups]
        if sizes != recorded:
            raise MappingError(
                f"{path}: expected groups of the manifest's sizes {recorded}, got {sizes}; {_COPY}, or pass the policy "
                "where the manifest was recorded with one"
            )
        for i, (group, record) in enumerate(zip(groups, self.groups, strict=True)):
            settings = plain_settings(group)
            for key in sorted(settings.keys() & record.settings.keys()):
                if settings[key] != record.settings[key]:
                    raise MappingError(
                        f"{path}: group {i}: {key}: expected the manifest's {record.settings[key]!r:.60}, got "
                        f"{settings[key]!r:.60}; {_COPY}"
                    )

    def check_shapes(self, path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check the shapes of parameters against the recorded ones."""
        for parameter in (p for group in self.groups for p in group.parameters):
            got = list(shapes[parameter.name])
            if got != list(parameter.shape):
                raise MismatchError(
                    f"{path}: {parameter.name}: expected the recorded shape {list(parameter.shape)}, got {got}; {_COPY}"
                )


_COPY = "a file was replaced after the manifest was written, copy the checkpoint again"


def plain_name(name: str) -> str:
    """A parameter's name in the unwrapped model; ``module.`` of DistributedDataParallel comes off the front only."""
    return ".".join(part for part in name.removeprefix("module.").split(".") if part not in _WRAPPERS)


def live_groups(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[GroupRecord, ...]:
    """The groups of a live optimizer, by the names its parameters have in the model.

    Raises:
        ValueError: if the optimizer holds a tensor that is not a parameter of the model, as with sharded training.
    """
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    records = []
    for group in optimizer.param_groups:
        strangers = sum(id(p) not in names for p in group["params"])
        if strangers:
            raise ValueError(
                f"optimizer: expected parameters of the model, got {strangers} other tensors; the manifest needs an "
                "optimizer over the model's own parameters (no FSDP, no DeepSpeed)"
            )
        parameters = tuple(ParameterRecord.of(names[id(p)], p.shape, p.dtype) for p in group["params"])
        records.append(GroupRecord(parameters=parameters, settings=plain_settings(group)))
    return tuple(records)


def plain_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that JSON keeps exactly: finite numbers, flags, text, and short lists of numbers."""
    plain = {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
    return {key: value for key, value in plain.items() if value is not ...}


def _plain(value: Any) -> Any:
    """A value as JSON will give it back, numbers as floats; ``...`` for what it would not."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return _plain(value.item())
    if isinstance(value, tuple | list):
        items = [... if isinstance(x, tuple | list) else _plain(x) for x in value]
        return items if all(type(x) is float for x in items) else ...
    if value is None or type(value) in (bool, str):
        return value
    return float(value) if type(value) in (int, float) and math.isfinite(value) else ...


def record_files(directory: Path, files: Iterable[Path], *, hashes: bool = True) -> dict[str, FileRecord]:
    """Size and SHA-256 of files, by their path in a directory."""
    return {
        path.relative_to(directory).as_posix(): FileRecord(
            size=path.stat().st_size, sha256=_sha256(path) if hashes else None
        )
        for path in sorted(files)
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_record(name: str, weights: Sequence[Path] | None, *, hashes: bool = True) -> BaseModelRecord:
    """The base model by name and, where its weight files are known, their hashes."""
    return BaseModelRecord(
        name=name, files=record_files(weights[0].parent, weights, hashes=hashes) if weights else None
    )


def write_manifest(directory: Path, manifest: Manifest) -> Path:
    """Write the manifest; it appears whole or not at all."""
    path = directory / MANIFEST_FILE
    write_atomically(path, (json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n").encode())
    return path


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a checkpoint; None when it has none."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (ValidationError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "nested too deeply"}
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DamagedFileError(
            f"{path}: expected a manifest of version 1, got: {where}: {first['msg']}; copy the checkpoint again, or "
            "delete the manifest to go by the Trainer's rules"
        ) from error
    base = manifest.base_model.files or {} if manifest.base_model else {}
    for name, depth in [*((n, 2) for n in manifest.files), *((n, 1) for n in base)]:
        parts = name.split("/")
        if len(parts) > depth or not {"", ".", ".."}.isdisjoint(parts) or "\\" in name or "\0" in name:
            raise UnsafeFileError(
                f"{path}: files: expected names in the directory or a folder of an adapter, got {name!r:.200}; it was "
                "not opened"
            )
    return manifest


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Check every recorded file that loading may read against its size and hash."""
    for name, record in sorted(manifest.files.items()):
        if not name.rpartition("/")[2].startswith(NEVER_READ):
            _verify(directory / name, record, DamagedFileError)


def check_recorded(directory: Path, files: Iterable[Path], manifest: Manifest) -> None:
    """Check that files of a checkpoint which loading reads are among the recorded ones."""
    for path in files:
        if path.relative_to(directory).as_posix() not in manifest.files:
            raise MismatchError(
                f"{path}: expected a file that {MANIFEST_FILE} records, got one that it does not; it was added later, "
                "remove it or write the manifest again"
            )


def verify_base(base: Path, manifest: Manifest) -> None:
    """Check a base model's weight files against the recorded ones, where they were recorded."""
    if manifest.base_model is not None:
        for name, record in sorted((manifest.base_model.files or {}).items()):
            _verify(base / name, record, MismatchError, "this is not the base model of the manifest; pass that one")


def _verify(path: Path, record: FileRecord, error: type[CheckpointError], remedy: str = _COPY) -> None:
    if not path.is_file():
        raise MissingFileError(f"{path}: expected the file that {MANIFEST_FILE} records, found none; {remedy}")
    size = path.stat().st_size
    if size != record.size:
        raise error(f"{path}: expected the recorded {record.size:,} bytes, got {size:,}; {remedy}")
    if record.sha256 is not None and _sha256(path) != record.sha256:
        raise error(f"{path}: expected the recorded SHA-256 {record.sha256[:12]}…, got another; {remedy}")
