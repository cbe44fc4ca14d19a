"""Arguments and options that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Replace single settings, such as update.group_size=4."),
]
OutputDir = Annotated[Path | None, typer.Option(help="Where the results go.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the output directory.")]
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
TrainerConfig = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The trainer's own config (verl, OpenRLHF, prime-rl: YAML, JSON, TOML, or the script with its command), "
        "where it does not lie beside the checkpoint.",
    ),
]
TrustConfig = Annotated[
    bool,
    typer.Option("--trust-config", help="Go by the config where the checkpoint's files say otherwise of training."),
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Import the functions that the config names, which runs their modules."),
]
Mapping = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|JSON",
        help="Which parameters the entries of an optimizer file without names belong to: a file with a name on each "
        """line, or expressions with the group of what they match, such as {"lora_A": 0, "lora_B": 1}.""",
    ),
]


def parse_mapping(text: str | None) -> str | dict[str, int] | None:
    """The mapping given on the command line: a path, or an object in JSON.

    Raises:
        ValueError: if it begins as an object and is not one of whole numbers.
    """
    if text is None or not text.lstrip().startswith("{"):
        return text
    groups = _parse_object("--mapping", '{"lora_A": 0, "lora_B": 1}', text)
    if not all(type(group) is int for group in groups.values()):
        raise ValueError(f"--mapping: expected the number of a group for each expression, got {text!r:.60}")
    return groups


def parse_quantization(text: str | None) -> dict[str, Any] | None:
    """The settings given on the command line, a JSON object."""
    return None if text is None else _parse_object("--quantization", '{"load_in_4bit": true}', text)


def _parse_object(option: str, example: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option}: expected a JSON object, got {text!r:.60}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{option}: expected a JSON object such as {example}, got {text!r:.60}")
    return value
