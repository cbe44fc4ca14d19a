"""``entropy-probe inspect``: what a checkpoint holds, without a forward pass."""

from __future__ import annotations

import json
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
    TrainerConfig,
    parse_mapping,
    parse_quantization,
)

EXIT_CODES = {"healthy": 0, "suspicious": 1, "unusable": 2}


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint directory.")],
    base_model: BaseModel = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    mapping: Mapping = None,
    weights: Copy = "masters",
    policy: Policy = None,
    trainer_config: TrainerConfig = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show a checkpoint's optimizer state and whether it can be probed.

    Exit code 0 when it is healthy, 1 when it is suspicious, 2 when it is unusable.
    """
    from rich.console import Console

    from entropy_probe.checkpoints import inspect_checkpoint
    from entropy_probe.report import checkpoint_section, print_sections

    settings = parse_quantization(quantization)
    report = inspect_checkpoint(
        checkpoint,
        base_model,
        adapter=adapter,
        quantization=settings,
        mapping=parse_mapping(mapping),
        weights=weights,
        policy=policy,
        trainer_config=trainer_config,
    )
    if as_json:
        typer.echo(json.dumps(report.model_dump(mode="json"), indent=2))
    else:
        print_sections([checkpoint_section(report)], Console())
    raise typer.Exit(EXIT_CODES[report.verdict])
