"""What mkdocs does not do by itself: formulas as MathML, the command line's page, and roles of docstrings.

MathML needs no script and no font from elsewhere: browsers draw it.
"""

from __future__ import annotations

import html
import re
from typing import Any

import typer
from latex2mathml.converter import convert
from typer.cli import get_docs_for_click

from entropy_probe.cli import app

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
COMMANDS = "<!-- commands -->"
ROLE = re.compile(r":(?:class|meth|func|attr):(?=<code>)")
UNKNOWN = {r"\langle": "⟨", r"\rangle": "⟩"}
"""Commands that latex2mathml leaves as they are behind ``\\Big``."""


def mathml(match: re.Match[str]) -> str:
    """A formula in LaTeX as MathML.

    Raises:
        ValueError: if a command was not understood.
    """
    formula = html.unescape(match[2]).strip()
    drawn = convert(formula, display="block" if match[1] == "div" else "inline")
    for command, character in UNKNOWN.items():
        drawn = drawn.replace(f">{command}<", f">{character}<")
    if "\\" in drawn:
        raise ValueError(f"expected commands that latex2mathml knows, got {formula}; write it otherwise")
    return f'<{match[1]} class="formula">{drawn}</{match[1]}>'


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the commands' own help where the page of the command line asks for it."""
    if COMMANDS not in markdown:
        return markdown
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="entropy-probe")
    groups = get_docs_for_click(obj=command, ctx=context, name="entropy-probe", title="entropy-probe", indent=1)
    return markdown.replace(COMMANDS, groups)


def on_page_content(content: str, **_: Any) -> str:
    """Draw formulas; roles of reStructuredText become plain code."""
    return FORMULA.sub(mathml, ROLE.sub("", content))
