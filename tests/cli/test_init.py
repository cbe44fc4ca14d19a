"""``entropy-probe init`` and ``--version``."""

from pathlib import Path

import pytest

from entropy_probe import __version__
from entropy_probe.cli.config import RunConfig
from entropy_probe.cli.init import config_of
from entropy_probe.cli.yaml_settings import load_yaml
from entropy_probe.results.checkpoint import CheckpointReport, SettingReport
from tests.cli.conftest import execute


def report(**settings: object) -> CheckpointReport:
    told = tuple(SettingReport(name=name, value=x, source="training_args.bin") for name, x in settings.items())
    return CheckpointReport(path="x", kind="lora", verdict="healthy", global_step=40, settings=told)


@pytest.mark.parametrize("name", ["runs/checkpoint-40", "a b: #c", "-x", 'q"uo\\te', "null"])
def test_the_file_is_a_config_whatever_the_checkpoint_is_called(name, tmp_path):
    file = tmp_path / "probe.yaml"
    file.write_text(config_of(report(), Path(name), file, base_model=name))
    settings = load_yaml(file)
    assert settings["checkpoint"] == settings["base_model"] == name
    config = RunConfig(**settings)
    assert (config.update.num_prompts, config.update.group_size) == (16, 8)
    assert config.mode == "two_batch"


def test_sizes_and_settings_are_the_trainers():
    text = config_of(report(num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=3,
                            num_processes=2, loss_type="dapo", beta=0.04), Path("c"), Path("p.yaml"))  # fmt: skip
    assert "update: {num_prompts: 12, group_size: 4}     # as one step of training has" in text
    assert "unless set under probe: loss_type dapo, beta 0.04, ..." in text
    assert "say nothing of loss" in config_of(report(), Path("c"), Path("p.yaml"))


def test_a_config_is_written_once(trained, tmp_path, refused):
    file = tmp_path / "probe.yaml"
    done = execute("init", trained.checkpoint, "--output", file)
    assert done.returncode == 0, done.stderr
    assert f"Wrote {file}" in done.stdout
    assert RunConfig(**load_yaml(file)).checkpoint == trained.checkpoint
    assert "expected a file that is not there yet" in refused("init", trained.checkpoint, "--output", file)
    assert execute("init", trained.checkpoint, "--output", file, "--overwrite").returncode == 0


def test_the_version():
    done = execute("--version")
    assert (done.returncode, done.stdout) == (0, f"entropy-probe {__version__}\n")
