"""How well attributions forecast real steps; the schema of ``validation.json``. Reading it needs no model, no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from entropy_probe.records import Kept, Record, SavedRecord

__all__ = ["LEAST_STEPS", "VALIDATION_FILE", "RankCorrelation", "SubsetStep", "Validation"]

SCHEMA_VERSION = 1
VALIDATION_FILE = "validation.json"
LEAST_STEPS = 4
"""Of a rank correlation with an interval."""


class RankCorrelation(Record):
    """Spearman's rank correlation with its 95% interval.

    Attributes:
        value: between -1 and 1.
        low: the interval's lower end.
        high: the interval's upper end.
    """

    value: float = Field(ge=-1, le=1)
    low: float = Field(ge=-1, le=1)
    high: float = Field(ge=-1, le=1)


class SubsetStep(Record):
    """One real step on a part of the update batch.

    Attributes:
        kept: ids of the prompts whose advantages were left as they are; those of the others were set to 0.
        contribution: sum of the kept prompts' contributions, in the validation's unit.
        covariance: sum of the kept prompts' covariance terms.
        realized: the entropy change measured after the step, in the validation's unit; null if it could not be.
        failure: why it could not be measured; null if it was.
    """

    kept: tuple[int, ...]
    contribution: float
    covariance: float
    realized: float | None
    failure: str | None = None


class Validation(SavedRecord):
    """Rank correlations, over random halves of the update batch, between what was forecast and what was measured.

    Attributes:
        unit: nats per token or nats per sequence.
        num_prompts: prompts of the update batch; half of them, rounded down, are kept each time.
        seed: of the random halves.
        contributions: of measured changes with the sums of the kept prompts' contributions; 1 is best. Null where
            all are equal, or with fewer than 4 measured steps.
        covariance: of measured changes with minus the sums of the kept prompts' covariance terms (Cui et al., 2025), by
            which covariance lowers entropy; 1 is best. Null likewise.
        steps: the single steps, on different halves.
        messages: what a careful reader should know.
    """

    kept: ClassVar = Kept(VALIDATION_FILE, "validation", "validate", "validate again")
    schema_version: Literal[1] = SCHEMA_VERSION
    unit: Literal["nats/token", "nats/sequence"]
    num_prompts: int
    seed: int
    contributions: RankCorrelation | None
    covariance: RankCorrelation | None
    steps: tuple[SubsetStep, ...] = Field(min_length=1, repr=False)
    messages: tuple[str, ...] = ()

    @property
    def num_measured(self) -> int:
        """Steps whose change was measured: the pairs behind each rank correlation."""
        return sum(step.realized is not None for step in self.steps)

    @property
    def undefined(self) -> str:
        """Why a rank correlation is null, where it is."""
        if self.num_measured < LEAST_STEPS:
            return f"fewer than {LEAST_STEPS} measured steps"
        return "all forecasts or changes are equal"
