"""The prediction: the next step, and what it does to the policy's entropy to first order.

Everything that is asked of a step is a function of one of two values: :class:`Plan`, the step, and
:class:`Prediction`, the step with the entropy's slope along it. Formulas: ``docs/theory.md``, "The
first-order change" and "The step".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.analyses.batches import EvaluationBatch, UpdateBatch
from entropy_probe.analyses.before import Before, LengthSample, entropy_coefficients
from entropy_probe.analyses.gradient import differentiate, over_clusters, update_gradient, update_loss
from entropy_probe.analyses.not_modelled import of_frozen_geometry, of_rounding
from entropy_probe.analyses.overlap import SHARED, Contents, shared
from entropy_probe.analyses.policy import Policy
from entropy_probe.estimators import first_order as fo
from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.estimators.jackknife import jackknife_standard_error
from entropy_probe.gradients.hooks import Hooks
from entropy_probe.gradients.leave_out import kept_gradient, reduced_gradients, renormalisation
from entropy_probe.gradients.per_sample import SampleGradients, Side
from entropy_probe.named import dot
from entropy_probe.parallel.batch import add_up
from entropy_probe.results.note import NoteKind
from entropy_probe.results.probe import PreconditionerReport
from entropy_probe.steps.adamw import clip_gradient
from entropy_probe.steps.copied import STEP_ON_COPIES, copied_step, moved, optimizer_name
from entropy_probe.steps.plan import PlannedStep, plan_step, scaled
from entropy_probe.types import TokenCoefficients

__all__ = ["Plan", "Prediction", "entropy_surrogate", "plan", "predict", "prompt_contributions", "step_on"]

NO_HISTORY = NoteKind(
    "no_history",
    "se_update holds Adam's denominators fixed, but for parameters without a history the update batch itself sets "
    "them: the error from the update batch is overstated",
    "Trust the error from the evaluation rollouts; probe a checkpoint some steps later for both.",
)
CLIPPED = NoteKind(
    "clipped",
    "clipping scales the update gradient by {factor:.3g}; se_update holds that factor fixed, which overstates the "
    "error from the update batch when the factor is small",
    "Compare with probe.max_grad_norm: null to see what clipping does.",
)


@dataclass(frozen=True, eq=False)
class Plan:
    """The next step, and all that leads to it.

    Attributes:
        policy: whose step it is.
        update: the batch it is taken on.
        evaluation: the batch that entropy is taken on.
        before: what that is before the step.
        loss: coefficients of this rank's rows of the update batch.
        hooks: where per-sample gradients are read off the layers.
        gradient: of the loss, with each prompt's share where these are kept.
        step: the parameter change, in parts.
    """

    policy: Policy
    update: UpdateBatch
    evaluation: EvaluationBatch
    before: Before
    loss: TokenCoefficients
    hooks: Hooks | None
    gradient: SampleGradients
    step: PlannedStep


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the next step does to the entropy, to first order.

    Attributes:
        plan: the step.
        slope: the gradient of the entropy of the evaluation batch, times the batch's weight, with every cluster's inner
            products with the parts of the step.
        length_slope: the gradient of the number of tokens of some sequences; ``None`` for entropies per sequence.
        change: the first-order change.
        parts: its parts by those of the step; none for a step that is taken on copies.
        by_prompt: what each update prompt adds to the gradient part, ``[B]``; ``None`` likewise.
        se_update: the error from the update batch.
    """

    plan: Plan
    slope: SampleGradients
    length_slope: SampleGradients | None
    change: fo.FirstOrder
    parts: dict[str, fo.FirstOrder]
    by_prompt: Float[Tensor, " B"] | None
    se_update: float


def plan(policy: Policy, update: UpdateBatch, evaluation: EvaluationBatch, *, shares: bool = True) -> Plan:
    """Score the evaluation batch, differentiate the loss, and plan the step.

    Args:
        policy: whose step it is.
        update: the batch it is taken on.
        evaluation: the batch that entropy is taken on.
        shares: keep each update prompt's share of the gradient, if they fit.

    Raises:
        ValueError: for rollouts that the policy or the settings refuse, or numbers that are not finite.
    """
    config, trained = policy.config, (policy.parameters, policy.optimizer)
    policy.prepare(update.rollouts, evaluation.rollouts)
    # first, since it refuses batches that lack what the loss takes
    loss = update_loss(policy, update, checked=evaluation.is_update)
    before = _before(policy, evaluation)
    if not evaluation.is_update:
        _note_shared_sequences(policy, update, evaluation, before)
    hooks = policy.choose_hooks(update.rollouts) if shares else None
    checked = evaluation.is_update or config.loss.needs_scores
    gradient = update_gradient(policy, update, loss, store=shares, hooks=hooks, scored=checked)
    step = plan_step(*trained, gradient.total, config, policy.frozen_scale)
    policy.log.not_modelled += of_rounding(*trained, step.delta)
    if config.geometry == "frozen":
        policy.log.not_modelled += of_frozen_geometry(*trained, step.gradient.norm, config.max_grad_norm)
    return Plan(policy, update, evaluation, before, loss, hooks, gradient, step)


