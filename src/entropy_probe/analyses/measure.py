"""The realized change: take the step on copies, score the evaluation batch again, and compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from entropy_probe.analyses.noise import measured_noise_floor
from entropy_probe.analyses.plan import Plan
from entropy_probe.analyses.predict import Prediction
from entropy_probe.analyses.realized import Measurement, measure_change
from entropy_probe.estimators.uncertainty import Sampled
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
    measurement = _measurement(plan, after)
    if measurement.note:
        policy.log.notes.append(measurement.note)
    return Measured(measurement, 0.0, None)


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
    if before.lengths is not None and measurement.estimator == "per_decision":
        given = (predicted.length_change, prediction.plan.policy.ranks, prediction.horizon)
        beyond = before.lengths.beyond(measurement.after, *given)
    if measurement.estimator == "resampled":  # other responses, so the change does not contain the influence of H
        beyond = change.size_change - predicted.length_change
    return change.minus(predicted, before.entropy, beyond)
