"""Lines of progress where there is no terminal: one per quarter, with the time that is left."""

import re

from entropy_probe.cli import progress


def test_a_line_per_quarter_with_what_is_left(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.show_progress() as report:
        for done in (1, 2, 3, 5, 8):
            now = 60.0 * done
            report("sample", done, 8)
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in capsys.readouterr().err.splitlines()]
    assert lines == ["sample: 2 of 8, 0:06:00 left", "sample: 5 of 8, 0:03:00 left", "sample: 8 of 8"]
