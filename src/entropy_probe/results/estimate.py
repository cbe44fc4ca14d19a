"""A number with its sampling error."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from entropy_probe.results.record import Record
from entropy_probe.results.student import critical_value

Unit = Literal["nats/token", "nats/sequence"]


class Estimate(Record):
    """A number with its sampling error.

    Attributes:
        value: the estimate, in ``unit``.
        standard_error: one standard error, in ``unit``.
        num_clusters: independent clusters behind the standard error (sequences, or prompts).
        unit: nats per token or nats per sequence.
        status: ``ok``, or ``below_noise_floor`` if rounding alone could have made the number.
        degrees_of_freedom: of the standard error; one fewer than ``num_clusters`` unless these
            are skew or two errors are combined; null says so too.
    """

    value: float
    standard_error: float = Field(ge=0)
    num_clusters: int
    unit: Unit
    status: Literal["ok", "below_noise_floor"] = "ok"
    degrees_of_freedom: float | None = Field(default=None, gt=0)

    @property
    def margin(self) -> float:
        """How far the 95% interval reaches to either side, by Student's t, in ``unit``."""
        degrees = self.num_clusters - 1 if self.degrees_of_freedom is None else self.degrees_of_freedom
        return critical_value(degrees) * self.standard_error

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval, in ``unit``."""
        return self.value - self.margin, self.value + self.margin

    @property
    def distinguishable(self) -> bool:
        """Whether the 95% interval excludes 0."""
        return abs(self.value) > self.margin
