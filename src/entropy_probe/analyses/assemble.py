"""The records of a result, put together from what a run computed."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from entropy_probe.analyses.admission import ClusterName
from entropy_probe.analyses.draws import measured_draws
from entropy_probe.analyses.given import GivenGradient
from entropy_probe.analyses.measure import Measured, difference
from entropy_probe.analyses.own_batch import OwnPrediction
from entropy_probe.analyses.plan import Plan
from entropy_probe.analyses.policy import Policy
from entropy_probe.analyses.predict import Prediction
from entropy_probe.analyses.provenance import library_versions, peak_memory
from entropy_probe.estimators.uncertainty import Sampled
from entropy_probe.named import norm
from entropy_probe.results.note import NoteKind, distinct
from entropy_probe.results.probe import (
    Diagnostics,
    Estimate,
    OptimizerStateReport,
    Origins,
    PolicyFit,
    Predicted,
    ProbeResult,
    Realized,
)
from entropy_probe.results.step import StepVectors
from entropy_probe.results.student import combined_degrees, degrees_of
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.steps.adamw import is_adam
from entropy_probe.steps.afterlife import lifetime_factor
from entropy_probe.steps.copied import optimizer_name
from entropy_probe.steps.moments import summarize_moments
from entropy_probe.types import Clusters

NO_SECOND_MOMENT = NoteKind(
    "no_second_moment",
    "{share:.1%} of the trained elements have no usable second moment (missing, not finite, or all zero)",
    "Normal for lora_A after the first step and for parts that were never trained; else inspect the checkpoint.",
)


def result_of(
    plan: Plan, prediction: Prediction | None = None, measured: Measured | None = None, **fields: Any
) -> ProbeResult:
    """The result of a step that was predicted, measured, or both, with these fields beside."""
    step, evaluation, source = plan.step, plan.evaluation, plan.source
    update = source.update if isinstance(source, GivenGradient) else source.update.rollouts
    if prediction is not None:
        fields |= _predicted_fields(prediction)
    if measured is not None:
        fields |= _realized_fields(plan, prediction, measured)
    return assemble(
        plan.policy,
        plan.before.entropy,
        evaluation.clusters,
        evaluation.rollouts,
        update,
        {
            "gradient_norm": step.gradient.norm,
            "clip_factor": step.gradient.factor,
            "step_norm": norm(delta := step.delta),
            "gradient_agreement": source.agreement,
        },
        step=StepVectors(delta, step.taken_with),
        unit=evaluation.cluster_name,
        preconditioner=step.preconditioner,
        **fields,
    )


def with_realized(result: ProbeResult, prediction: Prediction, measured: Measured) -> ProbeResult:
    """The result of a prediction, once its step was taken and measured."""
    policy = prediction.plan.policy
    diagnostics = result.diagnostics.model_copy(
        update={"notes": distinct((*result.diagnostics.notes, *policy.log.notes))}
    )
    fields = {"diagnostics": diagnostics, "timing": policy.clock.seconds, "memory": peak_memory(policy.scorer.device)}
    return result.model_copy(update=fields | _realized_fields(prediction.plan, prediction, measured))


def predicted_record(prediction: Prediction) -> Predicted:
    """The record of the first-order change."""
    own = prediction.influence if isinstance(prediction, OwnPrediction) else None
    return _of_update(prediction, prediction.change, own)


def _of_update(prediction: Prediction, change: Sampled, own: Tensor | None) -> Predicted:
    """The record of a change that the update batch has a part in; ``own`` is the influence of a batch in both roles."""
    policy, clusters = prediction.plan.policy, prediction.plan.evaluation.clusters
    if own is not None:
        fields, method = estimate_fields(policy, Sampled(change.value, own), clusters), "pairs"
    else:
        fields = estimate_fields(policy, change, clusters, _update_error(prediction))
        method = "jackknife" if prediction.by_prompt is None else "linear"
    return Predicted(
        **fields,
        se_evaluation=change.standard_error,
        se_update=prediction.se_update,
        se_update_method=None if prediction.se_update is None else method,
    )


def _update_error(prediction: Prediction) -> tuple[float, int] | None:
    """The error from the update batch, and how many units it is from; ``None`` for a gradient from outside."""
    if prediction.se_update is None:
        return None
    return prediction.se_update, prediction.plan.batch.update.shares.count


def _predicted_fields(prediction: Prediction) -> dict[str, Any]:
    plan, parts = prediction.plan, prediction.parts
    policy, clusters = plan.policy, plan.evaluation.clusters
    components: dict[str, Estimate] = {
        name: Estimate(**estimate_fields(policy, part, clusters)) for name, part in parts.items()
    }
    if (gradient := parts.get("gradient")) is not None:
        own = gradient.influence + prediction.of_update if isinstance(prediction, OwnPrediction) else None
        components["gradient"] = _of_update(prediction, gradient, own)
    return _after_the_step(prediction, components.get("gradient")) | {
        "predicted": predicted_record(prediction),
        "components": components,
        "contributions": tuple((prediction.change.value + prediction.change.influence).tolist()),
    }


def _after_the_step(prediction: Prediction, gradient: Estimate | None) -> dict[str, Any]:
    """What the gradient does over its life in the momentum, and what the moments are committed to."""
    plan, policy, committed = prediction.plan, prediction.plan.policy, prediction.committed
    fields: dict[str, Any] = {}
    if gradient is not None and policy.config.geometry == "adamw" and is_adam(policy.optimizer):
        factor = lifetime_factor(policy.parameters, policy.optimizer)
        if factor is not None:
            numbers = {name: factor * getattr(gradient, name) for name in ("value", "standard_error")}
            said = gradient.model_dump(include=set(Estimate.model_fields))
            fields["lifetime"] = Estimate(**said | numbers)
    if prediction.origins:
        older = prediction.parts["momentum"]
        for origin in prediction.origins:
            older += origin.times(-1.0)
        steps = [Estimate(**estimate_fields(policy, x, plan.evaluation.clusters)) for x in (*prediction.origins, older)]
        fields["origins"] = Origins(steps=tuple(steps[:-1]), older=steps[-1])
    if committed is not None:
        fields["committed"] = Estimate(**estimate_fields(policy, committed, plan.evaluation.clusters))
    return fields


def realized_record(plan: Plan, measured: Measured, prediction: Prediction | None = None) -> Realized:
    """The record of a measured change."""
    own = isinstance(prediction, OwnPrediction)
    batch = "own" if own else "update" if plan.evaluation.is_update else "evaluation"
    given = (plan.evaluation.clusters, plan.policy.unit, measured.floor, batch, measured.rounding)
    return measured.measurement.report(*given)


def _realized_fields(plan: Plan, prediction: Prediction | None, measured: Measured) -> dict[str, Any]:
    record, draws = realized_record(plan, measured, prediction), measured_draws(plan, measured)
    fields: dict[str, Any] = {"realized": record, "draws": draws}
    gap = None if prediction is None else difference(prediction, measured.measurement)
    if gap is not None:
        fields["difference"] = Estimate(**estimate_fields(plan.policy, gap, plan.evaluation.clusters))
    return fields


def estimate_fields(
    policy: Policy, sampled: Sampled, clusters: Clusters, update: tuple[float, int] | None = None
) -> dict[str, Any]:
    """What every estimate over evaluation clusters has.

    ``update`` is the update batch's error, added in quadrature, and how many units of that batch it is from.
    """
    own, degrees = sampled.standard_error, degrees_of(clusters.count, sampled.skewness)
    if update is not None:
        error, number = update
        degrees = combined_degrees([(own, degrees), (error, number - 1)])
        own = math.hypot(own, error)
    return {
        "value": sampled.value,
        "standard_error": own,
        "num_clusters": clusters.count,
        "unit": policy.unit,
        "degrees_of_freedom": degrees,
    }


def _optimizer_report(policy: Policy) -> OptimizerStateReport:
    """What the moments cover, with a note where they leave something open."""
    if not is_adam(policy.optimizer):
        return _other_optimizer_report(policy)
    group = {id(p): g for g in policy.optimizer.param_groups for p in g["params"]}
    entries = ((p.numel(), policy.optimizer.state.get(p, {}), group[id(p)]) for p in policy.parameters.values())
    report = summarize_moments(entries, policy.mapping, policy.learning_rates)
    if report.coverage < 1:
        policy.log.notes.append(NO_SECOND_MOMENT(share=1 - report.coverage))
    return report


def _other_optimizer_report(policy: Policy) -> OptimizerStateReport:
    sizes = [(p.numel(), policy.optimizer.state.get(p, {})) for p in policy.parameters.values()]
    steps = [int(float(state.get("step", 0))) for _, state in sizes]
    elements, covered = sum(n for n, _ in sizes), sum(n for n, state in sizes if state)
    return OptimizerStateReport(
        optimizer=optimizer_name(policy.optimizer),
        num_parameters=len(sizes),
        num_elements=elements,
        coverage=covered / elements,
        mapping=policy.mapping,
        steps=(min(steps), max(steps)),
        scale_min=None,
        scale_max=None,
        learning_rates=policy.learning_rates,
    )


def assemble(
    policy: Policy,
    entropy: Sampled,
    clusters: Clusters,
    evaluation: Rollouts,
    update: Rollouts | None,
    taken: dict[str, Any],
    *,
    unit: ClusterName,
    **fields: Any,
) -> ProbeResult:
    """The result: what every run reports, the diagnostics of the step (``taken``), and the fields of this one."""
    optimizer_state = _optimizer_report(policy)
    checked = policy.log.checked  # a batch that is both has a role of its own
    judged, given = (checked.get(role, checked.get("batch")) for role in ("evaluation", "update"))
    notes = distinct(note for of_rank in policy.ranks.gather(policy.scorer.notes) for note in of_rank)
    return ProbeResult(
        entropy=Estimate(**estimate_fields(policy, entropy, clusters)),
        optimizer_state=optimizer_state,
        diagnostics=Diagnostics(
            evaluation_unit=unit,
            num_evaluation_sequences=len(evaluation),
            num_update_sequences=None if update is None else len(update),
            num_update_prompts=None if update is None else update.num_prompts,
            head=policy.scorer.head_path,
            prefix_sharing=policy.scorer.prefix_sharing,
            per_sample_gradients=policy.log.per_sample_gradients,
            policy_fit=PolicyFit(evaluation=judged and judged.fit, update=given and given.fit),
            mismatch=judged and judged.mismatch,
            update_mismatch=given and given.mismatch,
            notes=(*policy.log.notes, *notes),
            not_modelled=tuple(policy.log.not_modelled),
            **taken,
        ),
        timing=policy.clock.seconds,
        memory=peak_memory(policy.scorer.device),
        config=policy.config.model_dump(mode="json"),
        versions=library_versions(),
        **fields,
    )
