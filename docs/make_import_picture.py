"""Draw which part of the package imports which, with grimp and graphviz, before the redesign and now.

    make import-picture

Every arrow points from a part to one that it imports. dot puts what is imported below; an arrow that is part of a cycle
is red, since it cannot.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import grimp

ROOT = Path(__file__).parents[1]
BEFORE = "26a849a"
PACKAGE = "entropy_probe"


def draw(source: Path, name: str) -> None:
    """Write the picture of the package below a folder to ``docs/images/imports-NAME.svg``."""
    sys.path.insert(0, str(source))
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    sys.path.pop(0)
    parts = sorted(graph.find_children(PACKAGE))
    for part in parts:
        graph.squash_module(part)
    imports = [
        (a, b) for a in parts for b in sorted(graph.find_modules_directly_imported_by(a)) if b in parts and b != a
    ]
    circular = [(a, b) for a, b in imports if graph.chain_exists(importer=b, imported=a)]
    title = f"{name}: {len(parts)} parts, {len(imports)} imports between them, {len(circular)} of them in cycles"
    lines = [f'"{a}" -> "{b}" [color={"red" if (a, b) in circular else "gray45"}]' for a, b in imports]
    labels = [f'"{part}" [label="{part.removeprefix(PACKAGE + ".")}"]' for part in parts]
    style = (
        f'label="{title}"; labelloc=t; fontname="sans-serif"; bgcolor=white; ranksep=0.7; edge [arrowsize=0.7];'
        'node [shape=box, style="rounded,filled", fillcolor="#eeeeff", color="#8888aa", fontname="sans-serif"]'
    )
    dot = f"digraph {{ {style}\n" + "\n".join([*labels, *lines]) + "\n}\n"
    picture = ROOT / "docs" / "images" / f"imports-{name}.svg"
    picture.write_bytes(subprocess.run(["dot", "-Tsvg"], input=dot.encode(), stdout=subprocess.PIPE, check=True).stdout)
    print(f"{picture.relative_to(ROOT)}: {title}")  # noqa: T201


def main() -> None:
    """Draw both."""
    archive = subprocess.run(["git", "archive", BEFORE, "src"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    with TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        draw(Path(folder) / "src", "before")
    draw(ROOT / "src", "now")


if __name__ == "__main__":
    main()
