"""How well attributions, and simpler forecasts, rank the changes measured after real steps."""

from __future__ import annotations

from collections.abc import Collection

from entropy_probe.report.sections.base import Section, Table, sentence_case
from entropy_probe.results.note import Note, distinct
from entropy_probe.results.validation import RankCorrelation, Validation

FORECASTS = {
    "covariance": "covariance (Cui)",
    "logit_step": "logit step (Wang)",
    "natural_step": "natural step",
    "steer": "STEER, as released",
    "repo": "REPO",
    "surprisal": "A x surprisal",
    "advantages": "sum of advantages",
}
OVER_TOKENS = (
    "Signed so that larger forecasts a larger change. Tokens: with the contributions of single tokens, which no step "
    "measures."
)


def validation_section(validation: Validation, said: Collection[Note] = ()) -> Section:
    """Rank correlations of forecasts with real steps on halves of the update prompts.

    Notes that were ``said`` elsewhere, such as those of the result, are not repeated.
    """
    kept, count = len(validation.steps[0].kept), validation.num_measured
    rows = tuple(
        (FORECASTS.get(name, name), *_cells(one), _tokens(validation, name))
        for name, one in validation.correlations.items()
    )
    undefined = None in validation.correlations.values()
    return Section(
        title=f"{count} real steps on {kept} of {validation.num_prompts} prompts: are they ranked as forecast?",
        key="validation",
        short="Validation",
        sentences=(
            _measured_on(validation),
            *([f"Undefined where {validation.undefined}."] if undefined else []),
            *([OVER_TOKENS] if validation.over_tokens else []),
        ),
        blocks=(
            Table("Rank correlation with the measured changes", ("forecast", "rank correlation", "95% interval",
                                                                 "without noise", "tokens"), rows),
        ),
        notes=distinct(validation.notes, said),
    )  # fmt: skip


def _cells(correlation: RankCorrelation | None) -> tuple[str, str, str]:
    if correlation is None:
        return "undefined", "", ""
    corrected = "unknown" if correlation.corrected is None else f"{correlation.corrected:.2f}"
    return f"{correlation.value:.3f}", f"{correlation.low:.3f} to {correlation.high:.3f}", corrected


def _tokens(validation: Validation, name: str) -> str:
    correlation = validation.over_tokens.get(name)
    return "" if correlation is None else f"{correlation:.2f}"


def _measured_on(validation: Validation) -> str:
    """Which rollouts the changes were measured on, and how reliably."""
    number = f"{validation.num_sequences:,} evaluation sequences"
    if validation.measured_on == "halves":
        said = f"changes are measured on one half of {number} and forecast from the other, both ways"
    else:
        said = f"changes are measured on {number} that the contributions do not come from"
    known = validation.reliability
    reliability = "" if known is None else f"; reliability of the measured changes: {known:.3f}"
    return sentence_case(f"{said}{reliability}.")
