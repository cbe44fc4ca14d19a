"""What the page says of the attribution: which prompts, layers and modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from entropy_probe.report.charts import Bar, BarChart, bar_chart
from entropy_probe.report.numbers import common_exponent, format_estimate, format_number, format_percent, typeset
from entropy_probe.report.tables import Columns, Tables
from entropy_probe.results.probe import ProbeResult
from entropy_probe.results.student import critical_value
from entropy_probe.results.validation import Validation

__all__ = [
    "Grid",
    "culprits",
    "forecast_name",
    "layer_grid",
    "measured_on",
    "prompt_chart",
    "prompt_sentence",
    "token_sentence",
    "validation_sentence",
]

ENOUGH = 0.5
ENDS = 8
LEVELS = 6
EXCERPT = 60
COMPONENTS = ("gradient", "momentum", "weight_decay")


def culprits(contributions: np.ndarray, share: float = ENOUGH) -> tuple[list[int], float]:
    """The fewest prompts that together give at least a share of all that pushes the way the batch goes.

    Prompts that push the other way do not count against it, so the share is at most 1.

    Args:
        contributions: of each prompt, ``[B]``.
        share: to reach.

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


def prompt_sentence(prompts: Columns) -> list[str]:
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
        size = typeset(format_number(abs(float(against.sum())), 2))
        push = f"Another {len(against)} prompts push" if len(against) > 1 else "Another prompt pushes"
        sentences.append(f"{push} it {back}, by {size} together.")
    silent = int((contributions == 0).sum())
    if silent:
        who = f"{silent} prompts contribute" if silent > 1 else "One prompt contributes"
        sentences.append(f"{who} nothing, as where all rewards are equal.")
    return sentences


def token_sentence(tables: Tables, result: ProbeResult) -> str:
    """How many tokens, what those of good and of bad responses add, and how they compare with the covariance term."""
    contributions, advantages = tables.tokens["contribution"], tables.tokens["advantage"]
    sums = [float(contributions[chosen].sum()) for chosen in (advantages > 0, advantages < 0)]
    good, bad = (typeset(format_number(x, 2)) for x in sums)
    said = (
        f"{len(contributions):,} tokens of {len(np.unique(tables.tokens['response_id'])):,} responses. Those with a "
        f"positive advantage add {good} {result.entropy.unit} to δH₁, those with a negative one {bad}."
    )
    summary = result.attribution
    if summary is not None and summary.rank_correlation_with_covariance is not None:
        rank = typeset(f"{summary.rank_correlation_with_covariance:.2f}")
        said += f" Rank correlation with the covariance term of Cui et al. (2025): {rank}, near −1 where they agree."
    return said


FORECASTS = {"covariance": "negated covariance terms", "advantages": "sum of advantages"}


def forecast_name(name: str) -> str:
    """What a forecast of a validation is called."""
    return FORECASTS.get(name, name)


def measured_on(validation: Validation) -> str:
    """Which rollouts the changes of a validation were measured on, and how reliably."""
    number = f"{validation.num_sequences:,} evaluation sequences"
    if validation.measured_on == "halves":
        said = f"changes are measured on one half of {number} and forecast from the other, both ways"
    else:
        said = f"changes are measured on {number} that the contributions do not come from"
    known = validation.reliability
    return said if known is None else f"{said}; reliability of the measured changes: {known:.3f}"


def validation_sentence(validation: Validation) -> str:
    """How well contributions, and simpler forecasts, rank the changes measured after real steps."""
    kept = len(validation.steps[0].kept)
    said = f"Checked by {validation.num_measured} real steps on {kept} of {validation.num_prompts} prompts each:"
    parts = [
        typeset(f"with the {forecast_name(name)} {found.value:.3f} ({found.low:.3f} to {found.high:.3f})")
        for name, found in validation.correlations.items()
        if found is not None
    ]
    if not parts:
        return f"{said} no rank correlation ({validation.undefined})."
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    how = measured_on(validation)
    return f"{said} rank correlation (95% interval) of the measured changes {listed}. {how[0].upper()}{how[1:]}."