def predict(policy: Policy, update: UpdateBatch, evaluation: EvaluationBatch) -> Prediction:
    """The first-order change of the entropy of ``evaluation`` by the next step on ``update``.

    Raises:
        ValueError: as :func:`plan`.
    """
    planned = plan(policy, update, evaluation)
    step, before, sizes = planned.step, planned.before, planned.before.sums.size
    slope = _entropy_slope(planned)
    dots = over_clusters(policy, evaluation.local, slope.dots)
    length_slope, lengths = _length_changes(planned)
    change = fo.first_order(dots.sum(0), sizes, before.entropy, float(lengths.sum()))
    if step.gradient_scale is None:
        se_update = _jackknife(planned, slope, sizes.sum().item())
        return Prediction(planned, slope, length_slope, change, {}, None, se_update)
    parts = {
        name: fo.first_order(dots[k], sizes, before.entropy, float(lengths[k]))
        for k, name in enumerate(step.components)
    }
    by_prompt = prompt_contributions(planned, slope, sizes.sum().item())
    coarsest = max(torch.finfo(p.dtype).eps for p in policy.parameters.values())
    fo.check_sums(by_prompt, parts["gradient"].value, max(1e-3, 8 * coarsest))
    _note_what_the_update_error_holds_fixed(planned)
    return Prediction(planned, slope, length_slope, change, parts, by_prompt, fo.update_standard_error(by_prompt))


def _before(policy: Policy, evaluation: EvaluationBatch) -> Before:
    """Score the evaluation batch at the checkpoint, and check it against the policy."""
    config, ranks, local, rollouts = policy.config, policy.ranks, evaluation.local, evaluation.rollouts
    scores = policy.reference_scores(rollouts, local, "score evaluation")
    scores = policy.check_rollouts(evaluation.role, scores, local, rollouts)
    positions = add_up(ranks, PositionSums.of(scores))
    sums = add_up(ranks, fo.entropy(scores, local.clusters, config.normalization, config.entropy))
    lengths = None
    if config.normalization == "token":
        lengths = LengthSample.of(rollouts, evaluation.clusters, local, scores, positions)
    return Before(scores, positions, sums, sums.ratio(), lengths)


def _note_shared_sequences(policy: Policy, update: UpdateBatch, evaluation: EvaluationBatch, before: Before) -> None:
    logprobs = policy.sequence_logprobs(evaluation.local, before.scores)
    both = shared(Contents.of(evaluation.rollouts), logprobs, Contents.of(update.rollouts))
    if both.significant:
        numbers = {"shared": both.sequences, "sequences": len(evaluation.rollouts), "expected": both.expected}
        policy.log.notes.append(SHARED(**numbers))


def entropy_surrogate(planned: Plan) -> TokenCoefficients:
    """What the entropy is differentiated by, of this rank's rows of the evaluation batch."""
    evaluation, before = planned.evaluation, planned.before
    local, draws = evaluation.local, evaluation.draws.select(evaluation.local.rows)
    config = planned.policy.config
    return entropy_coefficients(
        before.scores, evaluation.own.prompt_ids, local.clusters, draws, before.positions, config
    )


def _entropy_slope(planned: Plan) -> SampleGradients:
    """The entropy gradient, along the parts of the step."""
    surrogate, evaluation = entropy_surrogate(planned), planned.evaluation
    with planned.policy.clock.phase("evaluation gradient") as progress:
        side = Side(surrogate, directions=list(planned.step.components.values()))
        return differentiate(
            planned.policy, evaluation.own, evaluation.local, side, hooks=planned.hooks, progress=progress
        )


