"""``docs/reliability.md``: the table of injected faults, whose outcomes the tests beside this show.

``python -m tests.faults.page`` writes it; ``make faults`` runs the tests first.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.checkpoints.crafted import CRAFTED
from tests.faults.inputs import INPUT_FAULTS, PATH_FAULTS
from tests.faults.table import FAULTS, Fault

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
MADE = "<!-- made by `make faults` -->"
Row = tuple[str, str, str, str]


def outcome(fault: Fault) -> tuple[str, str]:
    """What comes of a fault, in a word and in more."""
    if fault.error is not None:
        return "refused", f"`{fault.error}`" + ("" if fault.inspects is None else f"; inspect says {fault.inspects}")
    return ("noted", "suspicious, with a note") if fault.suspicious else ("harmless", str(fault.harmless))


def rows() -> list[Row]:
    """Every fault: where it is, what it is, and what comes of it."""
    of_files = [(f"checkpoint ({fault.run})", fault.name, *outcome(fault)) for fault in FAULTS]
    of_archives = [("archive", name, "refused", "before it is opened") for name in CRAFTED]
    of_inputs = [(fault.where, fault.name, "refused", "one line") for fault in INPUT_FAULTS]
    of_paths = [(f"path of a {where}", way, "refused", "one line") for where, way in PATH_FAULTS]
    return of_files + of_archives + of_inputs + of_paths


def table() -> str:
    """The counts and the table, as Markdown."""
    every = rows()
    counts = Counter(row[2] for row in every)
    said = ", ".join(f"{counts[word]} {word}" for word in ("refused", "noted", "harmless"))
    lines = [f"{len(every)} faults: {said}.", "", "| where | fault | outcome | |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in every])


def page() -> str:
    """The page, with the table as it is now under what is written by hand."""
    return f"{PAGE.read_text().partition(MADE)[0]}{MADE}\n\n{table()}\n"


if __name__ == "__main__":
    PAGE.write_text(page())
