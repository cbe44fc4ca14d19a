"""What a result says, in words."""

from __future__ import annotations

from dataclasses import replace

from entropy_probe.report.numbers import format_number, format_percent
from entropy_probe.report.sections.base import State, Verdict, written
from entropy_probe.report.sections.horizons import within
from entropy_probe.results.changes import HorizonPoint
from entropy_probe.results.probe import Estimate, ProbeResult, Realized

LINEAR_RANGE = 0.1
STATES: dict[str, State] = {
    "agrees within error": "ok",
    "agrees up to curvature": "ok",
    "distinguishable from 0": "ok",
    "resolved within horizon": "ok",
    "indistinguishable from 0": "look",
    "beyond the linear range": "look",
    "below the noise floor": "look",
    "not measured": "bad",
}


def verdict(result: ProbeResult) -> Verdict:
    """Judge a result by its own 95% intervals, by Student's t; a change exceeds its margin where that excludes 0.

    Of rollouts that are not the policy's, both changes are biased alike, so the sentence ends with that.

    ======================== ==========================================================================
    kind                     when
    ======================== ==========================================================================
    not measured             the step moved the policy too far for the evaluation rollouts to measure it
    below the noise floor    rounding alone could have made the realized change
    indistinguishable from 0 neither the predicted nor the realized change exceeds its margin
    resolved within horizon  likewise, but the predicted change within the horizon that states it does
    beyond the linear range  they differ by more than the margin of their paired difference, and by more than
                             10% of the prediction (or of its standard error, where that is larger)
    agrees up to curvature   they differ by more than that margin, but not by as much
    agrees within error      otherwise
    distinguishable from 0   only one of the two was computed, or only the one-batch prediction, and it exceeds
                             its margin (by the larger of the one-batch prediction's two errors)
    ======================== ==========================================================================

    Raises:
        ValueError: if the result holds no change at all, or a prediction and a measurement without their difference.
    """
    judged, fit = _judged(result), result.diagnostics.policy_fit.evaluation
    if fit is None or fit.status != "off_policy":
        return judged
    caution = "But the evaluation rollouts are not the policy's own, which biases every number above (see the notes)."
    return replace(judged, sentence=f"{judged.sentence} {caution}")


def _finding(kind: str, sentence: str) -> Verdict:
    return Verdict(kind, sentence, STATES[kind])


def _judged(result: ProbeResult) -> Verdict:
    predicted, realized = result.predicted, None
    if result.realized is not None:
        realized = result.realized.estimate
        if realized is None:
            return _not_measured(result.realized, predicted)
        if realized.status == "below_noise_floor":
            return _below_noise_floor(result.realized, predicted)
    changes = [change for change in (predicted, realized) if change is not None]
    if not changes and result.cross_prompt is not None:
        changes = [result.cross_prompt.estimate]
    if not changes:
        raise ValueError("result: expected a predicted or a realized change, got neither; probe the checkpoint again")
    if not any(change.distinguishable for change in changes):
        if result.horizons is not None and result.horizons.headline is not None:
            stated = result.horizons.stated
            if stated.predicted.distinguishable:
                return _within(stated)
        return _indistinguishable(result)
    if predicted is None or realized is None:
        how, (change, *_) = "predicted" if realized is None else "measured", changes
        away, goes = _in_errors(change), _goes(change)
        sentence = f"The {how} change is {away} standard errors from 0: the entropy {goes} by {_size(change)}."
        return _finding("distinguishable from 0", sentence)
    return _compare(predicted, realized, _difference(result))


def _compare(predicted: Estimate, realized: Estimate, difference: Estimate) -> Verdict:
    if _is_beyond_linear_range(predicted, difference):
        way = "fall" if predicted.value < 0 else "rise"
        other = predicted.value * realized.value < 0
        direction = f" (and in the other direction: predicted to {way})" if other else ""
        return _finding(
            "beyond the linear range",
            f"The entropy {_went(realized)} by {_size(realized)}, not by the {_size(predicted)} predicted"
            f"{direction}: the difference is {_in_errors(difference)} paired standard errors. "
            "The step is too large for a first-order forecast; trust the realized change, or probe a smaller "
            "learning rate.",
        )
    sentence = f"The entropy {_went(realized)} by {_size(realized)}, as predicted, "
    if not difference.distinguishable:
        errors = _in_errors(difference)
        return _finding("agrees within error", f"{sentence}to within {errors} paired standard errors.")
    base, name = max((abs(predicted.value), "the prediction"), (predicted.standard_error, "its standard error"))
    share = format_percent(abs(difference.value) / base)
    return _finding("agrees up to curvature", f"{sentence}up to {_size(difference)}, which is {share} of {name}.")


