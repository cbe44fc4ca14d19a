"""What the sections of a run hold, beyond what the console's and the page's tests read of them."""

from itertools import pairwise

import pytest

from entropy_probe.report.sections.base import BarChart
from entropy_probe.report.sections.run import step_section, story
from tests.report.results import make_cross_prompt, make_result


def charts(result) -> dict[str, BarChart]:
    return {block.figure: block for block in step_section(result).blocks if isinstance(block, BarChart)}


def test_each_bar_of_the_parts_begins_where_the_one_before_ends():
    result = make_result()
    bars = charts(result)["parts"].bars
    assert [bar.row.label for bar in bars] == [
        "gradient", "momentum", "weight decay", "predicted δH₁", "ΔH − δH₁", "realized ΔH",
    ]  # fmt: skip
    assert [bar.linked for bar in bars] == [False, True, True, False, True, False]
    for before, bar in pairwise(bars):
        assert bar.start == pytest.approx(before.end if bar.linked else 0.0)
    assert bars[2].end == pytest.approx(bars[3].value)
    assert bars[4].end == pytest.approx(bars[5].value)
    assert [bar.look for bar in bars] == ["bar", "bar", "bar", "total", "bar", "total"]


def test_every_change_is_a_point_of_one_chart():
    bars = charts(make_result(cross_prompt=make_cross_prompt()))["change"].bars
    assert [bar.row.label for bar in bars] == ["predicted δH₁", "one batch δH₁", "realized ΔH"]
    assert all(bar.look == "dot" and bar.start == 0.0 and bar.margin for bar in bars)
    assert charts(make_result(status="low_ess")).keys() == {"change", "parts"}
    assert charts(make_result(None, (0.0, 0.0), None)) == {}


def test_a_change_of_0_has_no_story():
    assert story(make_result((0.0, 0.0))) == ""
    assert story(make_result()).endswith("0.2% of what it is; 64% of that comes from momentum.")
