"""Training over its steps: entropy and what moves it, what the trainer logged beside it, and warnings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from entropy_probe.report.numbers import common_exponent, format_estimate, format_number, format_percent
from entropy_probe.report.sections.base import (
    Curve,
    HeatMap,
    LineChart,
    Look,
    Point,
    Row,
    Rows,
    Section,
    Table,
    Verbatim,
    Verdict,
    written,
)
from entropy_probe.report.sections.steps import Steps, chart_of, cumulated, logged_points, points_of, thinned
from entropy_probe.results.estimate import Estimate
from entropy_probe.results.live import ESTIMATES, Number, StepRecord, Timeline
from entropy_probe.results.note import Note

PRINTED, LISTED = 24, 400
"""Steps in the table for a terminal, and in that of the page."""
RECENT = 5
PROMPTS, SPANS, NAME = 10, 10, 48
RUNS = 6
"""Of more runs than have colours of their own the charts show the first."""


def timeline_sections(timelines: Sequence[Timeline]) -> tuple[Section, ...]:
    """Everything that is shown of a training run over its steps, or of several."""
    if len(timelines) == 1:
        return _one(timelines[0])
    return _beside(timelines), *(section for k, one in enumerate(timelines) for section in _one(one, f"{k}-"))


def _one(timeline: Timeline, prefix: str = "") -> tuple[Section, ...]:
    of_several = bool(prefix)
    probed = timeline.probed
    subtitle = f"{len(timeline.steps)} steps, {len(probed)} probed"
    tables = (_printed(timeline), _listed(timeline))
    first = Section(
        title=Verbatim(timeline.name) if of_several else "Entropy over training",
        key=f"{prefix}timeline",
        short=f"Run {int(prefix[:-1]) + 1}" if of_several else "Timeline",
        subtitle=subtitle,
        verdict=_verdict(timeline),
        sentences=tuple(_sentences(probed)),
        blocks=(Rows(_headlines(timeline), _unit(probed)), *_entropy_charts(timeline, probed), *tables),
        notes=tuple(alarm.note for alarm in timeline.alarms),
    )
    rest = (_sources(probed), _prompts(probed), _training(timeline.steps), _remarks(probed))
    return first, *(
        replace(section, key=f"{prefix}{section.key}", short="" if of_several else section.short)
        for section in rest
        if section.blocks or section.notes
    )


def _unit(probed: Steps) -> str:
    return probed[-1].entropy.unit if probed and probed[-1].entropy else "nats/token"


def _verdict(timeline: Timeline) -> Verdict:
    """The alarm that holds, else what there was."""
    holding = [alarm for alarm in timeline.alarms if alarm.holds]
    if holding:
        others = len(holding) - 1
        more = "" if not others else f"; {others} other alarm{'s' * (others > 1)} below"
        return Verdict("alarm", f"First given at {holding[0].note.text}, and again at the last step{more}.", "bad")
    if timeline.alarms:
        steps = ", ".join(str(alarm.first) for alarm in timeline.alarms)
        return Verdict("over", f"There were alarms, first given at step {steps}; none holds at the last step.", "look")
    return Verdict("no alarm", "Nothing in these steps warns of a collapse, an explosion or a broken step.", "ok")


def _sentences(probed: Steps) -> Iterable[str]:
    sums = cumulated(probed)
    if len(sums) < 2:
        return
    (_, total, error), first, last = sums[-1], probed[0].entropy, probed[-1].entropy
    assert first is not None
    assert last is not None
    measured = format_estimate(last.value - first.value, math.hypot(first.standard_error, last.standard_error))
    between = f"Between steps {probed[0].step} and {probed[-1].step}"
    yield f"{between} the predictions add up to {format_estimate(total, error)}; entropy went by {measured}."
    recent = [(r.momentum, r.predicted) for r in probed[-RECENT:] if r.momentum is not None and r.predicted is not None]
    changed = sum(predicted.value for _, predicted in recent)
    if recent and abs(changed) > 2 * math.hypot(*(predicted.standard_error for _, predicted in recent)):
        share = sum(momentum.value for momentum, _ in recent) / changed
        yield f"Momentum has {format_percent(share, 0)} of the last steps' predicted change."


def _headlines(timeline: Timeline) -> tuple[Row, ...]:
    rows, probed = [], timeline.probed
    if probed and probed[-1].entropy is not None:
        now = probed[-1]
        rows.append(Row("entropy H(θ)", written(probed[-1].entropy), f"before step {now.step}", headline=True))
        changes = [record.change for record in probed if record.change][-RECENT:]
        if changes:
            mean = sum(change.value for change in changes) / len(changes)
            error = math.hypot(*(change.standard_error for change in changes)) / len(changes)
            over = f"mean of the last {len(changes)} probed"
            rows.append(Row("change per step", format_estimate(mean, error), over, headline=True))
        if now.committed is not None:
            rows.append(Row("committed", written(now.committed), "by the moments alone", headline=True))
    for what in ("reward", "entropy"):
        values = [(record.step, value) for record in timeline.steps if (value := record.logged(what)) is not None]
        if values and (what == "reward" or not probed):
            (_, first), (step, last) = values[0], values[-1]
            note = f"logged, step {step}; {format_number(first)} at first"
            rows.append(Row(what, format_number(last), note, headline=True))
    return tuple(rows)


def _entropy_charts(timeline: Timeline, probed: Steps) -> list[LineChart]:
    """Entropy with its error, what the predictions add up to, and the trainer's own; and every step's change."""
    start = probed[0].entropy.value if probed and probed[0].entropy else 0.0
    sums = cumulated(probed)
    along = (
        tuple(Point(float(step), start + value, 1.96 * error) for step, value, error in sums) if len(sums) > 1 else ()
    )
    entropy = [
        Curve("logged", "the trainer's log, on the batch of each step", logged_points(timeline.steps, "entropy")),
        Curve("measured", "entropy with its 95% interval", points_of(probed, lambda r: r.entropy), "band"),
        Curve("cumulated", "the first plus all predicted changes since", along),
    ]
    changes = [
        Curve("predicted", "predicted δH₁", points_of(probed, lambda r: r.predicted), "band"),
        Curve("realized", "realized ΔH", points_of(probed, lambda r: r.realized), "points"),
    ]
    unit, shaded = _unit(probed), _shaded(timeline)
    caption = "across: optimizer steps" + ("; shaded: an alarm holds" if shaded else "")
    return [
        *chart_of("Entropy", entropy, unit, caption, shaded),
        *chart_of("Change of each probed step", changes, unit, caption, shaded, zero=True),
    ]


def _shaded(timeline: Timeline) -> tuple[float, float, str] | None:
    if not timeline.alarms:
        return None
    first, last = min(alarm.first for alarm in timeline.alarms), max(alarm.last for alarm in timeline.alarms)
    return first - 0.5, last + 0.5, "alarm"


def _share(record: StepRecord) -> float | None:
    """The share of momentum in the predicted change."""
    if record.momentum is None or record.predicted is None or not record.predicted.value:
        return None
    return record.momentum.value / record.predicted.value


def _printed(timeline: Timeline) -> Table:
    """The steps that a terminal has room for, evenly spaced."""
    shown = thinned(timeline.probed or timeline.steps, PRINTED)
    power = common_exponent(*(one.value for r in shown for one in (r.predicted, r.realized) if one))
    scale = "" if power is None else f" e{power}"
    columns = ("step", "entropy", f"δH₁{scale}", f"ΔH{scale}", "mom.", f"life{scale}", "reward", "len", "norm")
    return _without_empty(Table("Steps", columns, tuple(_printed_row(record, power or 0) for record in shown)))


def _printed_row(record: StepRecord, power: int) -> tuple[str, ...]:
    def short(estimate: Estimate | None) -> str:
        if estimate is None:
            return ""
        return f"{estimate.value / 10.0**power:.2f}±{estimate.standard_error / 10.0**power:.2f}"

    entropy, logged, share = record.entropy, record.logged("entropy"), _share(record)
    own = "" if logged is None else f"{logged:.4f}"
    return (
        str(record.step),
        own if entropy is None else f"{entropy.value:.4f}±{entropy.standard_error:.4f}",
        short(record.predicted),
        short(record.realized),
        "" if share is None else f"{share:.0%}",
        short(record.lifetime),
        *(_cell(record.number(what)) for what in ("reward", "length", "gradient_norm")),
    )  # fmt: skip


def _cell(value: float | None) -> str:
    return "" if value is None else format_number(value)


NUMBERS: tuple[Number, ...] = ("reward", "length", "kl", "gradient_norm", "clip_factor", "learning_rate", "ess")


def _listed(timeline: Timeline) -> Table:
    """All numbers of the steps, for the page."""
    shown = thinned(timeline.steps, LISTED)
    columns = ("step", *ESTIMATES, "logged entropy", *NUMBERS, "loss distance", "seconds")
    rows = tuple(
        (
            str(record.step),
            *("" if (one := getattr(record, name)) is None else written(one) for name in ESTIMATES),
            *(_cell(record.number(what)) for what in ("entropy", *NUMBERS)),
            _cell(record.loss_distance),
            _cell(record.seconds),
        )
        for record in shown
    )
    return _without_empty(Table("All numbers", tuple(name.replace("_", " ") for name in columns), rows, folded=True))


def _without_empty(table: Table) -> Table:
    """The columns in which there is something."""
    there = [k for k in range(len(table.columns)) if any(row[k] for row in table.rows)]
    columns, rows = tuple(table.columns[k] for k in there), tuple(tuple(row[k] for k in there) for row in table.rows)
    return replace(table, columns=columns, rows=rows)


def _sources(probed: Steps) -> Section:
    """Which part of the step does it, and what a batch does over its life."""
    parts = [
        Curve("gradient", "this batch's gradient", points_of(probed, lambda r: r.gradient), "band"),
        Curve("momentum", "momentum of earlier batches", points_of(probed, lambda r: r.momentum), "band"),
    ]
    lives = [
        Curve("life", "lifetime effect of each batch", points_of(probed, lambda r: r.lifetime), "band"),
        Curve("committed", "committed after the step", points_of(probed, lambda r: r.committed), "band"),
    ]
    caption = "across: optimizer steps; bands: 95% intervals"
    charts = (
        *chart_of("Gradient against momentum", parts, _unit(probed), caption, zero=True),
        *chart_of("Over a batch's life", lives, _unit(probed), caption, zero=True),
    )
    return Section("Where the change comes from", "sources", "Sources", blocks=charts, page_only=True)


def _training(records: Steps) -> Section:
    """What the trainer logs beside it."""
    wanted: tuple[tuple[str, Number, str], ...] = (
        ("Reward", "reward", ""),
        ("Response length", "length", "tokens"),
        ("Gradient norm before clipping", "gradient_norm", ""),
        ("Clip factor", "clip_factor", ""),
        ("Learning rate", "learning_rate", ""),
        ("Effective sample size after the step", "ess", "share of the responses"),
        ("KL to the reference", "kl", "nats"),
    )
    charts, constant = [], []
    for title, what, unit in wanted:
        points = logged_points(records, what)
        if len({point.y for point in points}) == 1:
            constant.append(Row(title, format_number(points[0].y), "throughout"))
        else:
            charts += chart_of(title, [Curve("logged", "", points)], unit, "across: optimizer steps")
    blocks = (*charts, *([Rows(tuple(constant))] if constant else []))
    return Section("Training beside it", "training", "Training", blocks=blocks, page_only=True)


def _prompts(probed: Steps) -> Section:
    """The prompts that moved entropy most, over time."""
    shares = [(record.step, share) for record in probed for share in record.prompts]
    section = Section("Which prompts did it", "prompts", "Prompts", page_only=True)
    if not shares:
        return section
    sums: dict[int, float] = {}
    names: dict[int, str] = {}
    for _, share in shares:
        sums[share.id] = sums.get(share.id, 0.0) + share.value
        names[share.id] = share.text or names.get(share.id, "")
    top = sorted(sums, key=lambda prompt: -abs(sums[prompt]))[:PROMPTS]
    first, last = shares[0][0], shares[-1][0]
    width = max(1, math.ceil((last - first + 1) / SPANS))
    spans = range(first, last + 1, width)
    heads = tuple(str(start) if width == 1 else f"{start}–{min(start + width - 1, last)}" for start in spans)

    def cells(prompt: int) -> tuple[float | None, ...]:
        of_prompt = [(step, share.value) for step, share in shares if share.id == prompt]
        inside = ([value for step, value in of_prompt if start <= step < start + width] for start in spans)
        return tuple(sum(values) if values else None for values in inside)

    rows = tuple((_name(prompt, names[prompt]), cells(prompt)) for prompt in top)
    title = f"What the {len(top)} strongest of {len(sums)} prompts added to δH₁, by steps"
    chart = HeatMap(title, ("prompt", *heads), rows, _unit(probed), tuple(sums[prompt] for prompt in top))
    return replace(section, blocks=(chart,))


def _name(prompt: int, text: str) -> str:
    if not text:
        return f"prompt {prompt}"
    return text if len(text) <= NAME else f"…{text[1 - NAME :]}"


def _remarks(probed: Steps) -> Section:
    """What was said of the steps, each kind once, of the last step that it was said of."""
    said: dict[str, list[tuple[int, Note]]] = {}
    for record in probed:
        for note in record.notes:
            said.setdefault(note.code, []).append((record.step, note))
    notes = []
    for steps in said.values():
        number, note = steps[-1]
        others = len({step for step, _ in steps}) - 1
        notes.append(note.about(f"step {number}" + (f" and {others} other{'s' * (others > 1)}" if others else "")))
    return Section("What was noted of the steps", "notes", "Notes", notes=tuple(notes), page_only=True)


def _beside(timelines: Sequence[Timeline]) -> Section:
    """Several runs beside each other."""
    rows = tuple(_beside_row(one) for one in timelines)
    table = Table("Runs", ("run", "steps", "probed", "entropy", "per step", "reward", "alarms"), rows)
    charts = []
    for title, pick in (("Entropy", _own_entropy), ("Reward", lambda one: logged_points(one.steps, "reward"))):
        looks: list[Look] = ["run0", "run1", "run2", "run3", "run4", "run5"]
        curves = [Curve(look, one.name, pick(one)) for look, one in zip(looks, timelines[:RUNS], strict=False)]
        charts += chart_of(title, curves, "nats/token" if title == "Entropy" else "", "across: optimizer steps")
    alarmed = sum(any(alarm.holds for alarm in one.alarms) for one in timelines)
    verdict = (
        Verdict("alarm", f"{alarmed} of {len(timelines)} runs have an alarm that holds.", "bad")
        if alarmed
        else (Verdict("no alarm", f"No alarm holds in any of the {len(timelines)} runs.", "ok"))
    )
    return Section("Entropy over training", "runs", "Runs", f"{len(timelines)} runs", verdict,
                   blocks=(*charts, table))  # fmt: skip


def _own_entropy(timeline: Timeline) -> tuple[Point, ...]:
    """As measured, else as logged."""
    probed = points_of(timeline.probed, lambda record: record.entropy)
    return tuple(Point(p.x, p.y) for p in probed) if len(probed) > 1 else logged_points(timeline.steps, "entropy")


def _beside_row(timeline: Timeline) -> tuple[str, ...]:
    values = {row.label: row.value for row in _headlines(timeline)}
    alarms = ", ".join(f"{alarm.note.code.replace('_', ' ')} ({alarm.first})" for alarm in timeline.alarms)
    entropy = values.get("entropy H(θ)", values.get("entropy", ""))
    return (Verbatim(timeline.name), str(len(timeline.steps)), str(len(timeline.probed)), entropy,
            values.get("change per step", ""), values.get("reward", ""), alarms or "none")  # fmt: skip
