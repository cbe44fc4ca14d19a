"""``entropy-probe schema``: the keys of a config file as a JSON schema, for editors to complete, explain and check."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

SCHEMA_FILE = "probe.schema.json"
_ATTRIBUTES = re.compile(r"^Attributes:\n(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
_ATTRIBUTE = re.compile(r"^    (\w+): (.*?)(?=^    \w|\Z)", re.MULTILINE | re.DOTALL)
_ROLE = re.compile(r":\w+:`~?([^`]+)`|``([^`]+)``")


def schema() -> None:
    """Print the JSON schema of config files, by which editors complete, explain and check them."""
    typer.echo(schema_text(), nl=False)


def schema_text() -> str:
    """The schema as a file has it."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def described(model: type[BaseModel]) -> dict[str, str]:
    """What the docstrings of a section's classes say of its keys, each on one line."""
    return {
        name: " ".join(text.split())
        for base in reversed(model.__mro__)
        for section in _ATTRIBUTES.findall(inspect.cleandoc(vars(base).get("__doc__") or ""))
        for name, text in _ATTRIBUTE.findall(section)
    }


def json_schema() -> dict[str, Any]:
    """The schema of what ``run``, ``validate`` and ``sweep`` read; of the loss, the keys of every trainer's."""
    from entropy_probe.cli.sweep_config import SweepConfig
    from entropy_probe.losses import Loss, trainers

    whole = SweepConfig.model_json_schema(schema_generator=_Described)
    whole["title"], whole["description"] = "entropy-probe", "A config file of entropy-probe."
    # a sweep's own keys are not needed by a run, and its checkpoints take the place of the one
    whole["required"] = [key for key in whole["required"] if key not in ("sweep", "checkpoint")]
    families = {name: kind.model_json_schema(schema_generator=_Described) for name, kind in trainers().items()}
    for name, family in families.items():
        whole["$defs"] |= family.pop("$defs", {})
        family["properties"]["trainer"] = {"const": name, "description": described(Loss)["trainer"]}
        family["required"] = ["trainer", *family.get("required", ())]
    whole["$defs"]["Loss"] = {"oneOf": list(families.values()), "description": _summary(Loss)}
    return {"$schema": GenerateJsonSchema.schema_dialect, **whole}


class _Described(GenerateJsonSchema):
    """With the docstrings' words on every key."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        json_schema = super().model_schema(schema)
        words = described(schema["cls"])
        for name, key in json_schema.get("properties", {}).items():
            key.pop("title", None)
            if name in words:
                key["description"] = _plain(words[name])
        return json_schema | {"description": _summary(schema["cls"])}


def _summary(model: type[BaseModel]) -> str:
    return _plain((inspect.getdoc(model) or "").partition("\n")[0])


def _plain(text: str) -> str:
    return _ROLE.sub(lambda match: f"`{match[1] or match[2]}`", text)
