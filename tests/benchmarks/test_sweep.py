"""The benchmark runs at tiny size."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sweep.py"


def test_ratios(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--rounds", "1", "--json", str(path)]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(path.read_text())
    assert [f["weights"] for f in figures] == ["LoRA", "full"]
    for f in figures:
        # twelve scorings and a prediction cost more than one gradient
        assert 1 < f["ratio_min"] <= f["ratio"] <= f["ratio_max"]
        assert f["ratio_with_direct_curvature"] > f["ratio"]
