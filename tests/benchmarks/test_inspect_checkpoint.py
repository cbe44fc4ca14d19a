"""The benchmark runs at tiny size; it raises if its checkpoints are not usable."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "inspect_checkpoint.py"


def test_ratios(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--rounds", "1", "--json", str(path)]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(path.read_text())
    assert [(f["weights"], f["manifest"], f["tensors"]) for f in figures] == [
        ("full", False, 51),
        ("full", True, 51),
        ("LoRA", False, 42),
    ]
    assert all(f["smallest"] <= f["inspect_over_load"] <= f["largest"] for f in figures)
