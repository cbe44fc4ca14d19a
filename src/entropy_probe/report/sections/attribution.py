"""What the prediction comes from: which prompts, which tokens, which layers and modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, takewhile

import numpy as np

from entropy_probe.report.numbers import common_exponent, format_estimate, format_in, format_number, format_percent
from entropy_probe.report.sections.base import (
    Bar,
    HeatMap,
    Row,
    Rows,
    Section,
    Table,
    TokenViewer,
    Verbatim,
    bar_charts,
)
from entropy_probe.report.sections.horizons import within
from entropy_probe.report.tables import Columns, Tables
from entropy_probe.results.attribution import AttributionSummary
from entropy_probe.results.probe import ProbeResult
from entropy_probe.results.student import critical_value

ENOUGH = 0.5
ENDS = 8
MAX_NAMED = 3
EXCERPT = 60
MAX_SHARED = 8
"""Characters that all names may begin with before these are left out."""
PARTS = ("gradient", "momentum", "weight_decay", "total")


def attribution_sections(result: ProbeResult, tables: Tables | None) -> tuple[Section, ...]:
    """Prompts, tokens and layers; of a result without tables only what it says itself."""
    summary = result.attribution
    if summary is None:
        how = "with attribution=true on the command line, or attribution: true in the config"
        notice = f"Not computed in this run. Run again {how}."
        title = "Which prompts, tokens and layers did it"
        return (Section(title, "prompts", "Prompts", sentences=(notice,), page_only=True),)
    if tables is None:
        return (_tokens_section(summary),)
    return (
        prompts_section(tables.prompts, summary.unit, summary.folds, of_horizon(summary)),
        _tokens_section(summary, tables),
        layers_section(tables.layers, summary.unit),
    )


def prompts_section(prompts: Columns, unit: str, folds: int | None, horizon: str = "") -> Section:
    """What each prompt adds, from the most negative to the most positive; drawn, of many, only at the two ends."""
    contributions = prompts["contribution"].tolist()
    exponent = common_exponent(*contributions)
    order = np.argsort(prompts["contribution"], kind="stable").tolist()
    shown = order if len(order) <= 2 * ENDS else order[:ENDS] + order[-ENDS:]
    lines = _prompt_lines(prompts)
    bars = {k: _prompt_bar(prompts, k, lines[k], folds, exponent) for k in shown}
    down = [bars[k].row for k in shown[:MAX_NAMED] if contributions[k] < 0]
    up = [bars[k].row for k in shown[::-1][:MAX_NAMED] if contributions[k] > 0]
    headed = (("lowering entropy most", down), ("raising entropy most", up))
    extremes = tuple(row for heading, rows in headed if rows for row in (Row(heading), *rows))
    caption = "; what each prompt's tokens add to δH₁ through the gradient"
    if any(bar.margin is not None for bar in bars.values()):
        caption += "; whiskers: 95% intervals, from the choice of evaluation rollouts"
    chart = bar_charts("Contribution of each prompt", list(bars.values()), unit, caption, "prompts")
    sentences = [*prompt_sentences(prompts), *([horizon] if horizon else [])]
    blocks = (*chart, *([Rows(extremes, unit)] if extremes else []), _all_prompts(prompts, lines))
    return Section("Which prompts did it", "prompts", "Prompts", sentences=tuple(sentences), summary=sentences[0],
                   blocks=blocks)  # fmt: skip


def of_horizon(summary: AttributionSummary) -> str:
    """What contributions count of the tokens after a changed one, in a sentence; "" if all."""
    if summary.horizon is None:
        return ""
    sentence = f"Contributions are to the change {within(summary.horizon)} of a changed one"
    if (alike := summary.correlation_with_whole) is None:
        return f"{sentence}."
    return f"{sentence}; over prompts they correlate {alike:.3f} with those to the whole response."


def _prompt_bar(prompts: Columns, k: int, line: str, folds: int | None, exponent: int | None) -> Bar:
    value, error = float(prompts["contribution"][k]), float(prompts["standard_error"][k])
    known, number, reward = not math.isnan(error), int(prompts["prompt_id"][k]), float(prompts["mean_reward"][k])
    note = f"{prompts['num_responses'][k]} responses"
    note += "" if math.isnan(reward) else f", reward {format_number(reward, 2)}"
    text = format_estimate(value, error, exponent) if known else format_in(value, exponent)
    row = Row(f"prompt {number}", text, note, quote=line, quote_begins=_names(prompts)[k] is not None, indent=True)
    return Bar(row, value, critical_value(folds - 1) * error if known and folds else None, prompt=number)


def _names(prompts: Columns) -> Sequence[str | None]:
    return prompts.get("name", [None] * len(prompts["prompt_id"]))


def _prompt_lines(prompts: Columns) -> list[Verbatim]:
    """A line to know each prompt by: what the user says, where it differs between prompts, or the text's end."""
    names = [None if name is None else " ".join(name.split()) for name in _names(prompts)]
    known = sorted({name for name in names if name is not None})
    start = _shared(known)
    ends = -_shared([name[start:][::-1] for name in known]) or None
    lines = []
    for name, text in zip(names, prompts["prompt"], strict=True):
        if name is None:
            line = " ".join((text or "").split())
            lines.append(Verbatim(line if len(line) <= EXCERPT else f"…{line[-EXCERPT:]}"))
        else:
            own = name[start:ends]
            after = "…" if len(own) > EXCERPT else "" if ends is None else " …"
            lines.append(Verbatim(f"{'…' if start else ''}{own[:EXCERPT].rstrip()}{after}"))
    return lines


