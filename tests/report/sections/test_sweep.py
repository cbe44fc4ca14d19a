from __future__ import annotations

from xml.etree import ElementTree

import pytest

from entropy_probe.report import figure_files, sweep_sections
from entropy_probe.report.figures import SETTINGS
from entropy_probe.report.sections.attribution import layers_section
from entropy_probe.report.sections.sweep import sweep_sentence
from entropy_probe.results.sweep import LinearRange, Sweep, SweepPoint
from tests.notes import noted
from tests.report.results import shown
from tests.report.sweeps import make_sweep
from tests.report.tables import write_tables


def show(sweeps: dict[str, Sweep]) -> str:
    return shown(sweep_sections(sweeps))


def figures(sweeps: dict[str, Sweep]) -> dict[str, bytes]:
    return figure_files(sweep_sections(sweeps))


def test_what_files_say_cannot_act_on_the_terminal():
    sweep = make_sweep(notes=noted("\x1b]0;owned\x07\u202e"))
    for text in (show({"": sweep}), show({"a": sweep, "b": make_sweep()})):
        assert r"\x1b]0;owned\x07\u202e" in text
        assert not {"\x1b", "\x07", "\u202e"} & set(text)


def test_sentences():
    assert sweep_sentence(make_sweep()) == (
        "Linear up to a learning rate of 0.001. For small steps the entropy falls by 9.00 nats/token per unit of η. "
        "The curvature works against it and would cancel it at 0.0158, beyond the linear range and so an extrapolation."
    )
    rises = sweep_sentence(make_sweep(9.0, linear_range=LinearRange(learning_rate=1e-2, at_least=True)))
    assert rises.startswith("Linear up to a learning rate of at least 0.01. For small steps the entropy rises by 9.00")
    assert rises.endswith("The curvature has the same sign: larger steps change it more than in proportion.")
    assert sweep_sentence(make_sweep(b=60.0)).endswith("The curvature does not exceed its 95% margin of error.")
    noisy = sweep_sentence(make_sweep(error=5.0, end=None))
    assert noisy.startswith("Not linear at any of these rates: add smaller ones. The predicted change does not exceed")
    assert sweep_sentence(make_sweep(fit=None)).endswith("nats/token per unit of η.")


def test_every_rate_and_fit_is_shown_within_80_columns():
    text = show({"": make_sweep(notes=noted("a remark"))})
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for words in ("1e-06", "0.001", "10.0% low ess", "0.9900 ± 0.0010", "-9.00 ± 0.30",
                  "1140 ± 100", "1140 ± 90", "note: a remark", "Look again."):  # fmt: skip
        assert words in text, words


def test_failed_points_are_shown_and_drawn():
    sweep = make_sweep()
    failed = SweepPoint(learning_rate=1.0, predicted=sweep.points[0].predicted, failure="overflow")
    sweep = sweep.model_copy(update={"points": (*sweep.points, failed)})
    assert " failed" in show({"": sweep})
    assert figures({"": sweep}).keys() == {"sweep.png", "sweep.svg"}


def test_a_summary_of_several():
    text = show(
        {"checkpoint-5": make_sweep(), "checkpoint-10": make_sweep(end=None, fit=None, learning_rate_star=None)}
    )
    first, second = (next(line for line in text.splitlines() if f"checkpoint-{k} " in line) for k in (5, 10))
    assert first.split()[-4:] == ["0.001", "0.0158", "±", "0.0016"]
    assert second.split()[-4:] == ["no", "fit", "none", "none"]


@pytest.mark.parametrize("several", [False, True])
def test_figures_are_the_same_every_time(several):
    sweeps = {"a": make_sweep(), "b": make_sweep(9.0, end=None)} if several else {"": make_sweep()}
    first, again = figures(sweeps), figures(sweeps)
    assert first == again
    assert all(len(content) > 1000 for content in first.values())


def test_figures_without_a_single_usable_point():
    sweep = make_sweep(end=None, fit=None, power_law=None, learning_rate_star=None)
    sweep = sweep.model_copy(update={"points": sweep.points[-1:]})
    assert figures({"": sweep}).keys() == {"sweep.png", "sweep.svg"}


NAMES = ["a$b$c", r"x$\frac", r"\$y$", "_last", "a\x1b[2J", "[red]"]


def drawn(svg: bytes) -> set[str]:
    return {text.strip() for node in ElementTree.fromstring(svg).iter() if (text := node.text)}


def test_names_are_drawn_letter_by_letter(monkeypatch, tmp_path):
    monkeypatch.setitem(SETTINGS, "svg.fonttype", "none")  # text as text, not as outlines
    expected = {*NAMES, r"a\x1b[2J"} - {"a\x1b[2J"}
    sweeps = {name: make_sweep() for name in NAMES}
    svg = figures(sweeps)["sweeps.svg"]
    assert expected <= drawn(svg)
    assert svg.count(b"_last") >= 2  # at the axis and in the legend
    tables = write_tables(tmp_path)
    tables.layers["layer"][:2] = NAMES[:2]
    tables.layers["module"][:2] = NAMES[2:4]
    assert set(NAMES[:4]) <= drawn(figure_files([layers_section(tables.layers, "nats")])["layers.svg"])


def test_a_summary_shows_names_as_they_are():
    text = show({name: make_sweep() for name in NAMES})
    assert all(name in text for name in NAMES if "\x1b" not in name)
    assert r"a\x1b[2J" in text
    assert "\x1b" not in text
