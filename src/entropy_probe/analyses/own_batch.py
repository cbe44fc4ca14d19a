"""The batch of the step as its own evaluation batch, in the optimizer's own geometry. No other rollouts are needed.

Formulas: ``docs/theory.md``, "One batch".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.analyses.admission import draws_of
from entropy_probe.analyses.batches import EvaluationBatch, UpdateBatch, admitted
from entropy_probe.analyses.gradient import differentiate, over_clusters
from entropy_probe.analyses.measure import Measured, measure
from entropy_probe.analyses.plan import Plan, plan
from entropy_probe.analyses.policy import Policy
from entropy_probe.analyses.predict import Prediction, entropy_surrogate, length_changes, prompt_contributions
from entropy_probe.estimators import first_order as fo
from entropy_probe.estimators.own_batch import OwnPairs
from entropy_probe.estimators.realized import Change
from entropy_probe.gradients.cross import own_products
from entropy_probe.gradients.per_sample import SampleGradients, Side
from entropy_probe.named import NamedVector
from entropy_probe.parallel.batch import LocalRows
from entropy_probe.results.note import NoteKind
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.steps.adamw import Gradient
from entropy_probe.steps.copied import optimizer_name
from entropy_probe.types import Clusters

__all__ = ["OwnPrediction", "admit_own", "measure_own", "predict_own", "without_own"]

USED_BEFORE = NoteKind(
    "used_before",
    "the policy has moved since these responses were sampled, by {gap:.2g} nats per token: where earlier steps were "
    "taken on them, momentum has their gradients already, and its part is biased as pairs of a prompt with itself are",
    "Trust the first step on each batch, or give evaluation rollouts.",
)
FEW_PROMPTS = NoteKind(
    "few_prompts",
    "one batch of {prompts} prompts: errors are up to an eighth too small (95% intervals cover 90% with 8 to 16 "
    "prompts, 94% with 64)",
    "Use more prompts, or evaluation rollouts.",
)
MIN_PROMPTS_FOR_ERRORS = 32
MAX_GAP = 1e-3
"""Between the log-probabilities at sampling and now, nats per token: what engines differ by without a step."""


@dataclass(frozen=True, eq=False)
class OwnPrediction(Prediction):
    """The prediction from the batch of the step itself; ``change`` and ``parts`` have their errors given this step.

    Attributes:
        all_pairs: the change with each prompt's product with its own gradient, as the realized change has it.
        of_update: influence of each prompt's gradient on the gradient part, ``[B]``.
    """

    all_pairs: fo.FirstOrder
    of_update: Float[Tensor, " B"]

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
        ValueError: for fewer than three prompts, an optimizer without a closed form, rollouts of another policy that
            would have to be reweighted, or as :func:`~entropy_probe.analyses.predict.plan`.
    """
    planned = plan(policy, *admit_own(policy, batch, clipped), clipped=clipped)
    if planned.step.gradient_scale is None:
        raise ValueError(
            "one batch: expected torch.optim.AdamW or Adam, whose step divides over prompts, got "
            f"{optimizer_name(policy.optimizer)}; give evaluation rollouts, or set geometry: frozen"
        )
    if planned.before.scores.log_weights is not None:
        raise ValueError(
            "one batch: expected rollouts of the policy itself, got those of another: the update takes them as "
            "they are, so they cannot be reweighted; predict from two batches"
        )
    _note_used_before(planned)
    if (prompts := planned.evaluation.clusters.count) < MIN_PROMPTS_FOR_ERRORS:
        policy.log.notes.append(FEW_PROMPTS(prompts=prompts))
    slope, own = _slope(planned)
    dots = dict(zip(planned.step.components, over_clusters(policy, planned.evaluation.local, slope.dots), strict=True))
    length_slope, lengths = length_changes(planned, list(planned.step.components.values()))
    before = planned.before
    pairs = OwnPairs(dots["gradient"], prompt_contributions(planned, slope, 1.0), own)

    def first_order(contributions: Tensor, longer: float) -> fo.FirstOrder:
        return fo.first_order(contributions, before.sums.size, before.entropy, longer)

    given = {**dots, "gradient": pairs.by_entropy}
    parts = {name: first_order(given[name], float(lengths[k])) for k, name in enumerate(given)}
    change = first_order(torch.stack([*given.values()]).sum(0), float(lengths.sum()))
    by_prompt = pairs.by_update / before.sums.size.sum()
    return OwnPrediction(
        planned,
        slope,
        length_slope,
        change,
        parts,
        by_prompt,
        fo.update_standard_error(by_prompt),
        None,  # the moments have this batch's gradient after the step, and so the influence of its responses
        all_pairs=first_order(torch.stack([*dots.values()]).sum(0), float(lengths.sum())),
        of_update=len(by_prompt) * by_prompt - by_prompt.sum(),
    )


def measure_own(prediction: OwnPrediction) -> Measured:
    """The realized change on the batch of the step, less the first-order influence of its responses on themselves."""
    return without_own(prediction, measure(prediction.plan))


def without_own(prediction: OwnPrediction, measured: Measured) -> Measured:
    """What was measured, less the first-order influence of the responses on themselves."""
    change = measured.measurement.change
    if change is None:
        return measured
    own = prediction.all_pairs - prediction.change
    corrected = Change(change.value - own.value, change.influence - own.influence, change.size_change)
    return replace(measured, measurement=replace(measured.measurement, change=corrected))


def _note_used_before(planned: Plan) -> None:
    policy, rollouts, scores = planned.policy, planned.evaluation.own, planned.before.scores
    if planned.evaluation.rollouts.old_logprobs is None or rollouts.old_logprobs is None:
        return
    gaps = (rollouts.old_logprobs.double() - scores.logprobs.double()).abs()[rollouts.response_mask]
    total, tokens = policy.ranks.sum(torch.tensor([gaps.sum().item(), float(gaps.numel())])).tolist()
    if total / tokens > MAX_GAP:
        policy.log.notes.append(USED_BEFORE(gap=total / tokens))


def _slope(planned: Plan) -> tuple[SampleGradients, Float[Tensor, " B"]]:
    """The entropy gradient along the parts of the step, and each prompt's along its own share of the gradient part."""
    policy, evaluation, stored = planned.policy, planned.evaluation, planned.batch.gradient.stored
    surrogate, scale = entropy_surrogate(planned), _scale(planned)
    directions = list(planned.step.components.values())
    side = Side(surrogate, directions, pair_with=stored, pair_scale=None if stored is None else scale)
    given = (policy, evaluation.own, evaluation.local)
    with policy.clock.phase("evaluation gradient") as progress:
        slope = differentiate(*given, side, hooks=planned.hooks, progress=progress)
    own = slope.paired
    if stored is None:
        with policy.clock.phase("own products"), policy.on_rank(evaluation.local):
            clusters = evaluation.local.local_clusters
            trained = (policy.scorer, policy.parameters, evaluation.own, clusters)
            own = own_products(*trained, surrogate, planned.batch.loss, scale)
    return slope, over_clusters(policy, evaluation.local, own)


def _scale(planned: Plan) -> NamedVector:
    """What the loss gradient is multiplied by in the gradient part of the step."""
    assert planned.step.gradient_scale is not None
    return {name: -planned.step.gradient.factor * scale for name, scale in planned.step.gradient_scale.items()}
