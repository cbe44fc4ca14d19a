"""The next step, and all that leads to it: scores of the evaluation batch, the update gradient, and the optimizer.

Formulas: ``docs/theory.md``, "The step".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from entropy_probe.analyses.batches import EvaluationBatch, UpdateBatch
from entropy_probe.analyses.before import Before, LengthSample
from entropy_probe.analyses.given import GRADIENT_GIVEN, GRADIENTS_DIFFER, NOTABLE_DISTANCE, GivenGradient, agreement
from entropy_probe.analyses.gradient import update_gradient, update_loss
from entropy_probe.analyses.not_modelled import of_frozen_geometry, of_model, unrounded
from entropy_probe.analyses.overlap import SHARED, Contents, shared
from entropy_probe.analyses.policy import Policy
from entropy_probe.analyses.reference import with_reference
from entropy_probe.estimators import first_order as fo
from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.gradients.hooks import Hooks
from entropy_probe.gradients.per_sample import SampleGradients
from entropy_probe.gradients.read_off import KeptPasses
from entropy_probe.parallel.batch import add_up
from entropy_probe.results.probe import GradientAgreement
from entropy_probe.scoring.isolation import differs_in_training
from entropy_probe.steps.adamw import Gradient, clip_gradient
from entropy_probe.steps.plan import PlannedStep, plan_step
from entropy_probe.types import TokenCoefficients, TokenScores


@dataclass(frozen=True, eq=False)
class BatchGradient:
    """The gradient that a step is taken with, of the loss on a batch.

    Attributes:
        update: the batch.
        loss: coefficients of this rank's rows of it.
        scores: of the whole batch, where the loss takes them.
        gradient: of the loss, with each prompt's share where these are kept.
        agreement: how far that is, clipped, from the trainer's own, where the step is taken with the latter.
        kept: forward passes of the batch that is its own evaluation batch, for the gradient of its entropy.
    """

    update: UpdateBatch
    loss: TokenCoefficients
    scores: TokenScores | None
    gradient: SampleGradients
    agreement: GradientAgreement | None = None
    kept: KeptPasses | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """The next step, and all that leads to it.

    Attributes:
        policy: whose step it is.
        evaluation: the batch that entropy is taken on.
        before: what that is before the step.
        hooks: where per-sample gradients are read off the layers.
        source: where its gradient comes from.
        step: the parameter change, in parts.
    """

    policy: Policy
    evaluation: EvaluationBatch
    before: Before
    hooks: Hooks | None
    source: BatchGradient | GivenGradient
    step: PlannedStep

    @property
    def batch(self) -> BatchGradient:
        """The update batch, of which the step is, and its gradient.

        Raises:
            ValueError: if the gradient came from outside, so that there is none to divide the step over.
        """
        if isinstance(self.source, GivenGradient):
            raise ValueError(
                "update: expected the step of an update batch, which this divides over, got that of a gradient from "
                "outside; leave the gradient out"
            )
        return self.source


def plan(
    policy: Policy,
    update: UpdateBatch,
    evaluation: EvaluationBatch,
    *,
    shares: bool = True,
    clipped: Gradient | None = None,
) -> Plan:
    """Score the evaluation batch, differentiate the loss, and plan the step.

    With ``shares`` each update prompt's share of the gradient is kept, if they fit. With ``clipped``, the trainer's own
    gradient of this batch, the step is taken as it is; the batch's own says how it divides over prompts, and what
    clipping multiplied them by.

    Raises:
        ValueError: for rollouts that the policy or the settings refuse, or numbers that are not finite.
    """
    policy.config.loss.check_model(getattr(policy.model, "config", None))
    policy.log.not_modelled += of_model(policy.model)
    source, before, hooks = _differentiated(policy, update, evaluation, shares=shares)
    total = source.gradient.total
    if clipped is None:
        return Plan(policy, evaluation, before, hooks, source, _step(policy, total))
    own = clip_gradient(total, policy.config.max_grad_norm)
    source = replace(source, agreement=_agreed(policy, clipped, own.values))
    step = _step(policy, clipped, clip=False)
    return Plan(policy, evaluation, before, hooks, source, replace(step, gradient=replace(own, values=clipped)))


def plan_given(
    policy: Policy,
    gradient: Gradient,
    update: UpdateBatch | None,
    evaluation: EvaluationBatch,
    *,
    shares: bool = True,
    clip: bool = True,
) -> Plan:
    """Score the evaluation batch, and plan the step of a checked gradient from outside.

    That of ``update`` is compared with it. ``shares`` prepares to differentiate the entropy cluster by cluster, and
    ``clip`` says whether the trainer has still to clip it.

    Raises:
        ValueError: as :func:`plan`.
    """
    source = GivenGradient(None, None)
    policy.log.notes.append(GRADIENT_GIVEN())
    if update is None:
        policy.prepare(evaluation.rollouts)
        before = before_step(policy, evaluation)
    else:
        batch, before, _ = _differentiated(policy, update, evaluation, shares=False)
        source = GivenGradient(update.rollouts, _agreed(policy, gradient, batch.gradient.total))
    hooks = policy.choose_hooks(evaluation.rollouts) if shares else None
    return Plan(policy, evaluation, before, hooks, source, _step(policy, gradient, clip=clip))


def _differentiated(
    policy: Policy, update: UpdateBatch, evaluation: EvaluationBatch, *, shares: bool
) -> tuple[BatchGradient, Before, Hooks | None]:
    """The gradient of the loss, and the evaluation batch before the step; a step's own batch is scored on the way."""
    policy.prepare(update.rollouts, evaluation.rollouts)
    update = replace(update, given=with_reference(policy, update.given, update.rollouts, update.local))
    # first, since it refuses batches that lack what the loss takes
    own, (loss, scores) = evaluation.is_update, update_loss(policy, update, checked=evaluation.is_update)
    before = None if own else before_step(policy, evaluation)
    if before is not None:
        _note_shared_sequences(policy, update, evaluation, before)
    hooks = policy.choose_hooks(update.rollouts) if shares else None
    scored, kept = scores is not None, None
    if own and not differs_in_training(policy.model, policy.parameters):
        kept = KeptPasses()
    gradient = update_gradient(policy, update, loss, store=shares, hooks=hooks, scored=scored, check=not own, kept=kept)
    source = BatchGradient(update, loss, scores, gradient, kept=kept)
    return source, before or before_step(policy, evaluation), hooks


