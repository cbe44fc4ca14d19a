"""A run over its steps: what is added up, what is shown, and how much of it."""

import math

import pytest

from entropy_probe.report import page, timeline_sections
from entropy_probe.report.sections.base import HeatMap, LineChart, Rows, Table
from entropy_probe.report.sections.steps import cumulated
from entropy_probe.results.live import PromptShare, StepRecord, Timeline
from tests.report.results import shown
from tests.report.timelines import estimate, make_record, make_timeline


def test_predictions_add_up_over_the_steps():
    """The sum until a step has the steps before it: entropy is that before the step."""
    records = [make_record(step, 0.2, -0.001 * step) for step in (1, 2, 3, 4)]
    assert [step for step, _, _ in cumulated(records)] == [1, 2, 3, 4]
    assert [value for _, value, _ in cumulated(records)] == pytest.approx([0.0, -0.001, -0.003, -0.006])
    assert [error for _, _, error in cumulated(records)] == pytest.approx(
        [0.0, *(math.sqrt(k) * 2e-4 for k in (1, 2, 3))]
    )


def test_between_probed_steps_the_prediction_is_interpolated():
    every = [make_record(step, 0.2, -0.001 * step) for step in range(1, 12)]
    assert cumulated(every[::5])[-1][1] == pytest.approx(cumulated(every)[-1][1])


def test_a_step_without_a_prediction_ends_the_sum():
    records = [make_record(1, 0.2, -0.001), make_record(2, 0.2, -0.001, predicted=None), make_record(3, 0.2, -0.001)]
    assert len(cumulated(records)) == 1


def test_the_console_has_as_many_steps_as_it_has_room_for():
    text = shown(timeline_sections([make_timeline(200, -0.0005)])[:1])
    lines = [line for line in text.splitlines() if line.strip() and line.split()[0].isdecimal()]
    assert len(lines) == 24
    assert lines[0].split()[0] == "1"
    assert lines[-1].split()[0] == "200"
    assert max(map(len, text.splitlines())) <= 80
    assert "No alarm." in text


def test_an_alarm_is_at_the_head_and_marked_in_the_charts():
    timeline = make_timeline(20, -0.012)
    lead = timeline_sections([timeline])[0]
    assert lead.verdict is not None
    assert lead.verdict.state == "bad"
    first = timeline.alarms[0].first
    assert f"step {first}" in lead.verdict.sentence
    charts = [block for block in lead.blocks if isinstance(block, LineChart)]
    assert [chart.shaded and chart.shaded[0] for chart in charts] == [first - 0.5] * 2
    over = timeline.model_copy(
        update={"alarms": tuple(alarm.model_copy(update={"holds": False}) for alarm in timeline.alarms)}
    )
    (verdict,) = [timeline_sections([over])[0].verdict]
    assert verdict is not None
    assert verdict.state == "look"


def test_charts_have_what_was_measured_and_constants_are_no_charts():
    sections = {section.key: section for section in timeline_sections([make_timeline(every=5)])}
    entropy = next(block for block in sections["timeline"].blocks if isinstance(block, LineChart))
    assert [(curve.look, len(curve.points)) for curve in entropy.curves] == [
        ("logged", 40),
        ("measured", 8),
        ("cumulated", 8),
    ]
    training = sections["training"].blocks
    assert [chart.title for chart in training if isinstance(chart, LineChart)] == [
        "Reward",
        "Response length",
        "Gradient norm before clipping",
    ]
    (constant,) = [block for block in training if isinstance(block, Rows)]
    assert [row.label for row in constant.rows] == [
        "Clip factor",
        "Learning rate",
        "Effective sample size after the step",
    ]


def test_prompts_are_summed_over_spans_of_steps():
    records = tuple(
        StepRecord(
            step=step,
            entropy=estimate(0.2),
            prompts=(PromptShare(id=step % 2, value=-0.001, text="<b>4+7="), PromptShare(id=7, value=1e-5)),
        )
        for step in range(1, 41)
    )
    sections = {section.key: section for section in timeline_sections([Timeline(name="a", steps=records)])}
    (chart,) = [block for block in sections["prompts"].blocks if isinstance(block, HeatMap)]
    assert chart.columns[1:3] == ("1–4", "5–8")
    assert [name for name, _ in chart.rows] == ["<b>4+7=", "<b>4+7=", "prompt 7"]
    assert chart.rows[0][1] == pytest.approx((-0.002,) * 10)
    assert chart.totals == pytest.approx((-0.02, -0.02, 4e-4))
    assert "<b>4+7=" not in page(tuple(sections.values()))


def test_all_numbers_are_on_the_page():
    lead = timeline_sections([make_timeline(3)])[0]
    listed = next(block for block in lead.blocks if isinstance(block, Table) and block.folded)
    assert {"weight decay", "committed", "clip factor", "reward", "ess"} <= set(listed.columns)
    assert "kl" not in listed.columns, "nothing was logged of it"
    assert len(listed.rows) == 3
