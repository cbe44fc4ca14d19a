"""Imports point one way, and importing the package loads nothing heavy."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "entropy_probe"

# What each part may import from this package, besides itself.
ALLOWED = {
    "types": set(),
    "results": set(),
    "rollouts": {"results"},
    "demo": set(),
    "estimators": {"types"},
    "parallel": {"types", "rollouts"},
    "named": {"parallel"},
    "losses": {"types", "rollouts", "results"},
    "config": {"estimators", "losses"},
    "scoring": {"types", "rollouts", "results", "parallel", "named"},
    "gradients": {"types", "rollouts", "parallel", "named", "losses", "scoring"},
    "steps": {"results", "parallel", "named", "config"},
    "sampling": {"rollouts", "results", "parallel"},
    "checkpoints": {"results", "parallel", "steps"},
    "dumps": {"rollouts", "results", "sampling", "checkpoints"},
    "analyses": {
        "types", "rollouts", "results", "estimators", "parallel", "named", "losses", "config", "scoring", "gradients",
        "steps",
    },
    "report": {"results"},
    "questions": {
        "types", "rollouts", "results", "estimators", "parallel", "named", "losses", "config", "scoring", "gradients",
        "steps", "analyses", "report",
    },
    "probe": {"rollouts", "results", "parallel", "config", "scoring", "steps", "analyses", "questions"},
    "integrations": None,
    "cli": None,
    "__init__": None,
    "__main__": {"cli"},
}  # fmt: skip

HEAVY = (
    "transformers", "peft", "trl", "vllm", "datasets", "matplotlib", "arviz_stats", "scipy", "pyarrow", "accelerate",
    "rich", "typer",
)  # fmt: skip


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("entropy_probe"):
            names = [node.module] if node.module != "entropy_probe" else [f"entropy_probe.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("entropy_probe.")]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
            continue
        found |= {name.split(".")[1] for name in names}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    me = part(path)
    assert me in ALLOWED, f"say in this test what {me} may import"
    allowed = ALLOWED[me]
    if allowed is not None:
        assert imported(path) - allowed - {me} == set()


def test_the_law_is_that_of_the_architecture_page():
    """Its table has a row for every part, in an order in which imports point downwards."""
    page = (SOURCE.parents[1] / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .* \| ([^|]*) \|$", page, re.MULTILINE)
    law = {name: None if "anything" in may else set(re.findall(r"`(\w+)`", may)) for name, may in rows}
    assert law == ALLOWED
    parts = {part(path) for path in SOURCE.rglob("*.py")}
    assert parts == law.keys()
    order = [name for name, _ in rows]
    assert [(a, b) for a in order for b in law[a] or () if order.index(b) < order.index(a)] == []


def test_nothing_imports_the_command_line():
    for path in SOURCE.rglob("*.py"):
        if part(path) not in ("cli", "__main__"):
            assert "cli" not in imported(path), path


def test_tests_import_no_other_tests():
    """What two of them need lies in a module beside them, so that each may change on its own."""
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests"):
                names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
                assert not any(name.startswith("test_") for name in names), path


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, entropy_probe; sys.exit(' '.join(m for m in {HEAVY!r} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_modules_stay_small():
    lines = {str(p.relative_to(SOURCE)): len(p.read_text().splitlines()) for p in SOURCE.rglob("*.py")}
    assert {name: n for name, n in lines.items() if n > 400} == {}
