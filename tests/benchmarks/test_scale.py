"""The benchmark of scale runs at tiny size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale.py"


@pytest.mark.slow
def test_peaks_and_times(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--max-completion-length", "4", "--json", str(path)]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    small, large = json.loads(path.read_text())
    for size, sequences in ((small, 300), (large, 600)):
        assert size["sequences"] == sequences
        assert 0 < size["imports"] <= size["sampled"] <= size["read"] <= size["probed"]
        assert size["delta_h1"] != 0
