"""``entropy-probe manifest``: record what a checkpoint holds, beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entropy_probe.cli.options import (
    Adapter,
    BaseModel,
    Copy,
    Mapping,
    Policy,
    Quantization,
    parse_mapping,
    parse_quantization,
)


def manifest(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint directory.")],
    base_model: BaseModel = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    mapping: Mapping = None,
    weights: Copy = "masters",
    policy: Policy = None,
) -> None:
    """Write parameter names, shapes and a hash of every file beside a checkpoint.

    The manifest says how the names were established; only one written during training proves them
    (entropy_probe.integrations.trl.ManifestCallback).
    """
    from entropy_probe import __version__
    from entropy_probe.checkpoints.record import record_checkpoint
    from entropy_probe.report.text import printable

    path, report = record_checkpoint(
        checkpoint,
        base_model,
        written_by=f"entropy-probe {__version__}",
        adapter=adapter,
        quantization=parse_quantization(quantization),
        mapping=parse_mapping(mapping),
        weights=weights,
        policy=policy,
    )
    assert report.optimizer_state is not None
    typer.echo(printable(f"Wrote {path}: mapping by {report.optimizer_state.mapping}"))
    for note in report.notes:
        typer.echo(printable(f"note: {note.text}"), err=True)
        typer.echo(printable(f"  {note.remedy}"), err=True)
