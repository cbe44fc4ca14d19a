"""The benchmark of the report runs at tiny size."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_opens_and_measures(chromium, tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/report.py", "--quick", "--rounds", "1", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert (found["responses"], found["tokens"]) == (16, 20)
    assert 0 < found["smallest"] <= found["open_seconds"] <= found["largest"]
    assert found["elements"] > 16 * 20 / 2
