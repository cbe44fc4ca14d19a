"""The profile over horizons, from scores at the checkpoint and after the step.

Their differences give the slope of every token along the step up to second order, and the prediction at every horizon
is a sum of the slopes. What second order does to these sums is measured on a part of the batch, which is scored after
the opposite step too. One batch takes one more scoring, without what each prompt did to the step. Formulas:
``docs/theory.md``, "A horizon".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.analyses.assemble import estimate_fields
from entropy_probe.analyses.measure import Measured, chosen_part
from entropy_probe.analyses.own_batch import OwnPrediction, own_prediction, scores_without_own
from entropy_probe.analyses.plan import Plan
from entropy_probe.analyses.predict import Prediction, predict
from entropy_probe.config import ProbeConfig
from entropy_probe.estimators import horizon as estimator
from entropy_probe.estimators.first_order import FirstOrder, first_order
from entropy_probe.estimators.realized import Change, change, per_decision
from entropy_probe.estimators.uncertainty import ClusterSums, Sampled, in_chunks, ratio
from entropy_probe.results.changes import HorizonPoint, Horizons
from entropy_probe.results.estimate import Estimate
from entropy_probe.results.note import NoteKind
from entropy_probe.results.student import critical_value
from entropy_probe.scoring.isolation import parameters_at
from entropy_probe.scoring.slopes import slope_method
from entropy_probe.types import TokenScores

NO_PROFILE = NoteKind(
    "no_profile",
    "no profile over horizons: the prompts' gradients exceed max_stored_gradient_gib, the model is sharded, or what is "
    "trained of it is in 16 bits, which would round single prompts' steps away",
    "Raise probe.max_stored_gradient_gib, or give evaluation rollouts.",
)
SLOPE_TOLERANCE = 1e-3
"""How far forward mode may be off on a sequence, relative to what parameters add; wrong rules are by percents."""


@dataclass(frozen=True, eq=False)
class _Within:
    """Both changes within a horizon, and the effective share of the weights of the realized one."""

    predicted: Sampled
    realized: Sampled
    ess_fraction: float


@dataclass(frozen=True, eq=False)
class _Along:
    """What a step does to the scores of this rank's rows.

    Attributes:
        first: by how much each score changes.
        part: the clusters that second order is measured on.
        rows: places of this rank's rows of these.
        second: what second order does to their scores.
    """

    first: TokenScores
    part: Int[Tensor, " n"]
    rows: Int[Tensor, " m"]
    second: TokenScores


def measure_horizons(prediction: Prediction, measured: Measured) -> Horizons | None:
    """The profile of a step that was predicted and scored; ``None`` where the settings leave it out."""
    plan, config = prediction.plan, prediction.plan.policy.config
    if not _has_horizons(config):
        return None
    after, evaluation, before = measured.measurement.after, plan.evaluation, plan.before.scores
    part, rows = chosen_part(evaluation)
    if isinstance(prediction, OwnPrediction):
        scored = scores_without_own(prediction, part)
        if scored is None:
            plan.policy.log.notes.append(NO_PROFILE())
            return None
        there, opposite = scored[0], scored[1].select(rows)
    else:
        there, opposite = after, _opposite(prediction, rows)
    second = estimator.second_order(before.select(rows), there.select(rows), opposite)
    slopes = _Along(estimator.differences(before, there), part, rows, second)
    longest = int(plan.evaluation.rollouts.response_lengths.max())
    horizons = estimator.horizons(longest, config.horizon if isinstance(config.horizon, int) else None)
    along = [
        _Within(_predicted_along(prediction, slopes, horizon), *_realized(prediction, after, horizon))
        for horizon in horizons
    ]
    if isinstance(prediction, OwnPrediction):
        along = _less_own(prediction, estimator.differences(there, after), horizons, along)
    # the slopes are exact to third order in the step: what they make of the whole is set to the prediction itself
    predicted = [prediction.change - (along[-1].predicted - each.predicted) for each in along]
    realized = [each.realized if each.ess_fraction >= config.min_ess_fraction else None for each in along]
    points = tuple(
        HorizonPoint(
            horizon=horizon,
            predicted=_estimate(prediction, predicted[k]),
            realized=_maybe(prediction, realized[k]),
            increment=_maybe(prediction, predicted[k] - predicted[k - 1]) if k else None,
            beyond=None if horizon is None else _estimate(prediction, predicted[-1] - predicted[k]),
            beyond_realized=None if horizon is None else _maybe(prediction, _minus(realized[-1], realized[k])),
            ess_fraction=along[k].ess_fraction,
        )
        for k, horizon in enumerate(horizons)
    )
    return Horizons(points=points, headline=_headline(config, points, predicted))


def _less_own(
    prediction: OwnPrediction, own: TokenScores, horizons: Sequence[int | None], along: Sequence[_Within]
) -> list[_Within]:
    """Without the first-order influence of the responses on themselves in the realized change, from their slopes."""
    influence = [_predicted(prediction, own, horizon) for horizon in horizons]
    # of the whole it is known exactly, as the prediction is
    gap = prediction.all_pairs - prediction.change - influence[-1]
    return [replace(each, realized=each.realized - of_own - gap) for each, of_own in zip(along, influence, strict=True)]


def stated(prediction: Prediction) -> Prediction:
    """The prediction within the horizon that states the change, where that is not the whole response.

    That is ``config.horizon`` where it is a number. By default it is the whole response where its interval excludes 0,
    and else the shortest that no longer one contradicts; for the profile every token's slope along the step is taken in
    forward mode, which does not depend on the size of the step; by one batch from scores, as the profile of a run.
    """
    plan, config, change = prediction.plan, prediction.plan.policy.config, prediction.change
    within = own_prediction if isinstance(prediction, OwnPrediction) else predict
    if not _has_horizons(config):
        return prediction
    if isinstance(config.horizon, int):
        return within(plan, config.horizon)
    if _estimate(prediction, change).distinguishable:
        return prediction
    slopes = _own_slopes(prediction) if isinstance(prediction, OwnPrediction) else _forward_slopes(plan)
    if slopes is None:
        plan.policy.log.notes.append(NO_PROFILE())
        return prediction
    ladder = estimator.horizons(int(plan.evaluation.rollouts.response_lengths.max()))
    along = [_predicted(prediction, slopes, horizon) for horizon in ladder]
    horizon = ladder[estimator.settled(along, critical_value(plan.evaluation.clusters.count - 1))]
    return prediction if horizon is None else within(plan, horizon)


def _own_slopes(prediction: OwnPrediction) -> TokenScores | None:
    scored = scores_without_own(prediction, torch.arange(prediction.plan.evaluation.clusters.count))
    if scored is None:
        return None
    there, opposite = scored
    both = estimator.differences(opposite, there)
    return replace(both, logprobs=both.logprobs / 2, entropies=both.entropies / 2)


def _forward_slopes(plan: Plan) -> TokenScores:
    policy, local, rollouts, delta = plan.policy, plan.evaluation.local, plan.evaluation.rollouts, plan.step.delta
    with policy.clock.phase("profile of horizons") as progress, policy.on_rank(local):
        method = slope_method(policy.scorer, rollouts, policy.parameters, delta, SLOPE_TOLERANCE)
        return method.along(delta, rollouts.select(local.rows), progress).slopes


def measured_within(prediction: Prediction, measured: Measured) -> Measured:
    """The realized change within the horizon of a prediction, from the scores after the step.

    Refused where too few of the windowed weights are effective, whatever is to be done about weights of the whole.
    """
    if prediction.horizon is None:
        return measured
    realized, share = _realized(prediction, measured.measurement.after, prediction.horizon)
    trusted = share >= prediction.plan.policy.config.min_ess_fraction
    changes = {"change": realized if trusted else None, "diagnosis": "ok" if trusted else "low_ess"}
    return replace(measured, measurement=replace(measured.measurement, estimator="per_decision", **changes))


def _has_horizons(config: ProbeConfig) -> bool:
    """Whether the settings ask for the profile, and their estimators have one."""
    return config.horizon is not None and config.entropy == "rao_blackwell" and config.realized == "per_decision"


def _headline(config: ProbeConfig, points: Sequence[HorizonPoint], changes: Sequence[Sampled]) -> int | None:
    if isinstance(config.horizon, int):
        return config.horizon
    if points[-1].predicted.distinguishable:
        return None
    return points[estimator.settled(changes, critical_value(points[-1].predicted.num_clusters - 1))].horizon


def _minus(one: Sampled | None, other: Sampled | None) -> Sampled | None:
    return None if one is None or other is None else one - other


def _maybe(prediction: Prediction, sampled: Sampled | None) -> Estimate | None:
    return None if sampled is None else _estimate(prediction, sampled)


def _estimate(prediction: Prediction, sampled: Sampled) -> Estimate:
    plan = prediction.plan
    return Estimate(**estimate_fields(plan.policy, sampled, plan.evaluation.clusters))


def _opposite(prediction: Prediction, rows: Int[Tensor, " m"]) -> TokenScores:
    """Scores of some of this rank's rows after the opposite step."""
    plan, policy = prediction.plan, prediction.plan.policy
    moved = {name: (p.detach() - plan.step.delta[name]).to(p.dtype) for name, p in policy.parameters.items()}
    with (
        parameters_at(policy.parameters, moved),
        policy.clock.phase("score opposite step") as progress,
        policy.on_rank(plan.evaluation.local),
    ):
        return policy.scorer.score(plan.evaluation.own.select(rows), progress)


