"""What a sweep over learning rates returns and what ``sweep.json`` holds. Reading it needs no model and no torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from entropy_probe.results.note import Note
from entropy_probe.results.probe import Estimate, Predicted, ProbeResult, Realized
from entropy_probe.results.record import Kept, Record, SavedRecord, read_record, write_atomically

SCHEMA_VERSION = 3
SWEEP_FILE = "sweep.json"
REMEDY = "sweep again with --overwrite"


class Fitted(Record):
    """A number with its error from the evaluation batch, the update batch held fixed.

    Attributes:
        value: the estimate.
        standard_error: one standard error, from the evaluation clusters' influences and, for what is fitted, rounding.
    """

    value: float
    standard_error: float = Field(ge=0)


class SweepPoint(Record):
    """One learning rate.

    Attributes:
        learning_rate: the rate of every parameter group.
        predicted: the first-order change at this rate.
        realized: the change measured after the step at this rate, or why it was refused; null if scoring failed.
        difference: realized minus predicted, with the error of the paired difference.
        failure: why scoring failed after the step; null if it did not.
        influence: of each evaluation cluster on ``realized``, in its unit.
        difference_influence: of each evaluation cluster on ``difference``.
    """

    learning_rate: float = Field(gt=0)
    predicted: Predicted
    realized: Realized | None = None
    difference: Estimate | None = None
    failure: str | None = None
    influence: tuple[float, ...] | None = Field(default=None, repr=False)
    difference_influence: tuple[float, ...] | None = Field(default=None, repr=False)

    @property
    def estimate(self) -> Estimate | None:
        """The measured change with its error; ``None`` if there is no number."""
        return self.realized and self.realized.estimate

    @property
    def status(self) -> str:
        """``ok``, or why the measurement should not be used."""
        return "failed" if self.realized is None else self.realized.status

    def save(self, path: Path) -> None:
        """Write the point, influences included; the file appears whole or not at all."""
        write_atomically(path, (self.model_dump_json() + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> SweepPoint:
        """Read a saved point.

        Raises:
            ValueError: if the file is not one.
        """
        return read_record(cls, path, "a point of a sweep", REMEDY)


class QuadraticFit(Record):
    """``linear * lr + quadratic * lr^2``, fitted to the measured changes by least squares.

    Attributes:
        linear: nats (per token or sequence) per unit of learning rate.
        quadratic: nats per squared unit of learning rate.
        r_squared: one minus the residual sum of squares over the sum of squares.
        learning_rates: the rates that entered: measured with status ``ok``, up to a third of the linear range.
    """

    linear: Fitted
    quadratic: Fitted
    r_squared: float
    learning_rates: tuple[float, ...]


class PowerLawFit(Record):
    """A straight line through ``log |change|`` against ``log lr``.

    Attributes:
        slope: the exponent, 1 where the change is linear.
        r_squared: share of the variance explained.
        learning_rates: the rates that entered: measured with status ``ok``, within the linear range.
    """

    slope: Fitted
    r_squared: float
    learning_rates: tuple[float, ...]


class LinearRange(Record):
    """Up to where the measured change stays within 10% of the prediction (or of its error, where larger).

    Attributes:
        learning_rate: the largest rate of the sweep that complies together with all smaller ones; null if none.
        at_least: whether that is the last rate of the sweep, so that the range may go further.
    """

    learning_rate: float | None
    at_least: bool


class Curvature(Record):
    """The second derivative of entropy with respect to the learning rate, along the step.

    Attributes:
        from_fit: twice the quadratic coefficient of the fit; null without a fit.
        direct: from second derivatives of every score; null unless asked for and supported by the model.
        direct_slope: the first derivative by the same route, to compare with the prediction.
    """

    from_fit: Fitted | None = None
    direct: Fitted | None = None
    direct_slope: Fitted | None = None


class Sweep(SavedRecord):
    """The outcome of :meth:`entropy_probe.EntropyProbe.sweep`, saved in ``sweep.json``.

    Attributes:
        horizon: how many tokens after a changed one count in every change; null for the whole response.
        prediction: the first-order change at the largest rate of the sweep, without timing and memory.
        own_learning_rates: the optimizer's rate of each parameter group, which the sweep replaced.
        points: one for each rate, by increasing rate.
        linear_range: up to which rate the first-order change describes the measured one.
        fit: the quadratic through the points up to a third of the linear range; null with fewer than three.
        power_law: the log-log slope over the linear range; null likewise, or if changes differ in sign.
        curvature: the second derivative.
        learning_rate_star: ``-linear / quadratic`` of the fit, where the two parts cancel; null unless positive.
        notes: everything about the sweep that a careful reader should know.
    """

    kept: ClassVar = Kept(SWEEP_FILE, "sweep", "sweep", REMEDY)
    # influences are in the files of the points
    left_out: ClassVar = {"points": {"__all__": {"influence", "difference_influence"}}}
    schema_version: Literal[3] = SCHEMA_VERSION
    horizon: int | None = Field(default=None, ge=0)
    prediction: ProbeResult
    own_learning_rates: tuple[float, ...]
    points: tuple[SweepPoint, ...]
    linear_range: LinearRange
    fit: QuadraticFit | None = None
    power_law: PowerLawFit | None = None
    curvature: Curvature = Curvature()
    learning_rate_star: Fitted | None = None
    notes: tuple[Note, ...] = ()

    @property
    def unit(self) -> str:
        """The unit of all changes."""
        return self.prediction.entropy.unit
