"""The change of the entropy by a step: predicted, realized, by two batches together, and within horizons."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from entropy_probe.results.estimate import Estimate, Unit
from entropy_probe.results.record import Record


class Predicted(Estimate):
    """The first-order change; ``standard_error`` combines the two parts: in quadrature, or over the same prompts.

    Attributes:
        se_evaluation: the error from the evaluation rollouts, with the update held fixed: that of this very step.
        se_update: the error from the update rollouts: that of another batch of this kind; null for a gradient from
            outside, whose error is not known.
        se_update_method: ``linear``: from each prompt's part of the gradient, with the step's denominators, clipping
            and normalisation held fixed; ``jackknife``: from steps without a block of prompts; ``pairs``: as
            ``linear``, where the batch of the step is the evaluation batch, so both errors are of the same prompts;
            null with ``se_update``.
    """

    se_evaluation: float = Field(ge=0)
    se_update: float | None = Field(ge=0)
    se_update_method: Literal["linear", "jackknife", "pairs"] | None = "linear"

    @property
    def of_this_step(self) -> Estimate:
        """The same number as what this very step does, with no error from the choice of the update batch."""
        return Estimate(
            value=self.value, standard_error=self.se_evaluation, num_clusters=self.num_clusters, unit=self.unit
        )


class Realized(Record):
    """The change measured after the step, or why it could not be.

    Attributes:
        value: the estimate, in ``unit``; null when it was refused.
        standard_error: one standard error, in ``unit``; null with ``value``.
        num_clusters: independent clusters behind the standard error.
        degrees_of_freedom: as in :class:`~entropy_probe.results.estimate.Estimate`.
        unit: nats per token or nats per sequence.
        status: ``ok``; ``below_noise_floor``: rounding alone could have made the number; ``low_ess`` or
            ``high_pareto_k``: refused, since the step moves the policy too far for these rollouts.
        estimator: which path produced the number: ``per_decision``, ``snis`` with weights as they are, ``clip`` and
            ``psis`` with weights capped or Pareto-smoothed, ``resampled`` from fresh responses after the step.
        batch: the rollouts it was measured on; those of the step itself share their noise with it (``update``), unless
            their first-order influence on themselves is taken out (``own``).
        ess: effective sample size of the sequence weights, between 1 and the number of sequences.
        ess_fraction: ``ess`` divided by the number of sequences.
        max_weight: the largest weight divided by the mean weight; 1 when the step changes nothing.
        pareto_k: shape of the tail of the weights; null when there are too few or they are equal.
        pareto_k_threshold: what ``pareto_k`` may be at most for this number of sequences.
        noise_floor: two standard deviations of what rounding does to ``value``; null when not measured.
        step_rounding: length of what the parameters' precision adds to the step as predicted, relative to the step's.
    """

    value: float | None
    standard_error: float | None = Field(ge=0)
    num_clusters: int
    unit: Unit
    status: Literal["ok", "below_noise_floor", "low_ess", "high_pareto_k"]
    estimator: Literal["per_decision", "snis", "clip", "psis", "resampled"]
    batch: Literal["evaluation", "update", "own"] = "evaluation"
    ess: float
    ess_fraction: float
    max_weight: float
    pareto_k: float | None
    pareto_k_threshold: float
    noise_floor: float | None
    step_rounding: float
    degrees_of_freedom: float | None = Field(default=None, gt=0)

    @property
    def estimate(self) -> Estimate | None:
        """The number with its error; ``None`` when it was refused."""
        if self.value is None or self.standard_error is None:
            return None
        status = "below_noise_floor" if self.status == "below_noise_floor" else "ok"
        return Estimate(
            value=self.value,
            standard_error=self.standard_error,
            num_clusters=self.num_clusters,
            unit=self.unit,
            status=status,
            degrees_of_freedom=self.degrees_of_freedom,
        )


class Pooled(Record):
    """Evaluation rollouts and the batch of the step, each of which says what this step does, and both together.

    Weights are inverse to the variances given this step, given which the two are independent.

    Attributes:
        own: the first-order change by the batch of the step, as ``one_batch`` has it.
        predicted: by both; ``se_evaluation`` is the error given this step, ``standard_error`` that over batches.
        weight: of the evaluation rollouts.
        z: ``own`` minus the evaluation rollouts' prediction, over the error of that difference given this step.
        own_realized: the realized change by the batch of the step; null where it was not measured.
        realized: by both, with the same weights and the error given this step; null unless both were measured.
    """

    own: Predicted
    predicted: Predicted
    weight: float = Field(ge=0, le=1)
    z: float
    own_realized: Realized | None = None
    realized: Estimate | None = None


class Coasted(Record):
    """What momentum alone does after this step: measured after steps with zero gradients, on copies.

    Attributes:
        steps: how many were taken, until they move nothing more.
        change: by these steps, on the same rollouts; weight decay is off. Its weights are those of all steps together,
            this one included.
        difference: ``change`` minus ``committed``, with the standard error of the paired difference; null where one of
            the two is.
        weight_decay: what weight decay adds in as many steps; null without it, or where it cannot be measured.
    """

    steps: int
    change: Realized
    difference: Estimate | None = None
    weight_decay: Estimate | None = None


class Origins(Record):
    """The momentum part by the steps whose gradients it comes from; with ``older`` they sum to it.

    Attributes:
        steps: what the gradient of each of the last steps adds, the latest first.
        older: what is left for all steps before them, and of weight decay where it is part of the moments (``Adam``).
    """

    steps: tuple[Estimate, ...] = Field(min_length=1)
    older: Estimate


class HorizonPoint(Record):
    """The change of the entropy at prefixes whose last ``horizon`` tokens follow the policy after the step.

    Attributes:
        horizon: in tokens; null for the whole response.
        predicted: to first order; the error is that from the evaluation rollouts.
        realized: after the step; null where too few windowed weights are effective.
        increment: of ``predicted`` over the horizon before, with the error of the paired difference; null at 0.
        beyond: what ``predicted`` of the whole response has more than this, likewise; null for the whole.
        beyond_realized: the same of ``realized``.
        ess_fraction: effective share of the windowed weights, over tokens.
    """

    horizon: int | None = Field(ge=0)
    predicted: Estimate
    realized: Estimate | None
    increment: Estimate | None
    beyond: Estimate | None
    beyond_realized: Estimate | None
    ess_fraction: float


class Horizons(Record):
    """The profile over horizons.

    Attributes:
        points: by increasing horizon, the whole response last.
        headline: the horizon of the point that states the change: the one asked for; else the whole response where its
            interval excludes 0, and where it does not the shortest horizon from which no longer one differs by more
            than the interval of their difference. Null is the whole response.
    """

    points: tuple[HorizonPoint, ...] = Field(min_length=2)
    headline: int | None

    @property
    def stated(self) -> HorizonPoint:
        """The point of ``headline``."""
        return next(point for point in self.points if point.horizon == self.headline)
