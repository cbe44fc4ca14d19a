"""A validation on the terminal; that of the page is in ``tests/report/test_page.py``."""

from entropy_probe.report.sections.validation import validation_section
from entropy_probe.results.validation import RankCorrelation, SubsetStep, Validation
from tests.notes import noted
from tests.report.results import shown


def show(*realized, said=(), notes=(), found=None, covariance=None, measured_on="halves", over_tokens=None) -> str:
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
        over_tokens=over_tokens or {},
        steps=steps,
        notes=notes,
    )
    return shown([validation_section(validation, said)])


def test_validation_with_its_interval_and_notes():
    found = RankCorrelation(value=0.981, low=0.95, high=0.993, ceiling=0.99)
    text = show(1.0, 2.0, 3.0, 4.0, None, notes=noted("new", "known"), said=noted("known"), found=found)
    assert "4 real steps on 2 of 4 prompts" in text
    assert "contributions    0.981            0.950 to 0.993 0.99" in text
    assert "on one half of 1,024 evaluation sequences and forecast from the other" in " ".join(text.split())
    assert "reliability of the measured changes: 0.810" in " ".join(text.split())
    others = show(1.0, measured_on="others")
    assert "measured on 1,024 evaluation sequences that the contributions do not come from" in " ".join(others.split())
    lost = RankCorrelation(value=0.1, low=-0.95, high=0.993, ceiling=None)
    assert "unknown" in show(*range(4), found=lost)
    assert "all forecasts or changes are equal" in text
    assert "note: new" in text
    assert "Look again." in text
    assert "known" not in text
    assert "fewer than 4 steps were measured" in show(1.0, 2.0, 3.0, None)


def test_published_scores_over_prompts_and_tokens():
    found = RankCorrelation(value=0.981, low=0.95, high=0.993, ceiling=0.99)
    text = show(*range(4), found=found, covariance=found, over_tokens={"covariance": -0.217, "surprisal": None})
    assert "covariance (Cui) 0.981            0.950 to 0.993 0.99          -0.22" in text
    assert "which no step measures" in text
    assert "which no step measures" not in show(*range(4), found=found)


def test_titles_are_lines_of_their_own_over_narrow_tables():
    found = RankCorrelation(value=0.981, low=0.95, high=0.993, ceiling=0.99)
    text = show(*range(40), found=found, covariance=found)
    assert " 40 real steps on 2 of 4 prompts: are they ranked as forecast?\n" in text