def prompt_chart(prompts: Columns, unit: str, folds: int | None) -> BarChart | None:
    """Prompts from the most negative to the most positive contribution; of many only those at the two ends.

    Args:
        prompts: the table.
        unit: of the contributions.
        folds: how many folds the standard errors are from, if there are any.
    """
    order = np.argsort(prompts["contribution"], kind="stable").tolist()
    if len(order) > 2 * ENDS:
        order = order[:ENDS] + order[-ENDS:]
    return bar_chart([_prompt_bar(prompts, row, folds) for row in order], unit)


def _prompt_bar(prompts: Columns, row: int, folds: int | None) -> Bar:
    value, error = float(prompts["contribution"][row]), float(prompts["standard_error"][row])
    known = not math.isnan(error)
    text = format_estimate(value, error) if known else format_number(value)
    mean = float(prompts["mean_reward"][row])
    reward = "" if math.isnan(mean) else f"mean reward {typeset(format_number(mean, 2))}"
    return Bar(
        f"Prompt {prompts['prompt_id'][row]}",
        value,
        typeset(text),
        critical_value(folds - 1) * error if known and folds else None,
        key=int(prompts["prompt_id"][row]),
        note=_excerpt(prompts["prompt"][row]) or reward,
    )


def _excerpt(text: str | None) -> str:
    """The end of a prompt on one line: chat templates begin alike."""
    line = " ".join((text or "").split())
    return line if len(line) <= EXCERPT else f"…{line[-EXCERPT:]}"


@dataclass(frozen=True)
class Cell:
    """A number with the strength of its colour: -6 to 6, by the square root of its share of the largest."""

    text: str
    level: int


@dataclass(frozen=True)
class Grid:
    """Layers by module types, with sums, and the same by part of the step; ``scale`` is what the numbers are in."""

    modules: tuple[str, ...]
    layers: tuple[tuple[str, tuple[Cell | None, ...], Cell], ...]
    parts: tuple[tuple[str, tuple[Cell, ...]], ...]
    scale: str


def layer_grid(layers: Columns, unit: str) -> Grid:
    """The contribution of each layer and module type to the whole first-order change."""
    names, modules = list(dict.fromkeys(layers["layer"])), list(dict.fromkeys(layers["module"]))
    cells: dict[tuple[str, str], float] = {}
    for layer, module, total in zip(layers["layer"], layers["module"], layers["total"], strict=True):
        cells[layer, module] = cells.get((layer, module), 0.0) + float(total)
    by_layer = {name: sum(x for (layer, _), x in cells.items() if layer == name) for name in names}
    parts = {module: [_sum_where(layers, part, module) for part in (*COMPONENTS, "total")] for module in modules}
    power = common_exponent(*cells.values(), *by_layer.values(), *(x for row in parts.values() for x in row)) or 0

    def colour(values: Iterable[float]) -> Callable[[float], Cell]:
        strongest = max(map(abs, values), default=0.0)
        return lambda value: _cell(value, strongest, power)

    in_grid, in_layers = colour(cells.values()), colour(by_layer.values())
    in_parts = colour(x for row in parts.values() for x in row)
    return Grid(
        modules=tuple(modules),
        layers=tuple(
            (
                name,
                tuple(in_grid(cells[name, module]) if (name, module) in cells else None for module in modules),
                in_layers(by_layer[name]),
            )
            for name in names
        ),
        parts=tuple((module, tuple(map(in_parts, row))) for module, row in parts.items()),
        scale=f"{typeset(f'1e{power}')[1:]} {unit}",
    )


def _sum_where(layers: Columns, part: str, module: str) -> float:
    return sum(float(x) for x, name in zip(layers[part], layers["module"], strict=True) if name == module)


def _cell(value: float, strongest: float, power: int) -> Cell:
    level = round(LEVELS * math.sqrt(abs(value) / strongest)) if strongest else 0
    text = f"{value / 10.0**power:.2f}" if value else "0"
    return Cell(typeset(text if float(text) else text.lstrip("-")), int(math.copysign(level, value)))


def _listed(names: Sequence[str], most: int = 8) -> str:
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
