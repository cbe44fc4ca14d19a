"""A run: how the next step changes entropy, what the change comes from, and how far the numbers can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from entropy_probe.report.numbers import common_exponent, format_estimate, format_number, format_percent
from entropy_probe.report.sections.attribution import attribution_sections
from entropy_probe.report.sections.base import (
    Bar,
    Block,
    Listing,
    Row,
    Rows,
    Section,
    Table,
    Verbatim,
    bar_charts,
    written,
)
from entropy_probe.report.sections.diagnostics import diagnostics_section, optimizer_section
from entropy_probe.report.sections.horizons import horizon_blocks, horizon_rows, within
from entropy_probe.report.sections.validation import validation_section
from entropy_probe.report.tables import Tables, check_tables
from entropy_probe.report.verdict import verdict
from entropy_probe.report.wording import ESTIMATORS, UNITS
from entropy_probe.results.changes import HorizonPoint
from entropy_probe.results.probe import Coasted, Estimate, Pooled, Predicted, ProbeResult
from entropy_probe.results.size import seconds_per_sequence, size_for
from entropy_probe.results.validation import Validation

MEBIBYTE = 2**20
WELL_KNOWN = 0.1
"""Relative error of the prediction that a size is proposed for."""
INTERVALS = "; whiskers: 95% intervals"
_MEASURED_ON = {"update": "on the update batch: biased", "own": "on its own batch, self-influence out"}
_SOURCES = {
    "gradient": "this batch's gradient",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "rounding": "rounding",
}


def run_sections(
    result: ProbeResult,
    tables: Tables | None = None,
    validation: Validation | None = None,
    config: str | None = None,
    answers: Sequence[Section] = (),
) -> tuple[Section, ...]:
    """Everything that is shown of a run.

    Raises:
        ValueError: if the result holds no change at all, or the tables are of another run.
    """
    if tables is not None:
        check_tables(tables, result)
    validated = () if validation is None else (validation_section(validation, result.diagnostics.notes),)
    return (
        step_section(result),
        *attribution_sections(result, tables),
        *validated,
        *answers,
        diagnostics_section(result),
        optimizer_section(result.optimizer_state),
        *settings_sections(config, result),
    )


def step_section(result: ProbeResult) -> Section:
    """The change, predicted and realized, and the parts of the step that it comes from.

    Raises:
        ValueError: if the result holds no change at all.
    """
    exponent, unit, difference = _exponent(result), result.entropy.unit, result.difference
    clusters = f"{result.entropy.num_clusters} {UNITS[result.diagnostics.evaluation_unit]} on the evaluation side"
    rows, changes, parts = [Row("entropy H(θ)", written(result.entropy), clusters, headline=True)], [], []
    if (predicted := result.predicted) is not None:
        rows.append(Row("predicted δH₁", written(predicted, exponent), _errors(predicted), headline=True))
        changes.append(Bar(rows[-1], predicted.value, predicted.margin, look="dot"))
        parts = _part_bars(result, exponent)
        rows += [bar.row for bar in parts]
        if result.lifetime is not None:
            note = "the gradient through later momentum"
            rows.append(Row("lifetime", written(result.lifetime, exponent), note, indent=True))
        if result.committed is not None:
            rows.append(Row("committed", written(result.committed, exponent), "by the moments alone, after this step"))
        rows += _coasted_rows(result.coasted, exponent)
        parts += [replace(changes[0], look="total")] if parts else []
        rows += _pooled_rows(result.pooled, exponent)
    if (cross := result.cross_prompt) is not None:
        errors = f"SE: jackknife {format_number(cross.se_jackknife, 2)}, plug-in {format_number(cross.se_plugin, 2)}"
        sizes = "prompts" if cross.mode == "exact" else f"blocks of {cross.block_size} prompts"
        rows.append(Row("one batch δH₁", written(cross.estimate, exponent), errors, headline=True))
        changes.append(Bar(rows[-1], cross.delta_h1, cross.estimate.margin, look="dot"))
        rows.append(Row("clusters", str(cross.num_clusters), f"{sizes}, frozen geometry", indent=True))
    if (realized := result.realized) is not None:
        how = _MEASURED_ON.get(realized.batch, ESTIMATORS[realized.estimator])
        if (change := realized.estimate) is None:
            rows.append(Row("realized ΔH", "refused", how, headline=True, state="bad"))
        else:
            rows.append(Row("realized ΔH", written(change, exponent), how, headline=True))
            changes.append(Bar(rows[-1], change.value, change.margin, look="dot"))
        rows += _pooled_realized_rows(result.pooled, exponent)
        rows += horizon_rows(result.horizons, exponent)
        if predicted is not None and difference is not None and change is not None:
            rows += _comparison_rows(predicted, change, difference, exponent)
            if parts:
                parts.append(Bar(rows[-1], difference.value, difference.margin, predicted.value, linked=True))
                parts.append(replace(changes[-1], look="total"))
    rates = ", ".join(f"{rate:g}" for rate in sorted(set(result.optimizer_state.learning_rates)))
    beginning = f"; each bar begins where the one before ends{INTERVALS}"
    blocks = (
        *bar_charts("Predicted against realized", changes, unit, INTERVALS, "change"),
        *bar_charts("Where it comes from", parts, unit, beginning, "parts"),
        *horizon_blocks(result.horizons, unit),
        Rows(tuple(rows), unit),
        *_origin_blocks(result),
    )
    sentences = tuple(filter(None, [story(result), _two_questions(result), _committed_story(result), proposal(result)]))
    return Section("Entropy change of the next step", "result", "Step", f"learning rate {rates}", verdict(result),
                   sentences, cautions=cautions(result), blocks=blocks)  # fmt: skip


def _exponent(result: ProbeResult) -> int | None:
    """The power of ten that all changes of a result are written with."""
    realized, cross = result.realized, result.cross_prompt
    estimates = (result.predicted, realized and realized.estimate, cross and cross.estimate)
    return common_exponent(*(number for one in estimates if one for number in (one.value, one.standard_error)))


def _errors(change: Estimate) -> str:
    """The two errors of a change that the update batch has a part in: for this very step, and by choice of the batch.

    Without the second, both are the same, and the value's own says it.
    """
    if not isinstance(change, Predicted) or not change.se_update:
        return ""
    how = ", jackknife" if change.se_update_method == "jackknife" else ""
    return f"this step ± {format_number(change.se_evaluation, 2)}, batch ± {format_number(change.se_update, 2)}{how}"


def _two_questions(result: ProbeResult) -> str:
    """Which ± is about this very step, and which about other batches; "" where only one is asked."""
    if result.predicted is None or not result.predicted.se_update:
        return ""
    return (
        "The ± of a prediction is about other update batches of this kind, too; what the step of this batch does is "
        "known to the error called this step."
    )


def _part_bars(result: ProbeResult, exponent: int | None) -> list[Bar]:
    bars, start = [], 0.0
    for name, part in result.components.items():
        row = Row(name.replace("_", " "), written(part, exponent), _errors(part), indent=True)
        bars.append(Bar(row, part.value, part.margin, start, linked=bool(bars)))
        start += part.value
    return bars


def _origin_blocks(result: ProbeResult) -> tuple[Block, ...]:
    """The momentum part by step of origin."""
    momentum = result.components.get("momentum")
    if result.origins is None or momentum is None:
        return ()
    names = [
        *(f"{k} steps ago" if k > 1 else "the last step" for k in range(1, len(result.origins.steps) + 1)),
        "older",
    ]
    rows = tuple(
        (name, written(part), format_percent(part.value / momentum.value, 0) if momentum.value else "–")
        for name, part in zip(names, (*result.origins.steps, result.origins.older), strict=True)
    )
    return (Table("Momentum by step of origin", ("momentum from", "adds", "share of it"), rows),)


def _coasted_rows(coasted: Coasted | None, exponent: int | None) -> list[Row]:
    """The same measured, by steps with zero gradients."""
    if coasted is None:
        return []
    change, gap = coasted.change.estimate, coasted.difference
    note = f"measured after {coasted.steps} zero-gradient steps"
    if change is None:
        return [Row("coasted", "refused", note, indent=True, state="bad")]
    if gap is not None:
        note += f"; {written(gap, exponent)} from committed"
    rows = [Row("coasted", written(change, exponent), note, indent=True)]
    if coasted.weight_decay is not None:
        rows.append(Row("weight decay", written(coasted.weight_decay, exponent), "in as many steps", indent=True))
    return rows


def _committed_story(result: ProbeResult) -> str:
    """What momentum alone will still do, in a sentence: as measured, else to first order; "" where it is not told."""
    coasted = None if result.coasted is None else result.coasted.change.estimate
    onward, how = (result.committed, ", to first order") if coasted is None else (coasted, "")
    if onward is None or not onward.distinguishable:
        return ""
    way = "fall" if onward.value < 0 else "rise"
    share = f" ({format_percent(abs(onward.value) / result.entropy.value)} of H)" if result.entropy.value > 0 else ""
    number = format_estimate(abs(onward.value), onward.standard_error)
    return (
        f"If all gradients vanished after this step, entropy would still {way} by {number} {onward.unit}{share} by "
        f"momentum alone{how}."
    )


def _pooled_rows(pooled: Pooled | None, exponent: int | None) -> list[Row]:
    """The prediction by the batch of the step, and by both batches."""
    if pooled is None:
        return []
    own, both = pooled.own, pooled.predicted
    meaning = "The two are independent given this step; z is of their difference, by their errors given this step."
    note = f"SE of this step {format_number(own.se_evaluation, 2)}; z {pooled.z:+.1f} to the evaluation rollouts"
    weights = f"SE of this step {format_number(both.se_evaluation, 2)}; {format_percent(pooled.weight, 0)} evaluation"
    return [
        Row("by its own batch", written(own, exponent), note, indent=True, meaning=meaning),
        Row("by both δH₁", written(both, exponent), weights, headline=True),
    ]


def _pooled_realized_rows(pooled: Pooled | None, exponent: int | None) -> list[Row]:
    """The same of the realized change."""
    if pooled is None or pooled.own_realized is None:
        return []
    own = pooled.own_realized.estimate
    value = "refused" if own is None else written(own, exponent)
    rows = [Row("by its own batch", value, "self-influence out", indent=True)]
    if (both := pooled.realized) is None:
        return rows
    return [*rows, Row("by both ΔH", written(both, exponent), "SE of this step", headline=True)]


def _comparison_rows(predicted: Estimate, realized: Estimate, difference: Estimate, exponent: int | None) -> list[Row]:
    ratio = format_number(realized.value / predicted.value) if predicted.value else "undefined"
    meaning = "The two share most of their sampling noise, so their difference is sharper than either."
    return [
        Row("ΔH / δH₁", ratio, "ratio", meaning="1 where the change is linear in the step."),
        Row("ΔH − δH₁", written(difference, exponent), "paired difference", meaning=meaning),
    ]


def story(result: ProbeResult) -> str:
    """The prediction in a sentence: how much, of how much entropy, and by which part of the step; "" if it is none."""
    predicted, horizons = result.predicted, result.horizons
    if predicted is None or not predicted.value:
        return ""
    if horizons is not None and horizons.headline is not None:
        return _story_within(horizons.headline, horizons.stated)
    way = "lower" if predicted.value < 0 else "raise"
    sentence = f"To first order the step will {way} entropy by {format_number(abs(predicted.value))} {predicted.unit}"
    if result.entropy.value > 0:
        sentence += f", {format_percent(abs(predicted.value) / result.entropy.value)} of what it is"
    parts = {name: part.value for name, part in result.components.items() if part.value}
    if len(parts) < 2:
        return f"{sentence}."
    largest = max(parts, key=lambda name: abs(parts[name]))
    if all(value * predicted.value > 0 for value in parts.values()):
        share = format_percent(parts[largest] / predicted.value, 0)
        return f"{sentence}; {share} of that comes from {_SOURCES[largest]}."
    against = [_SOURCES[name] for name, value in parts.items() if value * predicted.value < 0]
    return f"{sentence}; {' and '.join(against)} work{'s' * (len(against) == 1)} against it."


def _story_within(horizon: int, stated: HorizonPoint) -> str:
    value, unit = stated.predicted.value, stated.predicted.unit
    way = "lower" if value < 0 else "raise"
    sentence = f"To first order the step will {way} entropy by {format_number(abs(value))} {unit} {within(horizon)}"
    if stated.beyond is None:
        return f"{sentence} of a changed one."
    resolved = "" if stated.beyond.distinguishable else ", not resolved"
    return f"{sentence} of a changed one; beyond, {written(stated.beyond)}{resolved}."


def proposal(result: ProbeResult) -> str:
    """How many evaluation sequences it takes to know the prediction well, and how long that is here; "" where none."""
    size, each = size_for(result, WELL_KNOWN), seconds_per_sequence(result)
    if size is None:
        return ""
    about = "more than" if size.at_least else "about"
    sequences = int(float(f"{size.sequences:.1e}"))
    took = "" if each is None else f", {_duration(each * sequences)} here"
    return f"To know δH₁ of this step to {WELL_KNOWN:.0%} takes {about} {sequences:,} evaluation sequences{took}."


def _duration(seconds: float) -> str:
    if seconds < 60:
        return "less than a minute"
    minutes = round(seconds / 60)
    hours = f"{seconds / 3600:.1f} hours"
    return hours if minutes > 90 else "1 minute" if minutes == 1 else f"{minutes} minutes"


def cautions(result: ProbeResult) -> tuple[str, ...]:
    """What a reader of the headline must know: rollouts that are not the policy's, parts that are not modelled."""
    sentences, diagnostics = [], result.diagnostics
    fit = diagnostics.policy_fit
    if fit.evaluation is not None and fit.evaluation.status == "off_policy":
        sentences.append("The evaluation rollouts do not fit the policy, so the numbers are biased.")
    if fit.update is not None and fit.update.status == "off_policy":
        sentences.append("The update rollouts do not fit the policy; the step is taken on them as given.")
    if count := len(diagnostics.not_modelled):
        parts = "One part of the trainer's step is" if count == 1 else f"{count} parts of the trainer's step are"
        sentences.append(f"{parts} not in these numbers.")
    return tuple(sentences)


def settings_sections(config: str | None, result: ProbeResult | None = None) -> tuple[Section, ...]:
    """What the numbers were computed with, if anything is known of it; without a config file what the result says."""
    blocks: list[Block] = []
    if config is not None:
        blocks.append(Listing("Resolved configuration (config.yaml)", config))
    elif result is not None:
        lines = [f"{key}: {value}\n" for key, value in result.config.items()]
        blocks.append(Listing("Resolved settings of the probe", "".join(lines)))
    if result is not None:
        costs = [(phase, f"{seconds:.2f} s") for phase, seconds in result.timing.items()]
        memory = ((kind.replace("_", " "), size / MEBIBYTE) for kind, size in result.memory.items())
        costs += [(f"{kind} memory", f"{size:,.0f} MiB") for kind, size in memory]
        versions = [(library, Verbatim(version)) for library, version in result.versions.items()]
        folded = (("Time and memory", ("phase", "used"), costs), ("Versions", ("library", "version"), versions))
        blocks += [Table(title, columns, tuple(rows), folded=True) for title, columns, rows in folded if rows]
    section = Section("Settings", "settings", "Settings", blocks=tuple(blocks), page_only=True)
    return (section,) if blocks else ()
