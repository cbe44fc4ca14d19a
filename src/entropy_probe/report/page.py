"""Sections as one self-contained HTML file: no network, no model, no torch.

Text from models and files goes through the template's escaping or into JSON that the script writes with
``textContent``. A content security policy allows the page's own style and script, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from entropy_probe.report.numbers import typeset
from entropy_probe.report.payload import responses_payload, script_json
from entropy_probe.report.sections.base import (
    Bar,
    BarChart,
    Block,
    LineChart,
    Row,
    Rows,
    Section,
    Verbatim,
    sentence_case,
)
from entropy_probe.report.svg import draw_bars, draw_lines, heat_cells
from entropy_probe.report.text import visible_parts

if TYPE_CHECKING:
    from jinja2 import Environment


def page(sections: Sequence[Section], *, name: str = "") -> str:
    """The report of a record: the first section at its head, then all that the sections hold."""
    style, script = (Markup(_asset(name)) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    lead, *others = sections
    template = _environment().get_template("page.html")
    return template.render(
        style=style,
        script=script,
        policy=policy,
        name=name,
        sections=sections,
        lead=lead,
        headlines=_headlines(lead),
        unit=next((block.unit for block in lead.blocks if isinstance(block, Rows)), ""),
        summaries=[section.summary for section in others if section.summary],
        diagnosed=any(section.key == "diagnostics" for section in others),
    )


def _headlines(section: Section) -> list[Row]:
    return [row for block in section.blocks if isinstance(block, Rows) for row in block.rows if row.headline]


def _groups(section: Section) -> list[tuple[str, list[Block]]]:
    """The blocks of a section in order, neighbours of one kind together, with what the template calls the kind."""
    shown = [block for block in section.blocks if not isinstance(block, LineChart) or block.on_page]
    return [(kind, list(blocks)) for kind, blocks in groupby(shown, key=lambda block: type(block).__name__)]


def _plain_rows(block: Rows, section: Section) -> list[Row]:
    """The rows that are neither headlines nor written beside a bar of the section, nor headings of such."""
    drawn = {bar.row for chart in section.blocks if isinstance(chart, BarChart) for bar in chart.bars}
    return [row for row in block.rows if not row.headline and row.value and (row.meaning or row not in drawn)]


def _legend(charts: Sequence[LineChart]) -> list[tuple[str, str]]:
    """Class and name of everything in charts that show the same things."""
    keys = {curve.look: curve.label for chart in charts for curve in chart.curves if curve.label}
    if any(not point.usable for chart in charts for curve in chart.curves for point in curve.points):
        keys["hollow"] = "not to be used"
    keys.update(("shade", chart.shaded[2]) for chart in charts if chart.shaded is not None)
    return list(keys.items())


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "visible": visible, "said": said, "sentence": lambda text: said(text, sentence=True), "headlines": _headlines,
        "groups": _groups, "plain_rows": _plain_rows, "legend": _legend, "draw_bars": draw_bars,
        "draw_lines": draw_lines, "heat_cells": heat_cells, "small": _small,
        "is_text": lambda cell: isinstance(cell, Verbatim),
        "json": lambda viewer: script_json(responses_payload(viewer.tables, viewer.unit)),
    }  # fmt: skip
    return environment


def _small(bar: Bar) -> str:
    """What stands in small letters beside a bar's name: what a file says of it, else its note where it is a button."""
    return bar.row.quote or (bar.row.note if bar.prompt is not None else "")


def said(text: str, sentence: bool = False) -> Markup:
    """Text of a section: its numbers as print has them, its first letter a capital if that is asked for."""
    if isinstance(text, Verbatim):
        return visible(text)
    return visible(typeset(sentence_case(text) if sentence else text))


def visible(text: str, keep_lines: bool = False) -> Markup:
    """Text with names in place of what would not show, marked as such; see :func:`visible_parts`.

    With ``keep_lines`` line breaks stay as they are, without a symbol.
    """
    if keep_lines:
        return Markup("\n").join(visible(line) for line in text.split("\n"))
    html = Markup("")
    for k, part in enumerate(visible_parts(text)):
        look = "name end" if part == "↵" else "name"
        html += Markup('<span class="{}">{}</span>').format(look, part) if k % 2 else escape(part)
    return html


@cache
def _asset(name: str) -> str:
    return files("entropy_probe.report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
