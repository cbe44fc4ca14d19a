"""What mkdocs does not do by itself: formulas as MathML, the pages of commands and settings, and roles of docstrings.

Browsers draw MathML without a script. A font with the measures of mathematics is not on every machine, so the site has
one: STIX Two Math, out of the package ziamath.
"""

from __future__ import annotations

import html
import inspect
import json
import re
from importlib.resources import files as package_files
from typing import Any, get_args

import typer
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from typer.cli import get_docs_for_click

from entropy_probe.cli import app
from entropy_probe.cli.schema import SCHEMA_FILE, described, schema_text
from entropy_probe.cli.sweep_config import SweepConfig

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>([.,;:)]*)', re.DOTALL)
ANNOTATED = re.compile(r"(?:typing|pathlib)\.(?:Annotated\[(\w+), FieldInfo\(.*\)\])?")
ROLE = re.compile(r":(?:class|meth|func|attr):(?=<code>)")
CORRECTIONS = [
    (r">\\langle<", ">⟨<"),  # left as they are behind \Big
    (r">\\rangle<", ">⟩<"),
    (r'"thinmathspace"', '"0.1667em"'),  # a name that browsers do not know
    (r"<mi>(&#x000B1;)</mi>", r"<mo>\1</mo>"),
    (r'<mo stretchy="false">&#x0007C;', '<mo stretchy="false" lspace="0" rspace="0">&#x0007C;'),
    (r"(<mi>(?:log|exp)</mi>(?:<mn>2</mn></msup>)?)(?=<m(?:i|row|sub|under)>)", r'\1<mspace width="0.1667em"/>'),
]
"""Of what latex2mathml 3.81 writes."""


def mathml(match: re.Match[str]) -> str:
    """A formula in LaTeX as MathML, with the punctuation that follows it.

    Raises:
        ValueError: if a command was not understood.
    """
    formula = html.unescape(match[2]).strip()
    drawn = convert(formula, display="block" if match[1] == "div" else "inline")
    for wrong, right in CORRECTIONS:
        drawn = re.sub(wrong, right, drawn)
    if "\\" in drawn or "&#x02015;" in drawn:  # a command as it stands, or a bar that does not stretch
        raise ValueError(f"expected commands that latex2mathml knows, got {formula}; write it otherwise")
    return f'<{match[1]} class="formula">{drawn}{match[3]}</{match[1]}>'


def on_files(files: Files, config: Any) -> Files:
    """Add the font of formulas, which extra.css names, and the schema of config files."""
    font = package_files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"
    files.append(File.generated(config, "math.ttf", abs_src_path=str(font)))
    files.append(File.generated(config, f"reference/{SCHEMA_FILE}", content=schema_text()))
    return files


def commands() -> str:
    """Every command with its arguments and options, from the commands themselves."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="entropy-probe")
    return get_docs_for_click(obj=command, ctx=context, name="entropy-probe", title="entropy-probe", indent=1)


def settings(model: type[BaseModel] = SweepConfig, prefix: str = "") -> str:
    """Every key of a config file, with its default and what its class's docstring says of it."""
    words = described(model)
    keys, sections = [], []
    for name, field in model.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if inspect.isclass(kind)]
        nested = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        if nested is not None:
            sections.append(f"## {prefix}{name}\n\n{words.get(name, '')}\n\n{settings(nested, f'{prefix}{name}.')}")
            continue
        value = None if field.is_required() else to_jsonable_python(field.get_default(call_default_factory=True))
        default = "required" if field.is_required() else f"default `{json.dumps(value)}`"
        kind = ANNOTATED.sub(r"\1", inspect.formatannotation(field.annotation))
        keys.append(f"- **`{prefix}{name}`** (`{kind}`, {default}): {words.get(name, '')}")
    return "\n".join(keys) + "\n\n" + "\n".join(sections)


GENERATED = {"<!-- commands -->": commands, "<!-- settings -->": settings}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what is generated where a page asks for it."""
    for marker, generate in GENERATED.items():
        if marker in markdown:
            markdown = markdown.replace(marker, generate())
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Draw formulas; roles of reStructuredText become plain code."""
    return FORMULA.sub(mathml, ROLE.sub("", content))
