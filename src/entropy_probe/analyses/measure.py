"""The realized change: take the step on copies, score the evaluation batch again, and compare."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from entropy_probe.analyses.batches import EvaluationBatch
from entropy_probe.analyses.before import chosen_clusters
from entropy_probe.analyses.noise import measured_noise_floor
from entropy_probe.analyses.plan import Plan
from entropy_probe.analyses.predict import Prediction
from entropy_probe.analyses.realized import Measurement, measure_change, per_decision_sums
from entropy_probe.estimators.first_order import FirstOrder
from entropy_probe.estimators.uncertainty import Sampled, ratio
from entropy_probe.parallel.batch import LocalRows, add_up
from entropy_probe.results.note import NoteKind
from entropy_probe.scoring.isolation import parameters_at
from entropy_probe.steps.plan import PlannedStep, stepped_parameters
from entropy_probe.types import TokenScores

NOTABLE_ROUNDING = 0.01
STEP_ROUNDED = NoteKind(
    "step_rounded",
    "rounding to the parameters' precision changes the step by {share:.1%} of its length: the realized change is that "
    "of the rounded step, as it is in training; use dtype float64 or a larger learning rate to compare it with the "
    "prediction",
    "Set probe.dtype to float64 to separate rounding from the step.",
)


SHARE, LEAST, LEAST_SEQUENCES = 1 / 8, 4, 32
"""Of the clusters, the part that second order is measured on: so many clusters at least, and with so many sequences.
The spread of second order is a few hundredths of that of first order."""


@dataclass(frozen=True, eq=False)
class Measured:
    """The change after a step.

    Attributes:
        measurement: the change, or why there is none.
        rounding: what the parameters' precision adds to the step, relative to its length.
        floor: two standard deviations of what rounding does to the change; ``None`` where it was not measured.
    """

    measurement: Measurement
    rounding: float
    floor: float | None


def chosen_part(evaluation: EvaluationBatch) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """Some clusters of the batch, and the places of this rank's rows of them among its rows."""
    count, sequences = evaluation.clusters.count, len(evaluation.rollouts)
    number = max(LEAST, math.ceil(SHARE * count), math.ceil(LEAST_SEQUENCES / sequences * count))
    part = chosen_clusters(evaluation.rollouts, evaluation.clusters, min(number, count))
    return part, torch.isin(evaluation.local.clusters.index, part).nonzero()[:, 0]


def measure(plan: Plan) -> Measured:
    """The realized change of a step, with notes where it is not to be trusted or rounded."""
    measured = measure_at(plan, plan.policy.config.learning_rate, "score after step")
    notes = plan.policy.log.notes
    if measured.measurement.note:
        notes.append(measured.measurement.note)
    if measured.rounding > NOTABLE_ROUNDING:
        notes.append(STEP_ROUNDED(share=measured.rounding))
    return replace(measured, floor=noise_floor(plan))


def measure_at(plan: Plan, learning_rate: float | None, phase: str, floor: float | None = None) -> Measured:
    """The realized change of the step at another rate; ``None`` for each group's own.

    Raises:
        ValueError: if the policy after the step gives numbers that are not finite, or the step is not linear in the
            rate.
    """
    with after_step(plan, plan.step, learning_rate, phase) as (after, rounding):
        return Measured(_measurement(plan, after), rounding, floor)


def measure_taken(plan: Plan) -> Measured:
    """The realized change of a step that the optimizer itself has taken since it was planned.

    Raises:
        ValueError: if the policy after the step gives numbers that are not finite.
    """
    policy = plan.policy
    with policy.clock.phase("score after step") as progress, policy.on_rank(plan.evaluation.local):
        after = policy.scorer.score(plan.evaluation.own, progress)
    return taken(plan, _measurement(plan, after))


def taken(plan: Plan, measurement: Measurement) -> Measured:
    """What was measured after a step of the optimizer itself, with a note where it is not to be trusted."""
    if measurement.note:
        plan.policy.log.notes.append(measurement.note)
    return Measured(measurement, 0.0, None)


