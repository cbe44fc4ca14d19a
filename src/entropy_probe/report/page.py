"""A saved result as one self-contained HTML file: no network, no model, no torch.

Text from models and files goes through the template's escaping or into JSON that the script writes with
``textContent``. A content security policy allows the page's own style and script, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from entropy_probe.report.attribution import (
    layer_grid,
    prompt_chart,
    prompt_sentence,
    token_sentence,
    validation_sentence,
)
from entropy_probe.report.numbers import format_number, typeset
from entropy_probe.report.payload import responses_payload, script_json
from entropy_probe.report.sweep_views import sweep_view
from entropy_probe.report.tables import Tables, check_tables
from entropy_probe.report.text import visible_parts
from entropy_probe.report.verdict import verdict
from entropy_probe.report.views import (
    cards,
    caveats,
    changes,
    checks,
    comparison,
    how_computed,
    optimizer_checks,
    story,
    waterfall,
)
from entropy_probe.results.note import Note, distinct
from entropy_probe.results.probe import ProbeResult
from entropy_probe.results.sweep import Sweep
from entropy_probe.results.validation import Validation

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["run_page", "sweep_page"]

MEBIBYTE = 2**20


def run_page(
    result: ProbeResult,
    *,
    tables: Tables | None = None,
    validation: Validation | None = None,
    config: str | None = None,
    name: str = "",
) -> str:
    """The report of a run.

    Args:
        result: what to show.
        tables: the attribution, if there is one.
        validation: its validation by real steps, if there is one.
        config: the resolved settings as text; those in the result if None.
        name: of the checkpoint.

    Raises:
        ValueError: if the result holds no change at all, or the tables are of another run.
    """
    judged = verdict(result)
    kind = judged.kind[0].upper() + judged.kind[1:]
    rates = ", ".join(f"{rate:g}" for rate in sorted(set(result.optimizer_state.learning_rates)))
    return _render(
        title="Entropy change of the next step",
        subtitle=f"learning rate {typeset(rates)}",
        name=name,
        verdict=(kind, typeset(judged.sentence), STATES[judged.kind]),
        story=story(result),
        result=result,
        sweeps=[],
        config=config,
        **_of_result(result, () if validation is None else validation.notes),
        **_of_tables(tables, result, validation),
    )


def sweep_page(sweeps: Mapping[str, Sweep], *, config: str | None = None, name: str = "") -> str:
    """The report of a sweep, or of several.

    Args:
        sweeps: by the checkpoint's name; a single one has the name "".
        config: the resolved settings as text.
        name: of the checkpoint, or of the directory.
    """
    views = [sweep_view(sweep, key) for key, sweep in sweeps.items()]
    prediction = sweeps[""].prediction if len(sweeps) == 1 and "" in sweeps else None
    unit = next(iter(sweeps.values())).unit
    return _render(
        title="Entropy change at different learning rates",
        subtitle=f"{len(next(iter(sweeps.values())).points)} rates, {unit}",
        name=name,
        verdict=None,
        story="",
        result=prediction,
        sweeps=views,
        config=config,
        **(dict.fromkeys(_RESULT_KEYS, ()) if prediction is None else _of_result(prediction)),
        **_of_tables(None, prediction),
    )


STATES = {
    "agrees within error": "ok",
    "distinguishable from 0": "ok",
    "indistinguishable from 0": "look",
    "beyond the linear range": "look",
    "below the noise floor": "look",
    "not measured": "bad",
}
_RESULT_KEYS = ("cards", "caveats", "changes", "comparison", "waterfall", "checks", "state", "notes", "how")


def _of_result(result: ProbeResult, more: Sequence[Note] = ()) -> dict[str, Any]:
    return {
        "cards": cards(result),
        "caveats": caveats(result),
        "changes": changes(result),
        "comparison": comparison(result),
        "waterfall": waterfall(result),
        "checks": checks(result),
        "state": optimizer_checks(result.optimizer_state),
        "notes": distinct((*result.diagnostics.notes, *more)),
        "how": how_computed(result),
    }


def _of_tables(
    tables: Tables | None, result: ProbeResult | None, validation: Validation | None = None
) -> dict[str, Any]:
    if tables is None or result is None:
        return dict.fromkeys(("prompts", "prompt_story", "prompt_table", "grid", "payload", "token_story", "validated"))
    check_tables(tables, result)
    unit, prompts = result.entropy.unit, tables.prompts
    return {
        "prompts": prompt_chart(prompts, unit, result.attribution and result.attribution.folds),
        "prompt_story": prompt_sentence(prompts),
        "prompt_table": prompts,
        "grid": layer_grid(tables.layers, unit),
        "payload": script_json(responses_payload(tables, unit)),
        "validated": validation_sentence(validation) if validation is not None else "",
        "token_story": token_sentence(tables, result),
    }


def _render(**context: Any) -> str:
    style, script = (Markup(_asset(name)) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    template = _environment().get_template("page.html")
    return template.render(style=style, script=script, policy=policy, **context)


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
    environment.filters["visible"] = visible
    environment.filters["number"] = lambda value, digits=3: typeset(format_number(float(value), digits))
    environment.filters["optional"] = lambda value: "" if math.isnan(value) else typeset(format_number(float(value)))
    environment.filters["mebibytes"] = lambda size: f"{size / MEBIBYTE:,.0f} MiB"
    return environment


def visible(text: str, keep_lines: bool = False) -> Markup:
    """Text with names in place of what would not show, marked as such; see :func:`visible_parts`.

    Args:
        text: any.
        keep_lines: leave line breaks as they are, without a symbol.
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
