"""What the sections of a run hold, beyond what the console's and the page's tests read of them."""

from itertools import pairwise

import pytest

from entropy_probe.report.sections.base import BarChart, Rows
from entropy_probe.report.sections.diagnostics import diagnostics_section
from entropy_probe.report.sections.run import run_sections, step_section, story
from entropy_probe.results.probe import Estimate, GradientAgreement, Predicted, ProbeResult
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


def rows(section) -> dict[str, tuple[str, str]]:
    of_section = (block.rows for block in section.blocks if isinstance(block, Rows))
    return {row.label: (str(row.value), row.note) for rows in of_section for row in rows}


def test_two_questions_of_an_error():
    """About this step, and about other batches: the gradient part has both errors, the momentum one."""
    result = make_result()
    gradient = Predicted(**result.components["gradient"].model_dump(), se_evaluation=1e-5, se_update=2.8e-5)
    result = result.model_copy(update={"components": result.components | {"gradient": gradient}})
    section = step_section(ProbeResult.model_validate_json(result.model_dump_json()))
    assert rows(section)["gradient"][1] == "this step ± 1.0e-5, batch ± 2.8e-5"
    assert rows(section)["momentum"][1] == ""
    assert any("known to the error called this step" in str(sentence) for sentence in section.sentences)
    step = result.predicted.of_this_step
    assert (step.value, step.standard_error) == (result.predicted.value, 6e-5)


def test_a_gradient_from_outside_has_no_error_from_an_update_batch():
    result = make_result()
    predicted = result.predicted.model_copy(update={"se_update": None, "se_update_method": None})
    alone = {"num_update_sequences": None, "num_update_prompts": None}
    given = result.model_copy(
        update={"predicted": predicted, "diagnostics": result.diagnostics.model_copy(update=alone)}
    )
    assert "batch ± " in rows(step_section(result))["predicted δH₁"][1]
    assert rows(step_section(given))["predicted δH₁"][1] == ""
    assert not any("error called this step" in str(sentence) for sentence in step_section(given).sentences)
    assert "gradient from outside" in str(rows(diagnostics_section(given))["update batch"][0])
    assert "gradients" not in rows(diagnostics_section(given))
    for distance, cosine, state in ((0.3, 0.95, "look"), (0.01, 1.0, "ok"), (0.5, None, "look")):
        agreement = {"gradient_agreement": GradientAgreement(relative_distance=distance, cosine=cosine)}
        beside = given.model_copy(update={"diagnostics": result.diagnostics.model_copy(update=agreement)})
        (row,) = (
            row
            for block in diagnostics_section(beside).blocks
            if isinstance(block, Rows)
            for row in block.rows
            if row.label == "gradients"
        )
        assert row.state == state
        assert (cosine is None) == (row.note == "")
    assert run_sections(given)


def test_rounding_is_a_part_like_the_others():
    result = make_result()
    size = result.components["gradient"].model_dump() | {"value": -2e-3}
    parts = {**result.components, "rounding": Estimate(**size)}
    rounded = result.model_copy(update={"components": parts})
    assert [bar.row.label for bar in charts(rounded)["parts"].bars][3] == "rounding"
    assert story(rounded).endswith("of that comes from rounding.")
