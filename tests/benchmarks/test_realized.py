"""The benchmark runs at tiny size, and every estimator measures the same change."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "realized.py"


@pytest.mark.slow
def test_variances(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(path)]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "variance over that of" in finished.stdout
    figures = json.loads(path.read_text())
    for variances in figures["variance"].values():
        reference = variances["snis, surprisal"]
        assert reference["reported"] == reference["spread"] == 1
        error = reference["standard_error"]
        for name, v in variances.items():
            if name != "paired difference from the prediction":
                assert abs(v["mean"] - reference["mean"]) < 5 * error, name
