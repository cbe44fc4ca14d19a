"""What if some prompts were left out of the update batch?

Exact where the linear contributions of an attribution are not: the gradient of the remaining prompts has its own
normaliser and clipping factor, and the step its own denominators. Formulas: ``docs/theory.md``, "What if".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from entropy_probe.analyses.assemble import estimate_fields, predicted_record
from entropy_probe.analyses.batches import UpdateBatch
from entropy_probe.analyses.gradient import differentiate, over_clusters
from entropy_probe.analyses.policy import Policy
from entropy_probe.analyses.predict import Prediction, entropy_surrogate
from entropy_probe.analyses.reduced import step_without
from entropy_probe.estimators.first_order import FirstOrder, first_order
from entropy_probe.gradients.per_sample import Side
from entropy_probe.named import NamedVector
from entropy_probe.report.sections.base import Row, Rows, Section, written
from entropy_probe.results import record
from entropy_probe.results.probe import Estimate, Predicted
from entropy_probe.results.record import Kept, Record, SavedRecord
from entropy_probe.steps.adamw import is_adam
from entropy_probe.steps.copied import optimizer_name

ERRORS = "Errors are from the evaluation rollouts alone; that of the whole update batch is from both batches."


class Settings(record.Settings):
    """Which prompts to leave out.

    Attributes:
        prompts: one list of prompt ids per scenario.
    """

    prompts: tuple[tuple[int, ...], ...] = Field(min_length=1, examples=[[[3], [5, 8]]])


class Scenario(Record):
    """The step without some prompts.

    Attributes:
        left_out: their ids.
        predicted: the first-order change of that step, with the error from the evaluation rollouts.
        difference: from that of the whole batch's step, with the error of the paired difference.
        clip_factor: what clipping multiplies that gradient by.
    """

    left_out: tuple[int, ...]
    predicted: Estimate
    difference: Estimate
    clip_factor: float


class Answer(SavedRecord):
    """The first-order change without some prompts, one scenario after the other.

    Errors are from the evaluation rollouts; the update batch is what the question is about.

    Attributes:
        whole: the change of the step on the whole batch.
        scenarios: the others.
    """

    kept: ClassVar = Kept("answers/without_prompts.json", "what-if", "run", "ask again")
    schema_version: Literal[1] = 1
    whole: Predicted
    scenarios: tuple[Scenario, ...]


def check(policy: Policy, update: UpdateBatch, settings: Settings) -> None:
    """Make sure that the step divides over prompts, and that each scenario leaves some of them.

    Raises:
        ValueError: for prompts that the update batch does not have or has no others than, or an optimizer whose step
            is taken on copies.
    """
    if policy.config.geometry != "frozen" and not is_adam(policy.optimizer):
        raise ValueError(
            "without_prompts: expected torch.optim.AdamW or Adam, whose step divides over prompts, got "
            f"{optimizer_name(policy.optimizer)}; leave the question out, or set geometry: frozen with "
            "identity_if_coverage_below"
        )
    known = update.rollouts.prompt_ids.unique().tolist()
    for ids in settings.prompts:
        strange = sorted(set(ids) - set(known))
        if strange or not ids or len(set(ids)) == len(known):
            got = f"{strange[0]}" if strange else "none" if not ids else "all of them"
            raise ValueError(
                f"without_prompts.prompts: expected some of the {len(known)} prompt ids of the update batch, "
                f"{', '.join(map(str, known[:8]))}{' …' if len(known) > 8 else ''}, but not all, got {got}"
            )


def run(prediction: Prediction, settings: Settings) -> Answer:
    """The change of the step without each list of prompts, from one more pass over the evaluation batch."""
    plan, known = prediction.plan, prediction.plan.batch.update.rollouts.prompt_ids.unique()
    steps = [step_without(plan, torch.searchsorted(known, torch.tensor(sorted(set(ids))))) for ids in settings.prompts]
    moves = [{name: step.delta[name] - x for name, x in plan.step.delta.items()} for step in steps]
    scenarios = []
    for ids, step, difference in zip(settings.prompts, steps, step_changes(prediction, moves), strict=True):
        predicted, gap = (
            Estimate(**estimate_fields(plan.policy, x, plan.evaluation.clusters))
            for x in (prediction.change + difference, difference)
        )
        factor = step.gradient.factor
        scenarios.append(Scenario(left_out=ids, predicted=predicted, difference=gap, clip_factor=factor))
    return Answer(whole=predicted_record(prediction), scenarios=tuple(scenarios))


def step_changes(prediction: Prediction, moves: Sequence[NamedVector]) -> list[FirstOrder]:
    """The first-order change by each of some parameter changes, from one pass over the evaluation batch."""
    plan, before, evaluation = prediction.plan, prediction.plan.before, prediction.plan.evaluation
    with plan.policy.clock.phase("what if") as progress:
        side = Side(entropy_surrogate(plan), directions=moves)
        given = (plan.policy, evaluation.own, evaluation.local, side)
        dots = over_clusters(
            plan.policy, evaluation.local, differentiate(*given, hooks=plan.hooks, progress=progress, total=False).dots
        )
    lengths = torch.zeros(len(moves), dtype=torch.float64)
    if before.lengths is not None and prediction.length_slope is not None:
        lengths = before.lengths.along(moves, prediction.length_slope, plan.policy.ranks)
    return [first_order(dots[k], before.sums.size, before.entropy, float(lengths[k])) for k in range(len(moves))]


def section(answer: Answer) -> Section:
    """The scenarios, beside the whole batch's step."""
    rows = [Row("whole update batch", written(answer.whole))]
    for scenario in answer.scenarios:
        noun, ids = "prompts" if len(scenario.left_out) > 1 else "prompt", ", ".join(map(str, scenario.left_out))
        rows.append(Row(f"without {noun} {ids}", written(scenario.predicted)))
        rows.append(Row("difference", written(scenario.difference), indent=True))
    blocks = (Rows(tuple(rows), answer.whole.unit),)
    return Section("Without some prompts", "without_prompts", "What if", sentences=(ERRORS,), blocks=blocks)