def _shared(texts: Sequence[str]) -> int:
    """How many characters different texts begin with alike, up to a space; 0 for few."""
    same = "".join(c[0] for c in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))
    return same.rfind(" ") + 1 if len(same) > MAX_SHARED and len(texts) > 1 else 0


def _all_prompts(prompts: Columns, lines: Sequence[str]) -> Table:
    numbers = ("mean_reward", "contribution", "standard_error", "covariance")
    rows = tuple(
        (str(number), line, str(responses), str(tokens), *(format_number(x) if x == x else "" for x in more))
        for number, line, responses, tokens, *more in zip(
            prompts["prompt_id"],
            lines,
            *(prompts[column] for column in ("num_responses", "num_tokens", *numbers)),
            strict=True,
        )
    )
    columns = ("prompt", "text", "responses", "tokens", *(name.replace("_", " ") for name in numbers))
    return Table(f"All {len(rows)} prompts", columns, rows, folded=True)


def culprits(contributions: np.ndarray, share: float = ENOUGH) -> tuple[list[int], float]:
    """The fewest prompts that together give at least a share of all that pushes the way the batch goes.

    Prompts that push the other way do not count against it, so the share is at most 1.

    Returns:
        Rows of ``contributions``, largest first, and the share that they reach; none and 0 where all is 0.
    """
    pushing = contributions * np.sign(contributions.sum())
    total = pushing[pushing > 0].sum()
    if not total > 0:
        return [], 0.0
    order = np.argsort(-pushing, kind="stable").tolist()
    reached = list(accumulate(pushing[row] / total for row in order))
    count = next(k for k, sum_ in enumerate(reached, 1) if sum_ >= share * (1 - 1e-12))
    return order[:count], min(1.0, float(reached[count - 1]))


def prompt_sentences(prompts: Columns) -> list[str]:
    """Who did it, in sentences, the most important first."""
    contributions = prompts["contribution"]
    rows, share = culprits(contributions)
    if not rows:
        return ["No prompt of this batch contributes anything: all advantages are 0, or all cancel."]
    number, down = len(contributions), contributions.sum() < 0
    ids = _listed([str(prompts["prompt_id"][row]) for row in rows])
    who = f"{len(rows)} of {number} prompts cause" if len(rows) > 1 else f"One of {number} prompts causes"
    way, back = ("down", "up") if down else ("up", "down")
    sentences = [f"{who} {format_percent(share, 0)} of all that pushes entropy {way} in this batch: {ids}."]
    against = contributions[contributions > 0 if down else contributions < 0]
    if len(against):
        size = format_number(abs(float(against.sum())), 2)
        some, together = f"Another {len(against)} prompts push", f"by {size} together"
        who, by = (some, together) if len(against) > 1 else ("Another prompt pushes", f"by {size}")
        sentences.append(f"{who} it {back}, {by}.")
    silent = int((contributions == 0).sum())
    if silent:
        who = f"{silent} prompts contribute" if silent > 1 else "One prompt contributes"
        sentences.append(f"{who} nothing, as where all rewards are equal.")
    return sentences


def _tokens_section(summary: AttributionSummary, tables: Tables | None = None) -> Section:
    """How many tokens, what those of good and of bad responses add, and how they compare with the covariance term."""
    good, bad = summary.positive_advantages, summary.negative_advantages
    exponent, rank = common_exponent(summary.gradient, good, bad), summary.rank_correlation_with_covariance
    adds = "What the tokens with a {} advantage add to δH₁ through the gradient."
    ranks = "Over tokens, of contributions with the covariance terms of that theory; -1 where they agree."
    said, theory = "undefined" if rank is None else f"{rank:.2f}", "rank correlation with Cui et al. (2025)"
    rows = Rows((
        Row("advantages > 0", format_in(good, exponent), summary.unit, meaning=adds.format("positive")),
        Row("advantages < 0", format_in(bad, exponent), summary.unit, meaning=adds.format("negative")),
        Row("covariance term", said, theory, meaning=ranks),
    ))  # fmt: skip
    count = f"{summary.num_tokens:,} tokens"
    if tables is not None:
        count += f" of {len(np.unique(tables.tokens['response_id'])):,} responses"
    viewer = () if tables is None else (TokenViewer(tables, summary.unit),)
    how = () if summary.method == "forward-mode" else (Verbatim(f"Tokens by {summary.method}."),)
    sentences = (f"The gradient part comes from {count}.", *how)
    return Section("Which tokens did it", "responses", "Responses", sentences=sentences, blocks=(rows, *viewer))


def layers_section(layers: Columns, unit: str) -> Section:
    """The contribution of each layer and module type to the whole first-order change, and by part of the step."""
    names, modules = (tuple(dict.fromkeys(layers[column])) for column in ("layer", "module"))

    def total(part: str, module: str | None = None, layer: str | None = None) -> float | None:
        chosen = zip(layers[part], layers["module"], layers["layer"], strict=True)
        terms = [float(x) for x, m, name in chosen if module in (m, None) and layer in (name, None)]
        return sum(terms) if terms else None

    cells = tuple((name, tuple(total("total", module, name) for module in modules)) for name in names)
    sums = tuple(total("total", layer=name) or 0.0 for name in names)
    by_part = tuple((module, tuple(total(part, module) for part in PARTS)) for module in modules)
    grid = HeatMap("Layers by module", ("layer", *modules), cells, unit, sums, "layers")
    headings = ("module", "gradient", "momentum", "weight decay", "all")
    parts = HeatMap("By part of the step", headings, by_part, unit)
    whole = "The whole of δH₁, momentum and weight decay included, by where the parameters are."
    return Section("Through which layers", "layers", "Layers", sentences=(whole,), blocks=(grid, parts), page_only=True)


def _listed(names: Sequence[str], most: int = 8) -> str:
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
