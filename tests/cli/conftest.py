"""A config that probes the trained checkpoint, and the command line in process and out."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from typer.testing import CliRunner, Result

from entropy_probe.cli import app, main
from entropy_probe.report import figures
from tests.processes import Process

SHARD = "entropy_probe.sampling.evaluation.SHARD_SEQUENCES"


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch) -> None:
    """Figures are files without a picture, which takes half of a run's time here, unless marked ``drawn``."""
    if "drawn" not in request.keywords:
        leave_undrawn(monkeypatch)


def leave_undrawn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(figures, "_drawn", lambda charts: Mock())
    patch.setattr(figures, "_rendered", lambda figure, kind, metadata: kind.encode())


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(trained.checkpoint, tmp_path / "checkpoint-2"))


@pytest.fixture
def config(trained, tmp_path) -> Path:
    """A config file that writes into ``tmp_path / 'out'``."""
    settings: dict[str, Any] = {
        "checkpoint": str(trained.checkpoint),
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "prompts": {"jsonl": str(trained.prompts)},
        "reward": "tests.cli.rewards:odd_characters",
        "update": {"num_prompts": 4, "group_size": 4},
        "evaluation": {"total_sequences": 24},
        "probe": {"max_completion_length": 8, "max_grad_norm": 1.0, "learning_rate": 1e-4},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def invoke(*args: Any) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(app, [str(arg) for arg in args])


def start(*args: Any, **environment: str) -> Process:
    """The command line in a process of its own."""
    return Process(command_line, *map(str, args), **environment)


def command_line(*args: str) -> None:
    sys.argv = ["entropy-probe", *args]
    with pytest.MonkeyPatch.context() as patch:
        leave_undrawn(patch)
        main()


def killed_before(name: str, *args: str) -> None:
    """In a process of its own, the command line, which ends by SIGKILL as a file of that name is about to appear."""

    def watch(event: str, arguments: tuple) -> None:
        if event == "os.rename" and str(arguments[1]).endswith(name):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SHARD, 12)
        command_line(*args)


def execute(*args: Any, command: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """:func:`start` and wait for the end; with a command of Python's in a new interpreter, which takes seconds."""
    if command:
        line = [sys.executable, *command, *map(str, args)]
        return subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | environment)
    process = start(*args, **environment)
    stdout, stderr = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)


@pytest.fixture
def refused() -> Callable[..., str]:
    """Run a command that must end with exit code 2 and one line on stderr; return that line."""

    def refused(*args: Any) -> str:
        result = invoke(*args)
        assert result.exit_code == 2, (result.output, result.exception)
        assert result.stdout == ""
        errors = [line for line in result.stderr.splitlines() if not line[:2].isdigit()]
        assert len(errors) == 1, result.stderr
        assert errors[0].startswith("error: ")
        return errors[0].removeprefix("error: ")

    return refused
