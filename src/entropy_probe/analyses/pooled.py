"""Evaluation rollouts and the batch of the step together: two looks at what one step does.

Formulas: ``docs/theory.md``, "Both together".
"""

from __future__ import annotations

from dataclasses import replace

from entropy_probe.analyses.admission import draws_of
from entropy_probe.analyses.assemble import predicted_record, realized_record
from entropy_probe.analyses.batches import EvaluationBatch
from entropy_probe.analyses.measure import Measured
from entropy_probe.analyses.own_batch import OwnPrediction, measure_own, own_prediction
from entropy_probe.analyses.plan import before_step
from entropy_probe.analyses.policy import Log
from entropy_probe.analyses.predict import Prediction
from entropy_probe.estimators.pooled import Pool, pool
from entropy_probe.estimators.uncertainty import Sampled
from entropy_probe.results.probe import Estimate, Pooled, Predicted
from entropy_probe.results.student import combined_degrees


def pooled(prediction: Prediction, measured: Measured | None = None) -> Pooled:
    """The changes by the batch of the step, and by both.

    Raises:
        ValueError: as :func:`~entropy_probe.analyses.own_batch.predict_own`; if the two are one batch, or the step is
            that of a gradient from outside.
    """
    own = own_of(prediction)
    parts = pool(prediction.change, own.change)
    again, both = None if measured is None else measure_own(own), None
    if measured is not None and again is not None:
        both = _realized(prediction, parts, measured.measurement.change, again.measurement.change)
    known = {note.code for note in prediction.plan.policy.log.notes}
    prediction.plan.policy.log.notes += [n.about("own batch") for n in own.plan.policy.log.notes if n.code not in known]
    whole = pooled_prediction(prediction, own, parts)
    return Pooled(
        own=predicted_record(own),
        predicted=whole,
        weight=parts.weight,
        z=parts.z,
        own_realized=None if again is None else realized_record(own.plan, again, own),
        realized=both,
    )


def own_of(prediction: Prediction) -> OwnPrediction:
    """The same step, by its own batch; what is said of that stands in a log of its own."""
    planned = prediction.plan
    if planned.evaluation.is_update:
        raise ValueError(
            "pooled: expected evaluation rollouts beside the update batch, got the same sequences twice; give others, "
            "or use one_batch"
        )
    config = planned.policy.config.model_copy(update={"coast": False})
    update, policy = planned.batch.update, replace(planned.policy, log=Log([], []), config=config)
    whole = (update.rollouts, update.prompts, "prompt", draws_of(update.rollouts))
    evaluation = EvaluationBatch(*whole, update.local, update.own, is_update=True)
    return own_prediction(
        replace(planned, policy=policy, evaluation=evaluation, before=before_step(policy, evaluation))
    )


def pooled_prediction(prediction: Prediction, own: OwnPrediction, parts: Pool) -> Predicted:
    """By both. Over batches their errors are of the same update prompts, whose influences are added before squaring."""
    given = (prediction.change, own.change)
    of_step = own.of_update  # where a step does not divide over prompts; else by the evaluation rollouts
    if (by_prompt := prediction.by_prompt) is not None:
        of_step = len(by_prompt) * by_prompt - by_prompt.sum()
    influence = parts.weight * of_step + (1 - parts.weight) * own.influence
    update = Sampled(own.change.value, influence).standard_error
    own_error = parts.weight * prediction.change.standard_error
    clusters, prompts = prediction.plan.evaluation.clusters, own.plan.evaluation.clusters
    return Predicted(
        value=parts.value(*given),
        standard_error=(own_error**2 + update**2) ** 0.5,
        num_clusters=clusters.count + prompts.count,
        unit=prediction.plan.policy.unit,
        degrees_of_freedom=combined_degrees([(own_error, clusters.count - 1), (update, prompts.count - 1)]),
        se_evaluation=parts.standard_error(*given),
        se_update=update,
        se_update_method="linear",
    )


def _realized(prediction: Prediction, parts: Pool, one: Sampled | None, other: Sampled | None) -> Estimate | None:
    if one is None or other is None:
        return None
    errors = parts.weight * one.standard_error, (1 - parts.weight) * other.standard_error
    return Estimate(
        value=parts.value(one, other),
        standard_error=parts.standard_error(one, other),
        num_clusters=len(one.influence) + len(other.influence),
        unit=prediction.plan.policy.unit,
        degrees_of_freedom=combined_degrees(zip(errors, (len(x.influence) - 1 for x in (one, other)), strict=True)),
    )
