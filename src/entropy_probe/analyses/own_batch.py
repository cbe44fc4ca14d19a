"""The batch of the step as its own evaluation batch, in the optimizer's own geometry. No other rollouts are needed.

Formulas: ``docs/theory.md``, "One batch".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.analyses.admission import draws_of
from entropy_probe.analyses.batches import EvaluationBatch, UpdateBatch, admitted
from entropy_probe.analyses.gradient import differentiate, over_clusters
from entropy_probe.analyses.measure import Measured, chosen_part, measure, measure_taken, measured_part, taken
from entropy_probe.analyses.plan import Plan, plan
from entropy_probe.analyses.policy import Policy
from entropy_probe.analyses.predict import (
    Prediction,
    directions_beside,
    entropy_surrogate,
    length_changes,
    way_to_rest,
)
from entropy_probe.estimators import first_order as fo
from entropy_probe.estimators.own_batch import LeftOut, pair_contributions
from entropy_probe.estimators.realized import Change
from entropy_probe.estimators.uncertainty import Sampled
from entropy_probe.gradients.cross import own_products
from entropy_probe.gradients.leave_out import by_name, reduced_gradient
from entropy_probe.gradients.per_sample import SampleGradients, Side, stored_bytes
from entropy_probe.gradients.rows import dot_rows, flat
from entropy_probe.named import NamedVector, add, scale
from entropy_probe.parallel.batch import LocalRows
from entropy_probe.results.note import NoteKind
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.isolation import parameters_at
from entropy_probe.steps.adamw import Gradient, clip_gradient
from entropy_probe.steps.copied import STEP_ON_COPIES, optimizer_name
from entropy_probe.steps.plan import scaled, unrounded_step
from entropy_probe.types import Clusters, TokenScores

USED_BEFORE = NoteKind(
    "used_before",
    "the policy has moved since these responses were sampled, by {gap:.2g} nats per token: where earlier steps were "
    "taken on them, momentum has their gradients already, and its part is biased as pairs of a prompt with itself are",
    "Trust the first step on each batch, or give evaluation rollouts.",
)
MAX_GAP = 1e-3
"""Between the log-probabilities at sampling and now, nats per token: what engines differ by without a step."""


@dataclass(frozen=True, eq=False)
class OwnPrediction(Prediction):
    """The prediction from the batch of the step itself; ``change`` and ``parts`` have their errors given this step.

    ``by_prompt`` is over pairs of different prompts, the step's denominators and clipping held.

    Attributes:
        all_pairs: the change with what each prompt's own gradient does to it, as the realized change has it.
        of_update: influence of each prompt's gradient on the change, ``[B]``.
        committed_pairs: ``committed`` with what each prompt's own gradient does to it.
    """

    all_pairs: fo.FirstOrder
    of_update: Float[Tensor, " B"]
    committed_pairs: fo.FirstOrder | None = None

    @property
    def at_rest(self) -> OwnPrediction:
        """The change by the step and all that momentum alone does after it."""
        if self.committed is None or self.committed_pairs is None:
            return self
        return replace(super().at_rest, all_pairs=self.all_pairs + self.committed_pairs)

    @property
    def influence(self) -> Float[Tensor, " B"]:
        """Influence of each prompt on the change, over batches of this kind."""
        return self.change.influence + self.of_update


def admit_own(policy: Policy, batch: Rollouts, gradient: Gradient | None = None) -> tuple[UpdateBatch, EvaluationBatch]:
    """The batch in both of its roles, and a gradient beside it that ranks must agree on; its clusters are prompts.

    Raises:
        ValueError: for unusable rollouts, or ranks that were given different ones.
    """
    given = batch.cpu()
    rollouts = admitted(policy, given, "batch")
    prompts = Clusters.prompts(rollouts.prompt_ids)
    policy.check_ranks_agree(gradient, batch=rollouts)
    local = LocalRows.of(rollouts, prompts, prompts, policy.ranks)
    own = local.select(rollouts)
    return (
        UpdateBatch(given, rollouts, prompts, prompts, local, own),
        EvaluationBatch(rollouts, prompts, "prompt", draws_of(rollouts), local, own, is_update=True),
    )


def predict_own(policy: Policy, batch: Rollouts, clipped: Gradient | None = None) -> OwnPrediction:
    """The first-order change of the policy's entropy by the next step on a batch, from that batch.

    Args:
        policy: whose step it is.
        batch: the batch it is taken on.
        clipped: the trainer's own gradient of it, which the step is then taken with as it is.

    Raises:
        ValueError: for fewer than three prompts, rollouts of another policy that would have to be reweighted, or as
            :func:`~entropy_probe.analyses.predict.plan`.
    """
    if policy.config.geometry == "frozen":
        raise ValueError(
            "geometry: expected adamw for a step that is judged on its own batch here, got frozen, of which one_batch "
            "has the U-statistic; change it, or give evaluation rollouts"
        )
    return own_prediction(plan(policy, *admit_own(policy, batch, clipped), clipped=clipped))


def own_prediction(planned: Plan, horizon: int | None = None) -> OwnPrediction:
    """The first-order change by a step that was planned on its own batch.

    Args:
        planned: the step.
        horizon: how many tokens after a changed one count; all by default.

    Raises:
        ValueError: as :func:`predict_own`.
    """
    policy = planned.policy
    if planned.before.scores.log_weights is not None:
        raise ValueError(
            "one batch: expected rollouts of the policy itself, got those of another: the update takes them as "
            "they are, so they cannot be reweighted; predict from two batches"
        )
    if horizon is None:
        _note_used_before(planned)
    step, before, number = planned.step, planned.before, len(planned.step.components)
    beside = directions_beside(planned, horizon, later=policy.config.coast)
    directions = [*step.components.values(), *beside.directions]
    slope, own, across = _slope(planned, horizon, directions, beside.later)
    along = over_clusters(policy, planned.evaluation.local, slope.dots)
    length_slope, lengths = length_changes(planned, directions, horizon)
    dots, size = dict(zip(step.components, along[:number], strict=True)), before.sums.size
    left_out = LeftOut(own[0], across[0] / len(size))
    responds = "step" if step.gradient_scale is None else "gradient"
    corrected = {**dots, responds: dots[responds] - left_out.self_influence}

    def first_order(contributions: Tensor, longer: float) -> fo.FirstOrder:
        return fo.first_order(contributions, size, before.entropy, longer)

    parts = {name: first_order(corrected[name], float(lengths[k])) for k, name in enumerate(corrected)}
    of_update = len(size) / size.sum() * (left_out.of_update - left_out.of_update.mean())
    origins, pairs = beside.changes([first_order(along[k], float(lengths[k])) for k in range(number, len(along))])
    committed, by_prompt, longer = None, None, float(lengths[:number].sum())
    if pairs is not None:  # the moments have this batch's gradient after the step
        later = along[-1] - LeftOut(own[-1], across[-1] / len(size)).self_influence
        committed = first_order(later, float(lengths[-1]))
    if step.gradient_scale is None:
        policy.log.notes.append(STEP_ON_COPIES(optimizer=optimizer_name(policy.optimizer), blocks=len(size)))
    else:
        by_prompt = pair_contributions(across[1], own[1]) / size.sum()
    return OwnPrediction(
        planned,
        slope,
        length_slope,
        first_order(torch.stack([*corrected.values()]).sum(0), longer),
        {} if by_prompt is None else parts,
        by_prompt,
        Sampled(0.0, of_update).standard_error,
        committed,
        all_pairs=first_order(torch.stack([*dots.values()]).sum(0), longer),
        of_update=of_update,
        committed_pairs=pairs,
        origins=origins,
        horizon=horizon,
        alone=beside.alone,
    )


def measure_own(prediction: OwnPrediction) -> Measured:
    """The realized change on the batch of the step, less the first-order influence of its responses on themselves."""
    return without_own(prediction, measure(prediction.plan))


def measure_own_taken(prediction: OwnPrediction) -> Measured:
    """The realized change of the step that the optimizer has taken since, on its batch.

    The prediction, and what the step does beyond first order on a part of the prompts: nearly all of the spread of the
    change is that of first order, which is known of every prompt.
    """
    plan, change = prediction.plan, prediction.change
    config, (part, rows) = plan.policy.config, chosen_part(plan.evaluation)
    if config.realized != "per_decision" or config.on_low_ess != "refuse" or len(part) == len(change.influence):
        return without_own(prediction, measure_taken(plan))
    measurement, beyond = measured_part(plan, prediction.all_pairs, part, rows)
    if beyond is None:
        return taken(plan, measurement)
    whole = Change(change.value + beyond.value, change.influence + beyond.influence, change.length_change)
    return taken(plan, replace(measurement, change=whole, beyond=beyond))


def without_own(prediction: OwnPrediction, measured: Measured, factor: float = 1.0) -> Measured:
    """What was measured at ``factor`` times the rate, less the first-order influence of the responses on themselves."""
    change = measured.measurement.change
    if change is None:
        return measured
    own = prediction.all_pairs - prediction.change
    value, influence = change.value - factor * own.value, change.influence - factor * own.influence
    corrected = Change(value, influence, change.size_change)
    return replace(measured, measurement=replace(measured.measurement, change=corrected))


def scores_without_own(prediction: OwnPrediction, some: Tensor) -> tuple[TokenScores, TokenScores] | None:
    """Scores after the step less what each prompt's own gradient does to it, and after the opposite for some prompts.

    Along ``Delta - delta_u + mean delta`` for the responses of prompt u. The second are 0 but for the prompts ``some``.
    ``None`` where the prompts' gradients were not kept, parameters are sharded, or in 16 bits, which round these steps
    away.
    """
    planned, policy = prediction.plan, prediction.plan.policy
    stored, local, own = planned.batch.gradient.stored, planned.evaluation.local, planned.evaluation.own
    if stored is None or policy.scorer.sharded or any(p.itemsize < 4 for p in policy.parameters.values()):
        return None
    parameters, make = policy.parameters, _vectors(planned)

    def moved_by(unit: int) -> NamedVector:
        return make(unit, by_name(stored[unit], parameters))[0]

    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    with policy.on_rank(local):
        for unit in range(len(stored)):
            total = add(total, moved_by(unit))
    total, count = policy.ranks.sum_vector(total, parameters), planned.evaluation.clusters.count
    step = add(planned.step.delta, scale(1 / count, {n: x for n, x in total.items() if x is not None}))
    tables = [torch.zeros(2, *own.response_mask.shape, dtype=torch.float64) for _ in range(2)]
    with policy.clock.phase("score steps without a prompt") as progress, policy.on_rank(local):
        for unit in range(len(stored)):
            rows, without = (local.local_clusters == unit).nonzero()[:, 0], moved_by(unit)
            signs = (1, -1) if bool(torch.isin(local.clusters.index[rows[0]], some)) else (1,)
            for sign, table in zip(signs, tables, strict=False):
                at = {name: p + sign * (step[name] - without[name]) for name, p in parameters.items()}
                scores = _scored_at(policy, at, own, rows)
                table[:, rows] = torch.stack([scores.logprobs, scores.entropies]).double()
            progress(unit + 1, len(stored))
    there, opposite = (TokenScores(s, h, own.response_mask) for s, h in tables)
    return there, opposite


def _scored_at(policy: Policy, parameters: NamedVector, own: Rollouts, rows: Tensor) -> TokenScores:
    moved = {name: parameters[name].detach().to(p.dtype) for name, p in policy.parameters.items()}
    with parameters_at(policy.parameters, moved):
        return policy.scorer.score(own.select(rows))


def _note_used_before(planned: Plan) -> None:
    policy, rollouts, scores = planned.policy, planned.evaluation.own, planned.before.scores
    if planned.evaluation.rollouts.old_logprobs is None or rollouts.old_logprobs is None:
        return
    gaps = (rollouts.old_logprobs.double() - scores.logprobs.double()).abs()[rollouts.response_mask]
    total, tokens = policy.ranks.sum(torch.tensor([gaps.sum().item(), float(gaps.numel())])).tolist()
    if total / tokens > MAX_GAP:
        policy.log.notes.append(USED_BEFORE(gap=total / tokens))


def _slope(
    planned: Plan, horizon: int | None, directions: Sequence[NamedVector], later: NamedVector | None
) -> tuple[SampleGradients, Float[Tensor, "K B"], Float[Tensor, "K B"]]:
    """The entropy gradient along some directions, and its products with what each prompt does to the step.

    Returns:
        The gradient, and with each of a prompt's vectors (:func:`_vectors`) the product of the prompt's entropy
        gradient and that of the sum of all.
    """
    policy, evaluation, batch = planned.policy, planned.evaluation, planned.batch
    surrogate = entropy_surrogate(planned, horizon)
    given, stored, local = (policy, evaluation.own, evaluation.local), batch.gradient.stored, evaluation.local
    pairs, make = None, _vectors(planned, later)
    number = 1 + (planned.step.gradient_scale is not None) + (later is not None)
    size = stored_bytes(policy.parameters, (1 + number) * local.clusters.count)
    if stored is not None and size <= policy.config.max_stored_gradient_gib * 2**30:
        with policy.clock.phase("steps without a prompt"), policy.on_rank(local):
            pairs = stored.new_empty(number, *stored.shape)
            for unit, row in enumerate(stored):
                for k, vector in enumerate(make(unit, by_name(row, policy.parameters))):
                    pairs[k, unit] = flat(vector, policy.parameters)
    with policy.clock.phase("evaluation gradient") as progress:
        side = Side(surrogate, directions, pair_with=pairs)
        slope = differentiate(*given, side, hooks=planned.hooks, progress=progress, kept=batch.kept)
    if pairs is not None:
        total = {n: torch.zeros_like(p) if (x := slope.total[n]) is None else x for n, p in policy.parameters.items()}
        products = torch.stack([slope.paired, dot_rows(pairs, total, policy.parameters)])
    else:
        with policy.clock.phase("own products"), policy.on_rank(local):
            trained = (policy.scorer, policy.parameters, evaluation.own, local.local_clusters)
            products = own_products(*trained, surrogate, batch.loss, slope.total, make)
    own, across = over_clusters(policy, local, products)
    return slope, own, across


def _vectors(planned: Plan, later: NamedVector | None = None) -> Callable[[int, NamedVector], Sequence[NamedVector]]:
    """What a prompt does to the step, by its number on this rank and its share of the gradient.

    By how much the step changes without the prompt; where it has parts, the prompt's share of the gradient part; and by
    how much ``later``, the way to rest after the step, changes without it.
    """
    policy, step, update = planned.policy, planned.step, planned.batch.update
    config, trained, total = policy.config, (policy.parameters, policy.optimizer), planned.batch.gradient.total
    if planned.batch.agreement is not None:  # the trainer's own gradient, as it was before clipping
        total = {name: None if g is None else g / step.gradient.factor for name, g in step.gradient.values.items()}
    whole = unrounded_step(*trained, total, config)
    tokens = update.given.response_lengths.double()
    of_loss = update.prompts.total(tokens if config.loss.per_token else torch.ones_like(tokens))
    rest = 1 - of_loss / of_loss.sum()
    factors = torch.where(rest > 0, 1 / rest, 1.0)[update.local.present_clusters].tolist()

    def vectors(unit: int, share: NamedVector) -> list[NamedVector]:
        reduced = reduced_gradient(total, share, factors[unit])
        others = unrounded_step(*trained, reduced, config)
        made: list[NamedVector] = [{name: move - others[name] for name, move in whole.items()}]
        if step.gradient_scale is not None:
            shares = {name: share.get(name) for name in whole}
            made.append(scaled(shares, step.gradient_scale, -step.gradient.factor))
        if later is not None:
            way = way_to_rest(policy, clip_gradient(reduced, config.max_grad_norm).values)
            if way is None:
                raise ValueError(
                    "coast: expected momentum to come to rest without any prompt as with all, got one without which it "
                    "does not; set probe.coast to false"
                )
            made.append({name: move - way[name] for name, move in later.items()})
        return made

    return vectors
