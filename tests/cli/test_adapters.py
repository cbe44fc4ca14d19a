"""Commands on a checkpoint with several adapters, each in a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from entropy_probe.cli.output.inputs import hash_directory
from tests.cli.conftest import invoke


@pytest.fixture
def two_adapters(checkpoint) -> Path:
    """The checkpoint with its adapter in ``policy/``, and another beside it."""
    for name in ("policy", "other"):
        (checkpoint / name).mkdir()
        for file in checkpoint.glob("adapter_*"):
            shutil.copy(file, checkpoint / name)
    for file in checkpoint.glob("adapter_*"):
        file.unlink()
    return checkpoint


def test_inspect_and_manifest_take_the_adapter(two_adapters):
    unnamed = invoke("inspect", two_adapters, "--json")
    assert unnamed.exit_code == 2
    assert "got other, policy; pass adapter=" in unnamed.stdout
    assert invoke("inspect", two_adapters, "--adapter", "policy").exit_code == 0
    assert invoke("manifest", two_adapters, "--adapter", "policy").exit_code == 0
    assert invoke("inspect", two_adapters).exit_code == 0


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_run_and_sweep_take_the_adapter(two_adapters, config, refused, tmp_path, command):
    given = [command, config, f"checkpoint={two_adapters}"]
    given += ["sweep.learning_rates=[1e-5, 1e-4]"] if command == "sweep" else []
    assert "expected one trained adapter" in refused(*given)
    result = invoke(*given, "adapter=policy")
    assert result.exit_code == 0, result.output
    assert "adapter: policy" in (tmp_path / "out" / "config.yaml").read_text()


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_run_and_sweep_take_the_quantization(checkpoint, config, refused, command):
    given = [command, config, f"checkpoint={checkpoint}", "quantization={load_in_8bit: true}"]
    given += ["sweep.learning_rates=[1e-5, 1e-4]"] if command == "sweep" else []
    assert "quantised by bitsandbytes without load_in_4bit" in refused(*given)


def test_a_sweep_is_computed_from_the_files_in_the_folders_too(two_adapters):
    before = hash_directory(two_adapters)
    with (two_adapters / "policy" / "adapter_config.json").open("a") as file:
        file.write(" ")
    assert hash_directory(two_adapters) != before


def test_quantization_on_the_command_line(checkpoint, refused):
    assert "--quantization: expected a JSON object, got 'nf4'" in refused(
        "inspect", checkpoint, "--quantization", "nf4"
    )
    assert "expected a JSON object such as" in refused("manifest", checkpoint, "--quantization", "[1]")
    eight = invoke("inspect", checkpoint, "--quantization", '{"load_in_8bit": true}')
    assert eight.exit_code == 2
    assert "without load_in_4bit" in eight.stdout.replace("\n", " ")