def _indistinguishable(result: ProbeResult) -> Verdict:
    predicted, realized = result.predicted, result.realized and result.realized.estimate
    subject = f"The {'predicted' if realized is None else 'measured'} change does not exceed its"
    ending = "Use more rollouts to resolve it."
    if predicted is not None and predicted.of_this_step.distinguishable:
        error = format_number(predicted.se_evaluation, 2)
        ending = (
            f"By the evaluation rollouts alone (± {error}) this very step is told from 0; what is not is the mean over "
            "update batches of this kind, which takes more update prompts."
        )
    if predicted is not None and realized is not None:
        subject = "Neither the predicted nor the realized change exceeds its"
        if _is_beyond_linear_range(predicted, _difference(result)):
            ending = (
                "The two do differ, by their much smaller paired error, so the step is also beyond the linear range: "
                "probe a smaller learning rate, and use more rollouts to resolve the change."
            )
    return _finding("indistinguishable from 0", f"{subject} 95% margin of error. {ending}")


def _within(stated: HorizonPoint) -> Verdict:
    """What the change within a horizon says where that of the whole response is lost in noise."""
    away, goes = _in_errors(stated.predicted), _goes(stated.predicted)
    sentence = f"The predicted change {within(stated.horizon or 0)} of a changed one is {away} standard errors from 0: "
    sentence += f"the entropy {goes} by {_size(stated.predicted)}"
    if stated.realized is not None:
        sentence += f" (measured: {_goes(stated.realized)} by {_size(stated.realized)})"
    if stated.beyond is not None:
        unit = stated.beyond.unit
        sentence += f". What lies beyond is {written(stated.beyond)} {unit}, not resolved; that takes more rollouts"
    return _finding("resolved within horizon", f"{sentence}.")


def _not_measured(realized: Realized, predicted: Estimate | None) -> Verdict:
    kept = "" if predicted is None else " The prediction does not depend on it."
    if realized.status == "low_ess":
        reason = f"are worth only {realized.ess:.1f} samples ({format_percent(realized.ess_fraction)})"
    else:
        reason = (
            f"have weights with too heavy a tail (Pareto k {format_number(realized.pareto_k or 0.0, 2)}, at most "
            f"{format_number(realized.pareto_k_threshold, 2)} allowed)"
        )
    return _finding(
        "not measured",
        f"The realized change was refused: after the step the evaluation rollouts {reason}.{kept} Probe a smaller "
        "learning rate, or set on_low_ess to resample (fresh responses after the step) or psis (smoothed weights).",
    )


def _below_noise_floor(realized: Realized, predicted: Estimate | None) -> Verdict:
    kept = "" if predicted is None else " The prediction does not depend on it."
    return _finding(
        "below the noise floor",
        f"The realized change ({format_number(realized.value or 0.0)} {realized.unit}) is not above what rounding "
        f"alone does to it ({format_number(realized.noise_floor or 0.0, 2)}).{kept} Use dtype float64, switch autocast "
        "off, or probe a larger learning rate.",
    )


def _difference(result: ProbeResult) -> Estimate:
    if result.difference is None:
        raise ValueError("result: expected the difference of realized and predicted, got null; probe again")
    return result.difference


def _is_beyond_linear_range(predicted: Estimate, difference: Estimate) -> bool:
    tolerance = LINEAR_RANGE * max(abs(predicted.value), predicted.standard_error)
    return difference.distinguishable and abs(difference.value) > tolerance


def _size(change: Estimate) -> str:
    return f"{format_number(abs(change.value))} {change.unit}"


def _goes(change: Estimate) -> str:
    return "falls" if change.value < 0 else "rises"


def _went(change: Estimate) -> str:
    return "fell" if change.value < 0 else "rose"


def _in_errors(estimate: Estimate) -> str:
    if estimate.standard_error == 0:
        return "0" if estimate.value == 0 else "infinitely many"
    return f"{abs(estimate.value) / estimate.standard_error:.1f}"
