"""The lock belongs to pyproject.toml as it is now, and to the build of torch that the Makefile names."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [Requirement(line) for line in (ROOT / "lock.txt").read_text().splitlines() if not line.startswith("#")]
EXTRAS = PROJECT["project"]["optional-dependencies"]
REQUIREMENTS = {text for texts in (PROJECT["project"]["dependencies"], *EXTRAS.values()) for text in texts}


def test_every_version_is_exact():
    assert len(LOCK) > 60
    assert [str(r) for r in LOCK if not re.fullmatch(r"==[\w.]+", str(r.specifier))] == []
    names = [r.name for r in LOCK]
    assert len(set(names)) == len(names), "several versions of one package: some machine has one that was never tried"


@pytest.mark.parametrize("text", sorted(REQUIREMENTS))
def test_every_requirement_is_locked_in_its_range(text):
    wanted = Requirement(text)
    if wanted.name == PROJECT["project"]["name"]:
        assert wanted.extras <= EXTRAS.keys()
        return
    (locked,) = (r for r in LOCK if r.name == wanted.name)
    (exact,) = locked.specifier
    assert wanted.specifier.contains(exact.version), f"{locked} is outside {text}; run `make lock`"


def test_torch_and_the_build_backend():
    locked = {r.name: str(r) for r in LOCK}
    pin = re.search(r"^TORCH \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pin
    assert locked["torch"] == pin[1]
    assert set(PROJECT["build-system"]["requires"]) <= set(EXTRAS["dev"])
