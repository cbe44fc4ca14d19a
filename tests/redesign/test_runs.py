import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.redesign import runs
from tests.redesign.compare import differences
from tests.redesign.inputs import DEMO_FILES


@pytest.mark.slow
def test_the_set_gives_the_same_numbers_twice(tmp_path):
    source = {"PYTHONPATH": str(runs.TREE / "src")}
    demo = runs.TREE
    if not all((demo / name).exists() for name in DEMO_FILES):
        demo = tmp_path
        subprocess.run([sys.executable, "-m", "entropy_probe", "demo"], cwd=demo, env=os.environ | source, check=True)
    for name in ("first", "second"):
        command = [sys.executable, runs.__file__, tmp_path / name, "--demo", demo]
        subprocess.run(command, env=os.environ | source, check=True)
    assert list(differences(tmp_path / "first", tmp_path / "second")) == []
    for name in ("results.json", "sweep.json", "validation.json", "tokens.parquet"):
        assert any(Path(tmp_path / "first").rglob(name)), name
