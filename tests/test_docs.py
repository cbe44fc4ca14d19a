"""The documents agree with the code and with each other: titles, links, modules, and math that GitHub renders."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "entropy_probe"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
MAIN = "https://github.com/entropy-probe/entropy-probe/blob/main/"
FENCES = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return FENCES.sub("", text)


def links(document: Path) -> list[str]:
    """Where inline links and the definitions of reference links point."""
    return re.findall(r"(?:\]\(|^\[[^\]]+\]: )([^)\s]+)", prose(document.read_text()), re.MULTILINE)


def headings(path: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose(path.read_text()), re.MULTILINE)


def anchor(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def quoted_titles() -> list[tuple[str, str]]:
    """Every section of theory.md that the source points to, with the file that does."""
    found = []
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        pointers = re.findall(r'``docs/theory\.md``((?:,?(?:\s+and)?\s+"[^"]+")*)', text)
        for titles in pointers:
            assert titles, f"{path}: points to docs/theory.md without the title of a section"
            found += [(str(path.relative_to(SOURCE)), " ".join(t.split())) for t in re.findall(r'"([^"]+)"', titles)]
        assert len(pointers) == text.count("theory.md"), f"{path}: expected ``docs/theory.md``, then titles"
    return found


def test_sections_that_docstrings_point_to_exist():
    titles = headings(ROOT / "docs" / "theory.md")
    quoted = quoted_titles()
    assert {"Entropy", "The first-order change", "The step"} <= {title for _, title in quoted}
    assert [(file, title) for file, title in quoted if titles.count(title) != 1] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_within_the_repository_resolve(document):
    broken = []
    for address in links(document):
        link = address.removeprefix(MAIN)
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.exists() or (fragment and fragment not in map(anchor, headings(target))):
            broken.append(link)
    assert broken == []


def test_links_of_the_readme_are_absolute_for_the_package_index():
    found = links(ROOT / "README.md")
    assert MAIN + "docs/theory.md" in found
    assert [link for link in found if not link.startswith("https://")] == []


def test_architecture_names_every_module_and_none_that_is_gone():
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    named = re.findall(r"`([\w/]+(?:\.py|/))`", table)
    assert [name for name in named if not (SOURCE / name).exists()] == []
    parts = {p.name for p in SOURCE.iterdir() if not p.name.startswith("__") and (p.is_dir() or p.suffix == ".py")}
    assert parts == {name.split("/")[0] for name in named}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_inline_math_survives_markdown(document):
    r"""Markdown takes the backslash off ``\,`` and an opening ``<`` for a tag; inside fences it does neither."""
    text = re.sub(r"`[^`\n]*`", "", prose(document.read_text()))
    assert text.count("$") % 2 == 0
    formulas = re.findall(r"\$([^$]+)\$", text)
    assert [f for f in formulas if re.search(r"\\[^A-Za-z]|<|\n", f)] == []