def _length_changes(planned: Plan) -> tuple[SampleGradients | None, Float[Tensor, " K"]]:
    """The relative first-order change of the mean length by each part of the step; 0 per sequence."""
    lengths, steps, policy = planned.before.lengths, list(planned.step.components.values()), planned.policy
    if lengths is None:
        return None, torch.zeros(len(steps), dtype=torch.float64)
    own = planned.evaluation.own.select(lengths.rows)
    with policy.clock.phase("length gradient") as progress:
        side = Side(lengths.coefficients())
        slope = differentiate(policy, own, lengths.local, side, progress=progress, total=False)
    return slope, lengths.along(steps, slope, policy.ranks)


def prompt_contributions(planned: Plan, slope: SampleGradients, total_weight: float) -> Float[Tensor, " B"]:
    """What each update prompt adds, through the gradient part of the step, to a mean that has this slope.

    Args:
        planned: the step, in closed form.
        slope: the gradient of a sum over some batch.
        total_weight: the batch's weight, which the sum is divided by.
    """
    policy, update, step, gradient = planned.policy, planned.update, planned.step, planned.gradient
    assert step.gradient_scale is not None
    direction = scaled(slope.total, step.gradient_scale, -step.gradient.factor / total_weight)
    with policy.clock.phase("update error") as progress:
        if gradient.stored is not None:
            return over_clusters(policy, update.local, gradient.dot_stored(direction))
        side = Side(planned.loss, is_loss=True, directions=[direction])
        again = differentiate(
            policy, update.own, update.local, side, hooks=planned.hooks, progress=progress, total=False
        )
        return over_clusters(policy, update.local, again.dots[0])


def step_on(planned: Plan, kept: Int[Tensor, " K"], factor: float = 1.0) -> PlannedStep:
    """The step on some prompts of the update batch, in the geometry of the planned one.

    Args:
        planned: the step on all of them, in closed form.
        kept: which prompts, numbered by increasing id.
        factor: of every token's weight in the loss of the whole batch.
    """
    policy, update, local, step = planned.policy, planned.update, planned.update.local, planned.step
    own = torch.isin(local.present_clusters, kept).nonzero()[:, 0]
    given = (policy.scorer, policy.parameters, update.own, local.local_clusters, own, planned.loss, planned.gradient)
    with policy.on_rank(local):
        gradient = kept_gradient(*given)
    gradient = policy.ranks.sum_vector(gradient, policy.parameters)
    gradient = {name: None if g is None else factor * g for name, g in gradient.items()}

    def frozen() -> tuple[dict[str, Tensor], PreconditionerReport]:
        assert step.gradient_scale is not None
        assert step.preconditioner is not None
        return step.gradient_scale, step.preconditioner

    return plan_step(policy.parameters, policy.optimizer, gradient, policy.config, frozen)


def _jackknife(planned: Plan, slope: SampleGradients, total_weight: float) -> float:
    """The error from the update batch of a step that is taken on copies: leave out a block, step again."""
    policy, update, step = planned.policy, planned.update, planned.step
    config, blocks, local = policy.config, update.shares, update.local
    policy.log.notes.append(STEP_ON_COPIES(optimizer=optimizer_name(policy.optimizer), blocks=blocks.count))
    factors = renormalisation(update.given, blocks.index, config.loss)
    own_factors = [factors[block] for block in local.present_clusters.tolist()]
    direction = {
        name: torch.zeros_like(p) if (x := slope.total[name]) is None else x / total_weight
        for name, p in step.delta.items()
    }
    left_out = []
    with policy.clock.phase("update error") as progress, policy.on_rank(local):
        for reduced in reduced_gradients(
            policy.scorer,
            policy.parameters,
            update.own,
            local.local_clusters,
            planned.loss,
            planned.gradient,
            own_factors,
        ):
            clipped = clip_gradient(reduced, config.max_grad_norm).values
            stepped = copied_step(policy.parameters, policy.optimizer, clipped, config.learning_rate)
            left_out.append(dot(direction, moved(policy.parameters, stepped)))
            progress(len(left_out), len(own_factors))
    changes = over_clusters(policy, local, torch.tensor(left_out, dtype=torch.float64))
    sizes = torch.stack([update.prompts.index, blocks.index], 1).unique(dim=0)[:, 1].bincount()
    return jackknife_standard_error(dot(direction, step.delta), changes, sizes)


def _note_what_the_update_error_holds_fixed(planned: Plan) -> None:
    policy, step = planned.policy, planned.step
    if policy.config.geometry == "adamw" and any(not policy.optimizer.state.get(p) for p in policy.parameters.values()):
        policy.log.notes.append(NO_HISTORY())
    if step.gradient.factor < 1:
        policy.log.notes.append(CLIPPED(factor=step.gradient.factor))