def _predicted_along(prediction: Prediction, slopes: _Along, horizon: int | None) -> Sampled:
    """The first-order change within a horizon, from what a step does to the scores."""
    plan, first = prediction.plan, _predicted(prediction, slopes.first, horizon)
    contributions, _ = _sums_along(prediction, slopes.second, slopes.rows, horizon)
    sizes, count = plan.before.sums.size[slopes.part], plan.evaluation.clusters.count
    return first - ratio(contributions[slopes.part], sizes).among(slopes.part, count)


def _predicted(prediction: Prediction, slopes: TokenScores, horizon: int | None) -> FirstOrder:
    """The first-order change within a horizon, from the slope of every token along the step."""
    before = prediction.plan.before
    contributions, lengths = _sums_along(prediction, slopes, torch.arange(len(slopes.response_mask)), horizon)
    longer = (lengths.sum() / before.sums.size.sum()).item()
    return first_order(contributions, before.sums.size, before.entropy, longer)


def _sums_along(
    prediction: Prediction, slopes: TokenScores, rows: Int[Tensor, " m"], horizon: int | None
) -> Float[Tensor, "2 U"]:
    """What each cluster adds to the first-order changes of entropy and tokens, from slopes of some of the rows."""
    plan, policy = prediction.plan, prediction.plan.policy
    before, clusters = plan.before, plan.evaluation.local.clusters
    along = torch.zeros(2, clusters.count, dtype=torch.float64)
    with policy.ranks.agreeing():
        for some in in_chunks(clusters.select(rows)):
            at = rows[some]
            given = (clusters.select(at), before.positions, policy.config.normalization, horizon)
            along += estimator.first_order_along(before.scores.select(at), slopes.select(some), *given)
    return policy.ranks.sum(along)


def _realized(prediction: Prediction, after: TokenScores, horizon: int | None) -> tuple[Change, float]:
    """The realized change within a horizon, and the effective share of its weights."""
    plan, policy = prediction.plan, prediction.plan.policy
    before, local = plan.before, plan.evaluation.local
    new, weights = torch.zeros(2, local.clusters.count, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    with policy.ranks.agreeing():
        for rows in in_chunks(local.clusters):
            old, later = before.scores.select(rows), after.select(rows)
            given = (local.clusters.select(rows), before.positions, policy.config.normalization, horizon)
            new += per_decision(old, later, *given).table
            weights += estimator.squared_weights(old, later, horizon)
    total, squares, tokens = policy.ranks.sum(weights).tolist()
    return change(ClusterSums(policy.ranks.sum(new)), before.sums), total**2 / (squares * tokens)
