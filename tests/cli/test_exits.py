"""Rewards that ask for the process to end, or never end: one line and an exit code, never success."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.conftest import execute


@pytest.mark.parametrize(
    ("reward", "code", "said"),
    [
        ("exits", 2, "raised SystemExit: 0 (rewards.py:"),
        ("exits_when_read", 1, "expected the code that the config names to return, got sys.exit(0) in "),
        ("hangs_in_a_pool", 2, "expected an end within 0.2 seconds (reward_time_limit), got none"),
    ],
)
def test_a_run_does_not_end_with_its_reward(config, tmp_path, reward, code, said):
    done = execute("run", config, f"reward=tests.cli.rewards:{reward}", "reward_time_limit=0.2")
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line[:2].isdigit()]
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_reader_that_stops_early_is_no_error(trained):
    command = f"{sys.executable} -m entropy_probe inspect {trained.checkpoint} | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""
