"""What differs between two directories of ``runs.py``: nothing may, but for what a redesign says that it changes.

``python tests/redesign/compare.py BEFORE AFTER`` prints one line per difference, with the file, the place in it, the
value before and the value after, and ends with exit code 1 if there are any.

JSON and Parquet files are compared value by value, numbers exactly. What differs from run to run is left out
(``IGNORED``, ``IGNORED_FILES``); what a redesign renames has its new name on both sides (``RENAMES``). A note (an
object with a ``code`` and a ``text``) is the same as its text.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

__all__ = ["IGNORED", "IGNORED_FILES", "RENAMES", "differences"]

IGNORED = frozenset({"timing", "memory", "versions", "schema_version", "seconds"})
"""Keys at any depth whose values are the machine's or the version's, not the run's."""
IGNORED_FILES = frozenset({"inputs.json", "manifest.json"})
"""What guards a directory against other inputs than it was begun with; it holds no results."""
RENAMES: dict[str, str] = {
    "messages": "notes",
    "num_units": "num_clusters",
    "per_unit_gradients": "per_sample_gradients",
}
"""Keys of JSON objects, columns of tables and files, by their name before the redesign. What is not renamed after all
may keep its name.
"""
NOTHING = "nothing"
SHOWN = 160


def differences(before: Path, after: Path, renames: dict[str, str] | None = None) -> Iterator[str]:
    """One line for each difference, in the order of the files' names."""
    renames = RENAMES if renames is None else renames
    sides = _files(before, renames), _files(after, renames)
    for name in sorted(sides[0].keys() | sides[1].keys()):
        paths = [side.get(name) for side in sides]
        if paths[0] is None or paths[1] is None:
            yield f"{name}: {'missing before' if paths[0] is None else 'missing after'}"
            continue
        read = _read_table if name.endswith(".parquet") else _read_json
        values = read(paths[0], before, renames), read(paths[1], after, renames)
        yield from (f"{name}: {line}" for line in _unlike("", *values))


def _files(directory: Path, renames: dict[str, str]) -> dict[str, Path]:
    """The JSON and Parquet files of the runs, by their names after the redesign."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected a directory of runs, found none; write it by runs.py")
    files = {}
    for path in directory.rglob("*"):
        name = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in name.parts) or path.name in IGNORED_FILES
        inputs = name.parts[0] == "inputs" and path.name != "hashes.json"
        if path.suffix in (".json", ".parquet") and not hidden and not inputs:
            files[str(name.with_name(renames.get(path.name, path.name)))] = path
    if not files:
        raise FileNotFoundError(f"{directory}: expected runs with results, found none; write them by runs.py")
    return files


def _read_json(path: Path, directory: Path, renames: dict[str, str]) -> Any:
    text = path.read_text(encoding="utf-8").replace(str(directory.resolve()), "OUT")
    return _plain(json.loads(text), renames)


def _plain(value: Any, renames: dict[str, str]) -> Any:
    """Without what is ignored, under the names after the redesign, notes as their texts."""
    if isinstance(value, list):
        return [_plain(item, renames) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() >= {"code", "text"}:
        return value["text"]
    return {renames.get(key, key): _plain(item, renames) for key, item in value.items() if key not in IGNORED}


def _read_table(path: Path, _: Path, renames: dict[str, str]) -> dict[str, Any]:
    """Columns with their types and values; the writer's version and row groups are not part of a table."""
    table = pq.read_table(path)
    columns = {
        renames.get(field.name, field.name): {"type": str(field.type), "values": table[field.name].to_pylist()}
        for field in table.schema
    }
    return {"columns": list(columns), **columns}


def _unlike(place: str, before: Any, after: Any) -> Iterator[str]:
    """Places where two values are not the same, down to the sign of a zero."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            yield from _unlike(f"{place}.{key}".lstrip("."), before.get(key, NOTHING), after.get(key, NOTHING))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for k, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _unlike(f"{place}[{k}]", one, other)
    elif not _same(before, after):
        yield f"{place}: {_shown(before)} before, {_shown(after)} after"


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, float) and isinstance(after, float):
        if math.isnan(before) or math.isnan(after):
            return math.isnan(before) and math.isnan(after)
        return before.hex() == after.hex()
    return type(before) is type(after) and before == after


def _shown(value: Any) -> str:
    text = NOTHING if value == NOTHING else json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def main() -> int:
    """Print the differences; 1 if there are any."""
    if len(sys.argv) != 3:
        print("compare.py: expected two directories of runs, BEFORE and AFTER", file=sys.stderr)
        return 2
    count = 0
    for line in differences(Path(sys.argv[1]), Path(sys.argv[2])):
        print(line)
        count += 1
    print(f"{count} differences" if count else "the same numbers")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
