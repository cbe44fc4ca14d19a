"""The documents agree with the code and with each other: titles, links, pages, examples, math that GitHub renders."""

import itertools
import re
from pathlib import Path
from pydoc import locate

import pytest
import yaml
from typer.testing import CliRunner

from entropy_probe.cli import app
from entropy_probe.cli.config import load_config

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "entropy_probe"
PAGES = sorted(ROOT.glob("docs/**/*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *PAGES, *sorted(ROOT.glob("benchmarks/*.md"))]
MAIN = "https://github.com/entropy-probe/entropy-probe/blob/main/"
RAW = "https://raw.githubusercontent.com/entropy-probe/entropy-probe/main/"
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
        link = address.removeprefix(MAIN).removeprefix(RAW)
        here = document.parent if link == address else ROOT
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        target = (here / name).resolve() if name else document
        if not target.exists() or (fragment and fragment not in map(anchor, headings(target))):
            broken.append(link)
    assert broken == []


def test_links_of_the_readme_are_absolute_for_the_package_index():
    found = links(ROOT / "README.md")
    assert MAIN + "docs/theory.md" in found
    assert [link for link in found if not link.startswith("https://")] == []


def test_every_page_is_in_the_navigation_once():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES]
    assert sorted(re.findall(r"[\w/-]+\.md", nav)) == sorted(pages)


def test_what_the_reference_documents_exists():
    names = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
    assert len(names) > 8
    assert [name for name in names if locate(name) is None] == []


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/own-checkpoint.md"])
def test_configs_are_valid(page, tmp_path):
    """The first is whole; what comes later is added to it."""
    for config in itertools.accumulate(blocks(page, "yaml")):
        (tmp_path / "probe.yaml").write_text(config)
        assert load_config(tmp_path / "probe.yaml").output_dir == Path("runs/probe-40")


@pytest.fixture(scope="module")
def demo(trained, tmp_path_factory) -> tuple[Path, str]:
    """A directory with a checkpoint and batches where the demo leaves its own, and what the run printed."""
    directory = tmp_path_factory.mktemp("demo")
    (directory / "examples/tiny").mkdir(parents=True)
    (directory / "examples/tiny/checkpoint-20").symlink_to(trained.checkpoint)
    settings = {
        "checkpoint": str(trained.checkpoint),
        "output_dir": str(directory / "runs/demo"),
        "device": "cpu",
        "prompts": {"jsonl": str(trained.prompts)},
        "reward": "tests.cli.rewards:odd_characters",
        "update": {"num_prompts": 4, "group_size": 4},
        "evaluation": {"total_sequences": 48},
        "attribution": True,
        "attribution_folds": 4,
        "probe": {"max_completion_length": 8, "learning_rate": 1e-4},
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(app, ["run", str(directory / "run.yaml")])
    assert result.exit_code == 0, result.output
    return directory, result.output


@pytest.mark.parametrize("page", ["README.md", "docs/reference/api.md", "docs/trainers.md"])
def test_python_examples_run(page, demo, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(demo[0])
    code = next(block for block in blocks(page, "python") if "import Rollouts" in block or "load_checkpoint" in block)
    exec(compile(code.replace("runs/from-python", str(tmp_path / "out")), page, "exec"), {})
    printed = capsys.readouterr().out
    assert "print(" not in code or len(printed.split()) > 4


def row_labels(table: str) -> set[str]:
    """What stands before the first number of every line that has columns."""
    return set(re.findall(r"^ {1,3}(\S+(?: \S+)*?)  +[-−+\d]", table, re.MULTILINE))


def test_the_table_of_the_demo_has_the_rows_that_a_run_prints(demo):
    (table,) = (block for block in blocks("docs/results.md", "") if "predicted" in block)
    prompts = {label for label in row_labels(table) if label.endswith("=")}
    shown = row_labels(table) - prompts
    assert {"predicted δH₁", "momentum", "realized ΔH", "noise floor", "advantages > 0"} <= shown
    assert len(prompts) == 3
    assert shown - row_labels(demo[1]) == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_inline_math_survives_markdown(document):
    r"""Markdown takes the backslash off ``\,`` and an opening ``<`` for a tag; inside fences it does neither."""
    text = re.sub(r"`[^`\n]*`", "", prose(document.read_text()))
    assert text.count("$") % 2 == 0
    formulas = re.findall(r"\$([^$]+)\$", text)
    assert [f for f in formulas if re.search(r"\\[^A-Za-z]|<|\n", f)] == []
