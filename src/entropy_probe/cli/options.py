"""Options that several commands on a checkpoint share."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer

__all__ = ["Adapter", "BaseModel", "Copy", "Policy", "Quantization", "parse_quantization"]

BaseModel = Annotated[
    str | None,
    typer.Option(help="The base model of an adapter; with full weights, the model that training started from."),
]
Adapter = Annotated[str | None, typer.Option(help="The adapter that was trained, where there are several.")]
Quantization = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="The BitsAndBytesConfig with which training quantised the base model while loading it, such as "
        '{"load_in_4bit": true}.',
    ),
]
Copy = Annotated[
    Literal["masters", "rounded"],
    typer.Option(help="Which weights, where the optimizer keeps float32 copies of rounded ones (DeepSpeed)."),
]
Policy = Annotated[
    str | None,
    typer.Option(help="The policy's name in the module of one optimizer over it and a value model (PPO)."),
]


def parse_quantization(text: str | None) -> dict[str, Any] | None:
    """The settings given on the command line.

    Raises:
        ValueError: if they are not a JSON object.
    """
    if text is None:
        return None
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--quantization: expected a JSON object, got {text!r:.60}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f'--quantization: expected a JSON object such as {{"load_in_4bit": true}}, got {text!r:.60}')
    return settings
