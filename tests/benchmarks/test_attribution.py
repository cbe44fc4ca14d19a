"""The benchmark runs at tiny size."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "attribution.py"


def test_ratios(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--rounds", "1", "--json", str(path)]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(path.read_text())
    assert [f["weights"] for f in figures] == ["LoRA", "full"]
    for f in figures:
        assert f["method"] == "forward-mode"
        assert f["probe"] > 0
        assert f["sum_error"] < 1e-5