def _agreed(policy: Policy, given: Gradient, own: Gradient) -> GradientAgreement:
    agreed = agreement(given, own)
    if (distance := agreed.relative_distance or 0.0) > NOTABLE_DISTANCE:
        policy.log.notes.append(GRADIENTS_DIFFER(distance=distance, cosine=agreed.cosine or 0.0))
    return agreed


def _step(policy: Policy, gradient: Gradient, *, clip: bool = True) -> PlannedStep:
    """The step with a gradient, and what of the trainer's is not in it."""
    config, trained = policy.config, (policy.parameters, policy.optimizer)
    config = config if clip else config.model_copy(update={"max_grad_norm": None})
    step = plan_step(*trained, gradient, config, policy.frozen_scale)
    if not step.kept:
        lines, notes = unrounded(*trained, step.delta, config.step_dtype)
        policy.log.not_modelled += lines
        policy.log.notes += notes
    if config.geometry == "frozen":
        policy.log.not_modelled += of_frozen_geometry(*trained, step.gradient.norm, config.max_grad_norm)
    return step


def before_step(policy: Policy, evaluation: EvaluationBatch) -> Before:
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
    if both.significant and policy.log.checked[evaluation.role].note is None:
        numbers = {"shared": both.sequences, "sequences": len(evaluation.rollouts), "expected": both.expected}
        policy.log.notes.append(SHARED(**numbers))
