"""One step at many learning rates: where the first-order change stops describing the measured one, and its curvature.

The story: everything up to the prediction once, as for two batches; then, for each rate, the step and one scoring of
the evaluation batch; then the fits. Formulas: ``docs/theory.md``, "Sweeps and curvature".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from entropy_probe.analyses.assemble import estimate_fields, predicted_record, realized_record, result_of
from entropy_probe.analyses.horizons import measured_within, stated
from entropy_probe.analyses.measure import difference, measure_at, noise_floor
from entropy_probe.analyses.own_batch import OwnPrediction, without_own
from entropy_probe.analyses.predict import Prediction, entropy_surrogate
from entropy_probe.estimators import sweep as curves
from entropy_probe.estimators.curvature import per_decision_taylor
from entropy_probe.estimators.uncertainty import Sampled
from entropy_probe.parallel.batch import add_up
from entropy_probe.results.note import Note, NoteKind
from entropy_probe.results.probe import Estimate, Predicted, ProbeResult
from entropy_probe.results.sweep import (
    Curvature,
    Fitted,
    LinearRange,
    PowerLawFit,
    QuadraticFit,
    Sweep,
    SweepPoint,
)
from entropy_probe.scoring.directional import directional_derivatives, why_not_forward_mode

SLOPE_TOLERANCE = 1e-3
"""How far the forward-mode slope may be from the backward one, relative to the sum of absolute contributions."""
NO_FORWARD_MODE = NoteKind(
    "no_forward_mode",
    "no direct curvature: the model cannot be differentiated twice in forward mode ({reason})",
    "Read the curvature from the fit.",
)
FORWARD_MODE_DIFFERS = NoteKind(
    "forward_mode_differs",
    "no direct curvature: in forward mode the first-order change is {forward:.6g}, not {backward:.6g} as in backward "
    "mode",
    "Read the curvature from the fit.",
)
WHOLE_ONLY = NoteKind(
    "curvature_of_the_whole",
    "no direct curvature: it is that of the whole response, and the changes of this sweep are within {horizon} tokens",
    "Read the curvature from the fit, or set probe.horizon to null.",
)
OWN_CURVATURE = NoteKind(
    "curvature_of_one_batch",
    "no direct curvature: from the batch of the step alone the second derivative has in it what responses do to "
    "themselves, which is left out to first order only, here as in the fit",
    "Give evaluation rollouts.",
)
BELOW_FLOOR = NoteKind(
    "below_noise_floor",
    "{lost} of {points} changes are below the noise floor and enter neither range nor fits; use dtype float64 or "
    "larger rates",
    "Set probe.dtype to float64, or start the sweep at a larger rate.",
)
SIGNS_DIFFER = NoteKind(
    "no_power_law",
    "no log-log slope: the measured changes are 0 or change sign within the linear range",
    "Add smaller learning rates to the sweep.",
)
NO_LINEAR_RANGE = NoteKind(
    "no_linear_range",
    "no {what}: not even the smallest rate lies within the linear range",
    "Add smaller learning rates to the sweep.",
)
FEW_RATES = NoteKind(
    "few_rates",
    "no {what}: expected at least {least} rates up to {rate:.3g}, got {rates}",
    "Add smaller learning rates to the sweep.",
)


def check_learning_rates(learning_rates: Sequence[float]) -> tuple[float, ...]:
    """The rates of a sweep in increasing order.

    Raises:
        ValueError: unless there are at least two, positive, finite and distinct.
    """
    rates = tuple(sorted(float(rate) for rate in learning_rates))
    if len(rates) < 2 or not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
        raise ValueError(
            f"learning_rates: expected at least 2, positive, finite and distinct, got {list(learning_rates)}"
        )
    return rates


def check_finished(finished: Sequence[SweepPoint], rates: Sequence[float]) -> None:
    """Make sure that points of an interrupted sweep are of this one."""
    known = {point.learning_rate for point in finished} <= set(rates)
    if not known or any(p.estimate and p.influence is None for p in finished):
        raise ValueError("finished: expected points at rates of this sweep, with their influences; sweep them again")


def sweep(
    prediction: Prediction,
    rates: Sequence[float],
    *,
    direct_curvature: bool,
    finished: Sequence[SweepPoint],
    on_point: Callable[[SweepPoint], None] | None,
) -> Sweep:
    """The change at every rate, and the fits; see :meth:`entropy_probe.EntropyProbe.sweep`.

    Args:
        prediction: of the whole response, planned at one of the rates, which ``config.learning_rate`` is; by evaluation
            rollouts, or by the batch of the step itself. All rates are of one horizon
            (:func:`~entropy_probe.analyses.horizons.stated`).
        rates: in increasing order.
        direct_curvature: also differentiate twice along the step.
        finished: points that are taken as they are.
        on_point: called with every other point.
    """
    prediction = stated(prediction)
    points = {point.learning_rate: point for point in finished}
    notes: list[Note] = []
    derivatives = _direct_derivatives(prediction, notes) if direct_curvature else None
    floor = noise_floor(prediction.plan)
    for rate in rates:
        if rate not in points:
            points[rate] = _point(prediction, rate, floor)
            if on_point:
                on_point(points[rate])
    own = tuple(float(group["lr"]) for group in prediction.plan.policy.optimizer.param_groups)
    result = result_of(prediction.plan, prediction).model_copy(update={"timing": {}, "memory": {}})
    swept = fitted(result, own, [points[rate] for rate in rates], derivatives, notes)
    return swept.model_copy(update={"horizon": prediction.horizon})


def _planned_rate(prediction: Prediction) -> float:
    rate = prediction.plan.policy.config.learning_rate
    assert rate is not None
    return rate


def _point(prediction: Prediction, rate: float, floor: float | None) -> SweepPoint:
    """The step at one rate, and the change after it."""
    plan, factor, planned = prediction.plan, rate / _planned_rate(prediction), predicted_record(prediction)
    of_rate = {
        name: factor * value
        for name in ("value", "standard_error", "se_evaluation", "se_update")
        if (value := getattr(planned, name)) is not None
    }
    predicted = Predicted(**planned.model_dump() | of_rate)
    try:
        measured = measured_within(prediction, measure_at(plan, rate, f"score at {rate:.3g}", floor))
        if isinstance(prediction, OwnPrediction):
            measured = without_own(prediction, measured, factor)
    except ValueError as error:  # the same batch was scored before the step: what fails now is the step's doing
        return SweepPoint(learning_rate=rate, predicted=predicted, failure=str(error))
    point = SweepPoint(learning_rate=rate, predicted=predicted, realized=realized_record(plan, measured, prediction))
    change, gap = measured.measurement.change, difference(prediction, measured.measurement, factor)
    if change is None or gap is None:
        return point
    return point.model_copy(
        update={
            "difference": Estimate(**estimate_fields(plan.policy, gap, plan.evaluation.clusters)),
            "influence": tuple(change.influence.tolist()),
            "difference_influence": tuple(gap.influence.tolist()),
        }
    )


def _direct_derivatives(prediction: Prediction, notes: list[Note]) -> tuple[Sampled, Sampled] | None:
    """Slope and second derivative along the step by nested forward mode, or a note on why there are none."""
    plan, rate, predicted = prediction.plan, _planned_rate(prediction), prediction.change
    if prediction.horizon is not None:
        notes.append(WHOLE_ONLY(horizon=prediction.horizon))
        return None
    if isinstance(prediction, OwnPrediction):
        notes.append(OWN_CURVATURE())
        return None
    policy, local, before = plan.policy, plan.evaluation.local, plan.before
    direction = {name: move / rate for name, move in plan.step.delta.items()}
    # on a few sequences, the same on all ranks
    given = (policy.scorer, plan.evaluation.rollouts, policy.parameters, direction)
    reason = policy.ranks.broadcast(why_not_forward_mode(*given))
    if reason is not None:
        notes.append(NO_FORWARD_MODE(reason=reason))
        return None
    with policy.clock.phase("direct curvature") as progress, policy.on_rank(local):
        given = (policy.scorer, plan.evaluation.own, policy.parameters, direction)
        first, second = directional_derivatives(*given, progress)
    c = entropy_surrogate(plan)
    d = (c.logprobs * first.logprobs).sum(1)
    d = d if c.entropies is None else d + (c.entropies * first.entropies).sum(1)
    d, size = policy.ranks.sum(local.by_sequence(d.double())), before.sums.size.sum()
    gap = rate * float(d.sum() / size) - predicted.value
    if abs(gap) > SLOPE_TOLERANCE * rate * float(d.abs().sum() / size):
        notes.append(FORWARD_MODE_DIFFERS(forward=predicted.value + gap, backward=predicted.value))
        return None
    own = per_decision_taylor(
        before.scores, first, second, local.clusters, before.positions, policy.config.normalization
    )
    return add_up(policy.ranks, own).derivatives()


def fitted(
    prediction: ProbeResult,
    own_learning_rates: tuple[float, ...],
    points: Sequence[SweepPoint],
    derivatives: tuple[Sampled, Sampled] | None,
    notes: Sequence[Note],
) -> Sweep:
    """Linear range and fits from finished points, by increasing rate.

    Rates with status ``ok`` enter: for the log-log slope those within the linear range, for the quadratic those up to
    a third of it. Each takes at least three.
    """
    notes = list(notes)
    last = curves.linear_range(
        _column([point.predicted.value for point in points]),
        _column([point.predicted.standard_error for point in points]),
        _column([point.estimate.value if point.estimate else 0.0 for point in points]),
        torch.tensor([point.status == "ok" for point in points]),
    )
    end = None if last is None else points[last].learning_rate
    lost = sum(point.status == "below_noise_floor" for point in points)
    if lost:
        notes.append(BELOW_FLOOR(lost=lost, points=len(points)))
    law = _power_law(points, end, notes)
    near = _measured(points, end, curves.FIT_REACH, "fit", notes)
    curve = near and curves.quadratic(*near)
    star = curve and curves.cancelling_rate(curve)
    # half of it, since the floor is two standard deviations
    rounding = max((0.5 * (p.realized.noise_floor or 0.0) for p in points if p.realized), default=0.0)
    return Sweep(
        prediction=prediction,
        own_learning_rates=own_learning_rates,
        points=tuple(points),
        linear_range=LinearRange(learning_rate=end, at_least=last == len(points) - 1),
        fit=near
        and curve
        and QuadraticFit(
            linear=_coefficient(curve.linear, rounding),
            quadratic=_coefficient(curve.quadratic, rounding),
            r_squared=curve.r_squared,
            learning_rates=tuple(near[0].tolist()),
        ),
        power_law=law,
        curvature=Curvature(
            from_fit=curve and _coefficient(curve.quadratic, rounding, 2.0),
            direct=derivatives and _fitted(derivatives[1]),
            direct_slope=derivatives and _fitted(derivatives[0]),
        ),
        learning_rate_star=star and _coefficient(star, rounding),
        notes=tuple(notes),
    )


def _power_law(points: Sequence[SweepPoint], end: float | None, notes: list[Note]) -> PowerLawFit | None:
    inside = _measured(points, end, 1.0, "log-log slope", notes)
    if inside is None:
        return None
    law = curves.power_law(*inside)
    if law is None:
        notes.append(SIGNS_DIFFER())
        return None
    return PowerLawFit(slope=_fitted(law.slope), r_squared=law.r_squared, learning_rates=tuple(inside[0].tolist()))


def _measured(
    points: Sequence[SweepPoint], end: float | None, reach: float, what: str, notes: list[Note]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Rates, changes and influences up to a share of the linear range, or a note on why they are too few."""
    if end is None:
        notes.append(NO_LINEAR_RANGE(what=what))
        return None
    chosen = [(p, p.estimate) for p in points if p.estimate and p.status == "ok" and p.learning_rate <= reach * end]
    if len(chosen) < curves.MIN_RATES:
        notes.append(FEW_RATES(what=what, least=curves.MIN_RATES, rate=reach * end, rates=len(chosen)))
        return None
    influences = torch.tensor([point.influence for point, _ in chosen], dtype=torch.float64)
    rates, changes = [p.learning_rate for p, _ in chosen], [estimate.value for _, estimate in chosen]
    return _column(rates), _column(changes), influences


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _fitted(sampled: Sampled) -> Fitted:
    return Fitted(value=sampled.value, standard_error=sampled.standard_error)


def _coefficient(coefficient: curves.Coefficient, rounding: float, factor: float = 1.0) -> Fitted:
    return Fitted(value=factor * coefficient.value, standard_error=factor * coefficient.error(rounding))
