"""Whatever reaches a reader of a result is a note of a kind, and every kind says what to do."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from entropy_probe.results.note import NoteKind, note_kinds

SOURCE = Path(__file__).parents[1] / "src" / "entropy_probe"
LISTS = re.compile(r"(\w+\.)?_?(notes|messages)")


def modules() -> dict[str, ast.Module]:
    return {str(path.relative_to(SOURCE)): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


def kinds() -> list[NoteKind]:
    """Those of every module that makes some."""
    for path, tree in modules().items():
        if any(isinstance(node, ast.Call) and ast.unparse(node.func) == "NoteKind" for node in ast.walk(tree)):
            importlib.import_module(f"entropy_probe.{path.removesuffix('.py').replace('/', '.')}")
    return [kind for code, kind in sorted(note_kinds().items()) if not code.startswith("test_")]


def test_kinds_are_found():
    assert len(kinds()) > 60


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.code)
def test_every_kind_says_what_to_do(kind):
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", kind.code)
    assert re.fullmatch(r"[A-Z][^{}]*[a-z)][.]", kind.remedy), kind.remedy
    assert not kind.text.endswith("."), "a note is one line, which others may be joined to"
    # settings are the same for every command and in Python, options are not
    assert "--" not in kind.text + kind.remedy


def test_kinds_are_constants_of_their_module():
    """So that importing a module makes all of its kinds, each once."""
    for path, tree in modules().items():
        made = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "NoteKind"]
        constants = [node.value for node in tree.body if isinstance(node, ast.Assign)]
        assert all(call in constants for call in made), path


def test_nothing_puts_prose_among_notes():
    for path, tree in modules().items():
        assert [ast.unparse(node) for node in ast.walk(tree) if is_prose(node)] == [], path


def is_prose(node: ast.AST) -> bool:
    """Whether text joins a list of notes, or such a list is declared to hold text."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        joins = node.func.attr in ("append", "insert") and LISTS.fullmatch(ast.unparse(node.func.value))
        return bool(joins) and any(is_text(argument) for argument in node.args)
    if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation is not None:
        name = ast.unparse(node.target) if isinstance(node, ast.AnnAssign) else node.arg
        return bool(LISTS.fullmatch(name)) and re.search(r"(?<!dict)\[str\b", ast.unparse(node.annotation)) is not None
    return False


def is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return is_text(node.left) or is_text(node.right)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr in ("format", "join")
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("self.notes.append(f'{x} is odd')", True),
        ("notes.insert(0, LOW.format(x) + '; more')", True),
        ("self._messages: list[str] = []", True),
        ("def f(notes: Sequence[str]): ...", True),
        ("self.notes.append(ODD(x=f'{x}'))", False),
        ("messages: list[dict[str, Any]] = []", False),
        ("names.append('a')", False),
    ],
)
def test_prose_is_recognised(code, found):
    assert any(is_prose(node) for node in ast.walk(ast.parse(code))) == found
