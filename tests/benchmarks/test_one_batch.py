"""The benchmark runs at tiny size; it raises if the two algorithms disagree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "one_batch.py"


def test_ratios(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--rounds", "1", "--json", str(path)]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(path.read_text())
    assert [f["weights"] for f in figures] == ["LoRA", "full"]
    for f in figures:
        assert f["straightforward_over_exact"] == pytest.approx(
            f["straightforward_over_training"] / f["exact_over_training"]
        )
        assert f["gradients"].startswith("one pass, gradients of 4 units kept")
