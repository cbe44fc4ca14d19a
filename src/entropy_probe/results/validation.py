"""How well attributions forecast real steps; the schema of ``validation.json``. Reading it needs no model, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from entropy_probe.results.note import Note
from entropy_probe.results.record import Kept, Record, SavedRecord, read_record, write_atomically

SCHEMA_VERSION = 3
VALIDATION_FILE = "validation.json"
MIN_STEPS = 4
"""Of a rank correlation with an interval."""


class RankCorrelation(Record):
    """Spearman's rank correlation of a forecast with measured changes, and its 95% interval.

    Attributes:
        value: between -1 and 1.
        low: the interval's lower end.
        high: the interval's upper end.
        ceiling: what a perfect forecast would reach, with the noise of forecast and measurement as it is: the root of
            the product of their reliabilities. Null where two halves do not agree at all.
    """

    value: float = Field(ge=-1, le=1)
    low: float = Field(ge=-1, le=1)
    high: float = Field(ge=-1, le=1)
    ceiling: float | None = Field(gt=0, le=1)

    @property
    def corrected(self) -> float | None:
        """The correlation without that noise, ``value / ceiling`` (corrected for attenuation); may come out above 1."""
        return None if self.ceiling is None else self.value / self.ceiling


class MeasuredStep(Record):
    """The change after a real step on a part of the update batch, as an interrupted validation keeps it.

    Attributes:
        kept: places of the prompts it was taken on, among the distinct ones by increasing id.
        change: of the entropy on the whole evaluation batch, in the validation's unit; null if it was not measured.
        by_half: the same on each half of the evaluation batch; null with ``change``.
        influences: of each cluster of a half on its change; null with ``change``.
        failure: why it could not be measured; null if it was.
    """

    kept: tuple[int, ...]
    change: float | None = None
    by_half: tuple[float, float] | None = None
    influences: tuple[tuple[float, ...], tuple[float, ...]] | None = Field(default=None, repr=False)
    failure: str | None = None

    def save(self, path: Path) -> None:
        """Write the step; the file appears whole or not at all."""
        write_atomically(path, (self.model_dump_json() + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> MeasuredStep:
        """Read a saved step.

        Raises:
            ValueError: if the file is not one.
        """
        return read_record(cls, path, "a step of a validation", "delete it, and it is taken again")


class SubsetStep(Record):
    """One real step on a part of the update batch.

    Attributes:
        kept: ids of the prompts whose advantages were left as they are; those of the others were set to 0.
        forecasts: by name; see :attr:`Validation.correlations`. Contributions are in the validation's unit.
        contributions_by_half: the sums of contributions by each half of the evaluation batch alone.
        realized: the entropy change measured after the step, in the validation's unit; null if it could not be.
        realized_by_half: the same on each half of the evaluation batch alone; null with ``realized``.
        failure: why it could not be measured; null if it was.
    """

    kept: tuple[int, ...]
    forecasts: dict[str, float]
    contributions_by_half: tuple[float, float]
    realized: float | None
    realized_by_half: tuple[float, float] | None
    failure: str | None = None


class Validation(SavedRecord):
    """Rank correlations, over random halves of the update batch, between what was forecast and what was measured.

    Forecasts are never held against changes measured on the rollouts that they come from.

    Attributes:
        unit: nats per token or nats per sequence.
        num_prompts: prompts of the update batch; half of them, rounded down, are kept each time.
        num_sequences: sequences of the evaluation batch that changes were measured on.
        seed: of the random halves.
        measured_on: ``halves``: the evaluation batch is that of the contributions, so contributions by one half of it
            are held against changes measured on the other, both ways, and the two correlations averaged; ``others``: it
            is another, and contributions are held against changes measured on all of it.
        reliability: of the measured changes: the rank correlation of those on one half with those on the other, for
            ``others`` that of the whole batch (Spearman-Brown). Null where all are equal, or with fewer than 4 measured
            steps.
        correlations: with measured changes, of the kept prompts' sums of: ``contributions``; published scores of
            tokens, which need no gradient (``covariance``, ``logit_step``, ``natural_step``, ``steer``, ``repo``,
            ``surprisal``; :mod:`entropy_probe.estimators.published`); and two controls, ``advantages``, which knows
            nothing of the policy, and ``random``, a number drawn for each prompt. 1 is best. Null where all forecasts
            are equal, or with fewer than 4 measured steps.
        over_tokens: rank correlations, over the response tokens of the update batch, of published scores and of the
            advantages with contributions. These are no measurement: a token's own step is too small to take. Null where
            all are equal.
        steps: the single steps, on different halves.
        notes: what a careful reader should know.
    """

    kept: ClassVar = Kept(VALIDATION_FILE, "validation", "validate", "validate again")
    schema_version: Literal[3] = SCHEMA_VERSION
    unit: Literal["nats/token", "nats/sequence"]
    num_prompts: int
    num_sequences: int
    seed: int
    measured_on: Literal["halves", "others"]
    reliability: float | None
    correlations: dict[str, RankCorrelation | None]
    over_tokens: dict[str, float | None] = Field(default_factory=dict)
    steps: tuple[SubsetStep, ...] = Field(min_length=1, repr=False)
    notes: tuple[Note, ...] = ()

    @property
    def num_measured(self) -> int:
        """Steps whose change was measured: the pairs behind each rank correlation."""
        return sum(step.realized is not None for step in self.steps)

    @property
    def undefined(self) -> str:
        """Why a rank correlation is null, where it is."""
        if self.num_measured < MIN_STEPS:
            return f"fewer than {MIN_STEPS} steps were measured"
        return "all forecasts or changes are equal"
