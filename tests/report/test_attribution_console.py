"""An attribution on the terminal."""

import numpy as np
from rich.console import Console

from entropy_probe.report import print_result, print_validation
from entropy_probe.report.tables import Tables
from entropy_probe.results.attribution import AttributionSummary
from entropy_probe.results.validation import RankCorrelation, SubsetStep, Validation
from tests.notes import noted
from tests.report.results import make_result

SUMMARY = AttributionSummary(
    unit="nats/token",
    method="forward-mode",
    num_tokens=1535,
    gradient=-3.34e-4,
    momentum=-2.2e-3,
    weight_decay=0.0,
    positive_advantages=-1.22e-4,
    negative_advantages=-2.12e-4,
    rank_correlation_with_covariance=-0.36,
    seconds=0.5,
)


def show(tables=None, **changes) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        summary = SUMMARY.model_copy(update=changes)
        print_result(make_result().model_copy(update={"attribution": summary}), console, tables=tables)
    return captured.get()


def test_signs_and_covariance_without_a_directory():
    text = show()
    assert "(1535 tokens)" in text
    assert "-1.22e-4" in text
    assert "-2.12e-4" in text
    assert "-0.36" in text
    assert "lowering" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "undefined" in show(rank_correlation_with_covariance=None)
    assert "reverse-mode (no rule for [x])" in show(method="reverse-mode (no rule for [x])")


def test_top_prompts_from_the_table():
    contributions = [-2e-4, 1e-5, -1e-4, 3e-5, -6e-5, -1.4e-5, 0.0]
    columns = {
        "prompt_id": list(range(7)),
        "prompt": ["1+1=", None, "[bold]\x1b[31m", "x" * 60 + "end", "d", "e", "f"],
        "num_responses": [4] * 7,
        "num_tokens": [9] * 7,
        "mean_reward": np.array([0.5, *[np.nan] * 6]),
        "contribution": np.array(contributions),
        "standard_error": np.array([1e-5, *[np.nan] * 6]),
        "covariance": [0.0] * 7,
    }
    lines = show(Tables({}, columns, {})).splitlines()
    first = next(i for i, line in enumerate(lines) if "lowering entropy most" in line)
    assert "1+1=" in lines[first + 1]
    assert "-2.00e-4 ± 0.10e-4" in lines[first + 1]
    assert "reward 0.50" in lines[first + 1]
    assert r"[bold]\x1b[31m" in lines[first + 2]
    assert "d " in lines[first + 3]
    assert "raising entropy most" in lines[first + 4]
    assert "…" in lines[first + 5]
    assert "end" in lines[first + 5]
    assert "prompt 1" in lines[first + 6]
    assert all(len(line) <= 80 for line in lines)


def show_validation(*realized, said=(), notes=(), found=None, covariance=None, measured_on="halves") -> str:
    steps = [
        SubsetStep(
            kept=(0, 1),
            forecasts={},
            contributions_by_half=(0.0, 0.0),
            realized=change,
            realized_by_half=None if change is None else (change, change),
        )
        for change in realized
    ]
    validation = Validation(
        unit="nats/token",
        num_prompts=4,
        num_sequences=1024,
        seed=0,
        measured_on=measured_on,
        reliability=0.81,
        correlations={"contributions": found, "covariance": covariance},
        steps=steps,
        notes=notes,
    )
    console = Console(width=80)
    with console.capture() as captured:
        print_validation(validation, console, said)
    return captured.get()


def test_validation_with_its_interval_and_notes():
    found = RankCorrelation(value=0.981, low=0.95, high=0.993, ceiling=0.99)
    shown = show_validation(1.0, 2.0, 3.0, 4.0, None, notes=noted("new", "known"), said=noted("known"), found=found)
    assert "4 real steps on 2 of 4 prompts" in shown
    assert "0.981             0.950 to 0.993  0.99" in shown
    assert "on one half of 1,024 evaluation sequences and forecast from the other" in " ".join(shown.split())
    assert "reliability of the measured changes: 0.810" in " ".join(shown.split())
    others = show_validation(1.0, measured_on="others")
    assert "measured on 1,024 evaluation sequences that the contributions do not come from" in " ".join(others.split())
    lost = RankCorrelation(value=0.1, low=-0.95, high=0.993, ceiling=None)
    assert "unknown" in show_validation(*range(4), found=lost)
    assert "all forecasts or changes are equal" in shown
    assert "note: new" in shown
    assert "Look again." in shown
    assert "known" not in shown
    assert "fewer than 4 steps were measured" in show_validation(1.0, 2.0, 3.0, None)


def test_titles_are_lines_of_their_own_over_narrow_tables():
    found = RankCorrelation(value=0.981, low=0.95, high=0.993, ceiling=0.99)
    shown = show_validation(*range(40), found=found, covariance=found)
    assert " 40 real steps on 2 of 4 prompts: are they ranked as forecast?\n" in shown
    assert " Where the gradient part comes from (1535 tokens)\n" in show()
