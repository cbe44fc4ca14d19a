"""``entropy-probe schema``, and what a shell completes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from entropy_probe.cli.schema import SCHEMA_FILE, json_schema
from entropy_probe.cli.sweep_config import SweepConfig
from entropy_probe.losses import trainers
from tests.cli.conftest import execute, invoke


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    done = invoke("schema")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def sections(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Everything that has keys."""
    yield schema
    for section in schema["$defs"].values():
        yield from section.get("oneOf", [section])


def test_every_key_is_described(schema):
    keys = [
        (section["title"], name, key) for section in sections(schema) for name, key in section["properties"].items()
    ]
    assert len(keys) > 150
    assert [(title, name) for title, name, key in keys if len(key.get("description", "")) < 5] == []
    assert [name for _, name, key in keys if "``" in key["description"] or ":class:" in key["description"]] == []
    described = schema["$defs"]["ProbeConfig"]["properties"]
    assert described["temperature"]["description"].startswith("the sampling temperature; the policy is `softmax(")


def unknown(settings: Any, section: dict[str, Any], schema: dict[str, Any], at: str = "") -> Iterator[str]:
    """Keys of a config that the schema has not."""
    for name, value in settings.items():
        key = section["properties"].get(name)
        if key is None:
            yield f"{at}{name}"
            continue
        (referred, *_) = [*(part["$ref"] for part in (key, *key.get("anyOf", ())) if "$ref" in part), None]
        if isinstance(value, dict) and referred is not None:
            inner = schema["$defs"][referred.removeprefix("#/$defs/")]
            for family in inner.get("oneOf", ()):
                inner = family if family["properties"]["trainer"]["const"] == value["trainer"] else inner
            yield from unknown(value, inner, schema, f"{at}{name}.")


@pytest.mark.parametrize("trainer", trainers())
def test_the_schema_has_every_key_of_a_config(schema, trainer):
    config = SweepConfig.model_validate({
        "checkpoint": "c", "output_dir": "o", "prompts": {"jsonl": "p"}, "reward": "exact_match",
        "update": {"num_prompts": 2, "group_size": 2}, "evaluation": {"total_sequences": 2},
        "generation": {"engine": "vllm", "server": {"url": "http://h"}}, "sweep": {"learning_rates": [1e-6, 2e-6]},
        "probe": {"loss": {"trainer": trainer}, "max_completion_length": 8},
    })  # fmt: skip
    settings = yaml.safe_load(config.to_yaml())
    assert list(unknown(settings, schema, schema)) == []
    assert list(unknown(settings | {"updat": {}}, schema, schema)) == ["updat"]
    assert schema["required"] == ["output_dir"]
    assert schema["additionalProperties"] is False


def test_a_config_may_name_the_schema_beside_it(trained, tmp_path):
    file = tmp_path / "probe.yaml"
    done = invoke("init", trained.checkpoint, "--output", file, "--schema")
    assert done.exit_code == 0, done.output
    assert file.read_text().splitlines()[0] == f"# yaml-language-server: $schema={SCHEMA_FILE}"
    assert json.loads((tmp_path / SCHEMA_FILE).read_text()) == json_schema()


def test_a_shell_completes_commands_and_options():
    shell = {"_ENTROPY_PROBE_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    assert execute(COMP_WORDS="entropy-probe in", **shell).stdout.split() == ["init", "inspect"]
    shell["COMP_CWORD"] = "2"
    assert execute(COMP_WORDS="entropy-probe inspect --js", **shell).stdout.split() == ["--json"]
