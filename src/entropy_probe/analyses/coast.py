"""What momentum alone will still do after a step: the policy after steps with zero gradients, taken on copies.

Formulas: ``docs/theory.md``, "After the step".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from entropy_probe.analyses.assemble import estimate_fields
from entropy_probe.analyses.horizons import measure_horizons
from entropy_probe.analyses.measure import Measured, difference, fresh_scores
from entropy_probe.analyses.own_batch import OwnPrediction, without_own
from entropy_probe.analyses.plan import Plan
from entropy_probe.analyses.predict import Prediction
from entropy_probe.analyses.realized import Measurement, measure_change
from entropy_probe.estimators.realized import Change
from entropy_probe.estimators.uncertainty import Sampled
from entropy_probe.results.changes import Coasted
from entropy_probe.results.estimate import Estimate
from entropy_probe.results.note import NoteKind
from entropy_probe.scoring.isolation import parameters_at
from entropy_probe.steps.afterlife import DECAYS, coasted, no_end
from entropy_probe.steps.copied import optimizer_name

NO_MOMENTUM = NoteKind(
    "nothing_to_coast",
    "{optimizer} moves nothing when gradients are zero: it has no momentum, and nothing is committed",
    "Leave probe.coast out for this optimizer.",
)
CURVED = NoteKind(
    "coasting_curves",
    "coasted is {ratio:.2f} times committed, further from it than by chance: over {steps} steps the entropy curves "
    "away from its slope before this one, along which committed goes",
    "Trust coasted, which is measured; committed is first order.",
)
NOTABLE_GAP = 0.1
"""Between coasted and committed, relative to committed."""


@dataclass(frozen=True, eq=False)
class Rest:
    """Where momentum alone leads after a step.

    Attributes:
        steps: with zero gradients.
        parameters: after them, by name.
        decayed: the same with weight decay; ``None`` where there is none.
    """

    steps: int
    parameters: dict[str, Tensor]
    decayed: dict[str, Tensor] | None


def come_to_rest(plan: Plan, prediction: Prediction | None = None) -> Rest | None:
    """Take a step and those after it on copies, of parameters and optimizer as they are before it.

    Returns:
        ``None`` where the settings do not ask for it, or there is nothing to measure, which a note says.
    """
    policy, step, config = plan.policy, plan.step, plan.policy.config
    if not config.coast:
        return None
    given = (policy.parameters, policy.optimizer, step.taken_with, config.learning_rate, step.kept)
    alone = None if prediction is None else prediction.alone
    alone = alone or coasted(*given)
    if alone.parameters is None:
        if (note := no_end(policy.optimizer)) not in policy.log.notes:  # the prediction says so, too
            policy.log.notes.append(note)
        return None
    if alone.steps == 0:
        policy.log.notes.append(NO_MOMENTUM(optimizer=optimizer_name(policy.optimizer)))
        return None
    decays = any(group.get(key) for group in policy.optimizer.param_groups for key in DECAYS)
    return Rest(alone.steps, alone.parameters, coasted(*given, steps=alone.steps).parameters if decays else None)


def measure_rest(
    plan: Plan, measured: Measured, rest: Rest | None, prediction: Prediction | None = None
) -> Coasted | None:
    """The change by momentum alone after a step, on the evaluation batch; ``None`` where there is no rest.

    Args:
        plan: the step.
        measured: the change after it, which is subtracted.
        rest: where it leads.
        prediction: of the step, to compare with.
    """
    if rest is None:
        return None
    policy = plan.policy
    both = None if prediction is None or prediction.committed is None else prediction.at_rest

    def measured_at(parameters: dict[str, Tensor], phase: str) -> Measured:
        there = Measured(_measured_at(plan, parameters, phase), 0.0, None)
        return without_own(both, there) if isinstance(both, OwnPrediction) else there

    there = measured_at(rest.parameters, "score after coasting").measurement
    if there.note:
        policy.log.notes.append(there.note.about("coasting"))
    change, gap, decayed = _between(measured.measurement.change, there.change), None, None
    if prediction is not None and both is not None:
        gap = _minus(difference(both, there), difference(prediction, measured.measurement))
    if change is not None and rest.decayed is not None:
        decayed = _minus(measured_at(rest.decayed, "score after decay").measurement.change, there.change)
    apart = _estimate(plan, gap)
    if prediction is not None and prediction.committed is not None and apart is not None:
        _note_curvature(plan, rest.steps, prediction.committed.value, apart)
    refused = there if there.change is None else measured.measurement
    shown = replace(there, change=change, diagnosis=there.diagnosis if change is not None else refused.diagnosis)
    batch = "own" if isinstance(both, OwnPrediction) else "update" if plan.evaluation.is_update else "evaluation"
    return Coasted(
        steps=rest.steps,
        change=shown.report(plan.evaluation.clusters, policy.unit, measured.floor, batch),
        difference=apart,
        weight_decay=_estimate(plan, decayed),
    )


def measured_beside(prediction: Prediction, measured: Measured) -> dict[str, Any]:
    """The fields of a result for what is measured beside the step itself: the profile over horizons, and coasting."""
    plan = prediction.plan
    coasting = measure_rest(plan, measured, come_to_rest(plan, prediction), prediction)
    return {"horizons": measure_horizons(prediction, measured), "coasted": coasting}


def _note_curvature(plan: Plan, steps: int, committed: float, gap: Estimate) -> None:
    if gap.distinguishable and abs(gap.value) > NOTABLE_GAP * abs(committed) > 0:
        plan.policy.log.notes.append(CURVED(ratio=1 + gap.value / committed, steps=steps))


def _measured_at(plan: Plan, parameters: Mapping[str, Tensor], phase: str) -> Measurement:
    """The change from before the step to these parameters."""
    policy, before, local = plan.policy, plan.before, plan.evaluation.local
    with parameters_at(policy.parameters, parameters):
        with policy.clock.phase(phase) as progress, policy.on_rank(local):
            after = policy.scorer.score(plan.evaluation.own, progress)
        given = (before.scores, after, local, before.positions, policy.config, policy.ranks)
        return measure_change(*given, lambda: fresh_scores(plan))


def _between(near: Change | None, far: Change | None) -> Change | None:
    if near is None or far is None:
        return None
    return Change(far.value - near.value, far.influence - near.influence, far.size_change - near.size_change)


def _minus(one: Sampled | None, other: Sampled | None) -> Sampled | None:
    return None if one is None or other is None else one - other


def _estimate(plan: Plan, sampled: Sampled | None) -> Estimate | None:
    return None if sampled is None else Estimate(**estimate_fields(plan.policy, sampled, plan.evaluation.clusters))
