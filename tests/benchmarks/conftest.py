"""Benchmarks are run as users run them, at sizes that only show that they work; slow, each a process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def run(tmp_path) -> Callable[..., tuple[str, Any]]:
    """Run a benchmark by name with arguments: what it printed, and the figures it wrote."""

    def run_benchmark(name: str, *arguments: str) -> tuple[str, Any]:
        path = tmp_path / "figures.json"
        command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments, "--json", str(path)]
        finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout, json.loads(path.read_text())

    return run_benchmark
