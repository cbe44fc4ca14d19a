"""Write the manifest of a checkpoint that has none, with what its files allow to establish and no more."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.adapters import Quantization
from entropy_probe.checkpoints.directory import adapters_of, open_directory
from entropy_probe.checkpoints.errors import CheckpointError, MappingError, UnsupportedError
from entropy_probe.checkpoints.examine import Examined, Request, examine
from entropy_probe.checkpoints.formats import folders
from entropy_probe.checkpoints.libraries import random_state_kept
from entropy_probe.checkpoints.load import report_on
from entropy_probe.checkpoints.manifest import (
    MANIFEST_FILE,
    FileRecord,
    GroupRecord,
    Manifest,
    ParameterRecord,
    base_record,
    plain_settings,
    record_files,
    write_manifest,
)
from entropy_probe.checkpoints.mapping import StatedMapping
from entropy_probe.checkpoints.masters import Copy
from entropy_probe.checkpoints.weights import has_weights, read_weights
from entropy_probe.results.checkpoint import CheckpointReport
from entropy_probe.results.record import file_errors


def recordable_files(directory: Path, *, hashes: bool = True) -> dict[str, FileRecord]:
    """Size and SHA-256 of the files of a checkpoint and its adapters, without the manifest and hidden files."""
    places = {directory, *adapters_of(directory).values()}
    files = [p for place in places for p in place.iterdir() if p.is_file() and not p.name.startswith(".")]
    return record_files(directory, (p for p in files if p != directory / MANIFEST_FILE), hashes=hashes)


@file_errors(CheckpointError)
def record_checkpoint(
    path: str | Path,
    base_model: str | Path | None = None,
    *,
    written_by: str,
    adapter: str | None = None,
    quantization: Quantization | None = None,
    mapping: StatedMapping | None = None,
    weights: Copy = "masters",
    policy: str | None = None,
) -> tuple[Path, CheckpointReport]:
    """Examine a checkpoint, with the arguments of ``load_checkpoint``, and write its manifest.

    The manifest says that it was recorded by inspection, and by which rule the mapping was established: it proves that
    the files have not changed since, not that the mapping was right. It does not record the quantization.

    Returns:
        The manifest's path, and the report of the examination it rests on.

    Raises:
        CheckpointError: if the checkpoint would not load, has a manifest already, or its entries seem exchanged.
    """
    directory = open_directory(Path(path))
    if (directory / MANIFEST_FILE).exists():
        raise CheckpointError(
            f"{directory / MANIFEST_FILE}: expected no manifest yet, got one, which may prove more than a new one; "
            "delete it to write another"
        )
    if folders(directory):
        raise UnsupportedError(
            f"{directory}: not supported: a manifest of a sharded checkpoint, which has the parameters' names in "
            "it; load it without one"
        )
    request = Request(directory, base_model, adapter, quantization, mapping, weights, policy, any_trainer=True)
    facts: dict[str, Any] = {}
    with random_state_kept():
        examined = examine(request, facts)
    report = report_on(examined, facts)
    if report.movement is not None and report.movement.exchanged:
        raise MappingError(f"{directory}: expected a mapping to record, got a doubtful one: {report.reasons[0]}")
    manifest = _manifest(examined, request, written_by)
    try:
        return write_manifest(directory, manifest), report
    except OSError as error:
        raise CheckpointError(
            f"{directory}: expected a directory that can be written, got: {os.strerror(error.errno or errno.EIO)}; "
            "copy the checkpoint to one"
        ) from error


def _manifest(examined: Examined, request: Request, written_by: str) -> Manifest:
    saved, names, facts = examined.saved, examined.mapping.names, examined.model.layout.parameters
    adapter = examined.model.adapter
    groups = tuple(
        GroupRecord(
            parameters=tuple(
                ParameterRecord.of(names[i], facts[names[i]].shape, saved.dtype(i)) for i in group["params"]
            ),
            settings=plain_settings(group),
        )
        for group in saved.groups
    )
    base = adapter.base if adapter is not None else str(request.base_model) if request.base_model else None
    local = base is not None and has_weights(Path(base), "model")
    return Manifest(
        recorded="inspection",
        mapping=examined.mapping.how,
        written_by=written_by,
        global_step=examined.global_step,
        optimizer=saved.kind.name,
        adapter=None if adapter is None else adapter.name,
        groups=groups,
        files=recordable_files(examined.path),
        base_model=base_record(base, read_weights(Path(base), "model").files if local else None) if base else None,
    )
