"""The profile over horizons, from scores at the checkpoint, after the step, and after the opposite step.

The opposite step is one more scoring of the evaluation batch; half the difference of the two gives the slope of every
token along the step, from which the prediction at every horizon is a sum. One batch takes two more, without what each
prompt did to the step. Formulas: ``docs/theory.md``, "A horizon".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from entropy_probe.analyses.assemble import estimate_fields
from entropy_probe.analyses.measure import Measured
from entropy_probe.analyses.own_batch import OwnPrediction, slopes_without_own
from entropy_probe.analyses.predict import Prediction, predict
from entropy_probe.config import ProbeConfig
from entropy_probe.estimators import horizon as estimator
from entropy_probe.estimators.first_order import FirstOrder, first_order
from entropy_probe.estimators.realized import Change, change, per_decision
from entropy_probe.estimators.uncertainty import ClusterSums, Sampled, in_chunks
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


def measure_horizons(prediction: Prediction, measured: Measured) -> Horizons | None:
    """The profile of a step that was predicted and scored; ``None`` where the settings leave it out."""
    plan, config = prediction.plan, prediction.plan.policy.config
    if not _has_horizons(config):
        return None
    after = measured.measurement.after
    without_own = slopes_without_own(prediction) if isinstance(prediction, OwnPrediction) else None
    if isinstance(prediction, OwnPrediction) and without_own is None:
        plan.policy.log.notes.append(NO_PROFILE())
        return None
    slopes = estimator.central_slopes(after, _opposite(prediction))
    longest = int(plan.evaluation.rollouts.response_lengths.max())
    horizons = estimator.horizons(longest, config.horizon if isinstance(config.horizon, int) else None)
    along = [_within(prediction, slopes, after, horizon) for horizon in horizons]
    if isinstance(prediction, OwnPrediction) and without_own is not None:
        along = _less_own(prediction, without_own, horizons, along)
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
    prediction: OwnPrediction, slopes: TokenScores, horizons: Sequence[int | None], along: Sequence[_Within]
) -> list[_Within]:
    """Without the first-order influence of the responses on themselves, in both changes."""
    predicted = [_predicted(prediction, slopes, horizon) for horizon in horizons]
    own = [each.predicted - corrected for each, corrected in zip(along, predicted, strict=True)]
    # of the whole it is known exactly, as the prediction is
    gap = prediction.all_pairs - prediction.change - own[-1]
    return [
        _Within(corrected, each.realized - of_own - gap, each.ess_fraction)
        for each, corrected, of_own in zip(along, predicted, own, strict=True)
    ]


def stated(prediction: Prediction) -> Prediction:
    """The prediction within the horizon that states the change, where that is not the whole response.

    That is ``config.horizon`` where it is a number. By default it is the whole response where its interval excludes 0,
    and else the shortest that no longer one contradicts; for the profile every token's slope along the step is taken in
    forward mode, which does not depend on the size of the step.
    """
    plan, config, change = prediction.plan, prediction.plan.policy.config, prediction.change
    if not _has_horizons(config):
        return prediction
    if isinstance(config.horizon, int):
        return predict(plan, config.horizon)
    if _estimate(prediction, change).distinguishable:
        return prediction
    policy, local = plan.policy, plan.evaluation.local
    with policy.clock.phase("profile of horizons") as progress, policy.on_rank(local):
        rollouts, delta = plan.evaluation.rollouts, plan.step.delta
        method = slope_method(policy.scorer, rollouts, policy.parameters, delta, SLOPE_TOLERANCE)
        slopes = method.along(delta, rollouts.select(local.rows), progress).slopes
    ladder = estimator.horizons(int(plan.evaluation.rollouts.response_lengths.max()))
    along = [_predicted(prediction, slopes, horizon) for horizon in ladder]
    horizon = ladder[estimator.settled(along, critical_value(plan.evaluation.clusters.count - 1))]
    return prediction if horizon is None else predict(plan, horizon)


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


def _opposite(prediction: Prediction) -> TokenScores:
    """Scores of this rank's rows after the opposite step."""
    plan, policy = prediction.plan, prediction.plan.policy
    moved = {name: (p.detach() - plan.step.delta[name]).to(p.dtype) for name, p in policy.parameters.items()}
    with (
        parameters_at(policy.parameters, moved),
        policy.clock.phase("score opposite step") as progress,
        policy.on_rank(plan.evaluation.local),
    ):
        return policy.scorer.score(plan.evaluation.own, progress)


def _within(prediction: Prediction, slopes: TokenScores, after: TokenScores, horizon: int | None) -> _Within:
    return _Within(_predicted(prediction, slopes, horizon), *_realized(prediction, after, horizon))


def _predicted(prediction: Prediction, slopes: TokenScores, horizon: int | None) -> FirstOrder:
    """The first-order change within a horizon, from the slope of every token along the step."""
    plan, policy = prediction.plan, prediction.plan.policy
    before, local = plan.before, plan.evaluation.local
    along = torch.zeros(2, local.clusters.count, dtype=torch.float64)
    with policy.ranks.agreeing():
        for rows in in_chunks(local.clusters):
            given = (local.clusters.select(rows), before.positions, policy.config.normalization, horizon)
            along += estimator.first_order_along(before.scores.select(rows), slopes.select(rows), *given)
    contributions, lengths = policy.ranks.sum(along)
    longer = (lengths.sum() / before.sums.size.sum()).item()
    return first_order(contributions, before.sums.size, before.entropy, longer)


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