def measured_part(
    plan: Plan, change: FirstOrder, part: Int[Tensor, " n"], rows: Int[Tensor, " m"]
) -> tuple[Measurement, Sampled | None]:
    """What the step that was taken did to some clusters, and their change less the first-order ``change`` of them.

    That is what the batch's change has beyond first order: the sums of the part's clusters with the batch's H,
    ``(sum A+ - A - H (T+ - T)) / sum T+ - sum d / sum T``, where ``d`` are contributions to ``change``. ``None`` where
    the weights are not to be trusted.
    """
    policy, before, evaluation = plan.policy, plan.before, plan.evaluation
    with policy.clock.phase("score after step") as progress, policy.on_rank(evaluation.local):
        after = policy.scorer.score(evaluation.own.select(rows), progress)
    own, places = evaluation.local, torch.isin(evaluation.clusters.index, part).nonzero()[:, 0]
    some = LocalRows(torch.searchsorted(places, own.rows[rows]), len(places), own.clusters.select(rows))
    old = before.scores.select(rows)
    given = (old, after, some, before.positions, policy.config, policy.ranks)
    measurement = measure_change(*given, lambda: fresh_scores(plan))
    if measurement.change is None:
        return measurement, None
    sums = per_decision_sums(old, after, some.clusters, before.positions, policy.config.normalization)
    (new, tokens), (old_sums, size) = add_up(policy.ranks, sums).table, before.sums.table
    more = new - old_sums - before.entropy.value * (tokens - size)
    there = change.value * size + (change.influence + change.length_change * before.entropy.influence) * size.mean()
    beyond = ratio(more[part], tokens[part]) - ratio(there[part], size[part])
    return measurement, beyond.among(part, evaluation.clusters.count)


def _measurement(plan: Plan, after: TokenScores) -> Measurement:
    policy, before = plan.policy, plan.before
    given = (before.scores, after, plan.evaluation.local, before.positions, policy.config, policy.ranks)
    return measure_change(*given, lambda: fresh_scores(plan))


@contextmanager
def after_step(
    plan: Plan, step: PlannedStep, learning_rate: float | None, phase: str
) -> Iterator[tuple[TokenScores, float]]:
    """The policy after a step, for as long as this lasts: scores of this rank's rows, and the step's rounding."""
    policy, evaluation = plan.policy, plan.evaluation
    stepped, rounding = stepped_parameters(policy.parameters, policy.optimizer, step, policy.config, learning_rate)
    with parameters_at(policy.parameters, stepped):
        with policy.clock.phase(phase) as progress, policy.on_rank(evaluation.local):
            after = policy.scorer.score(evaluation.own, progress)
        yield after, rounding


def fresh_scores(plan: Plan) -> TokenScores:
    """Scores of fresh responses to the evaluation prompts, sampled and scored at the policy as it is.

    Raises:
        ValueError: if the responses are to other prompts.
    """
    policy, evaluation, local = plan.policy, plan.evaluation.rollouts, plan.evaluation.local
    assert policy.resample is not None
    with policy.clock.phase("resample"):
        fresh = policy.resample(evaluation).cpu()
    if not torch.equal(fresh.prompt_ids, evaluation.prompt_ids):
        raise ValueError(
            f"resample: expected a response to each of the {len(evaluation)} evaluation prompts, in the same "
            f"order, got {len(fresh)} for others"
        )
    policy.scorer.check_also(fresh)
    policy.check_ranks_agree(resampled=fresh)
    with policy.clock.phase("score resampled") as progress, policy.on_rank(local):
        return policy.scorer.score(fresh.select(local.rows), progress)


def noise_floor(plan: Plan) -> float | None:
    """Two standard deviations of what rounding does to the change; ``None`` where the config leaves it out."""
    policy, evaluation = plan.policy, plan.evaluation
    if not policy.config.measure_noise_floor:
        return None
    with policy.clock.phase("noise floor"):
        given = (evaluation.rollouts, evaluation.local, plan.before.scores, policy.config, policy.ranks)
        return measured_noise_floor(policy.scorer, policy.parameters, *given)


def difference(prediction: Prediction, measurement: Measurement, factor: float = 1.0) -> Sampled | None:
    """The measured change minus ``factor`` times the predicted one; ``None`` where nothing was measured."""
    change = measurement.change
    if change is None:
        return None
    predicted, before = prediction.change, prediction.plan.before
    predicted, beyond = predicted.times(factor), 0.0
    if measurement.beyond is not None:
        return measurement.beyond
    if before.lengths is not None and measurement.estimator == "per_decision":
        given = (predicted.length_change, prediction.plan.policy.ranks, prediction.horizon)
        beyond = before.lengths.beyond(measurement.after, *given)
    if measurement.estimator == "resampled":  # other responses, so the change does not contain the influence of H
        beyond = change.size_change - predicted.length_change
    return change.minus(predicted, before.entropy, beyond)
