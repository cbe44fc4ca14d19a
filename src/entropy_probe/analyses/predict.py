"""The prediction: the next step, and what it does to the policy's entropy to first order.

Everything that is asked of a step is a function of one of two values: :class:`Plan`, the step, and
:class:`Prediction`, the step with the entropy's slope along it. Formulas: ``docs/theory.md``, "The
first-order change" and "The step".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.analyses.before import entropy_coefficients
from entropy_probe.analyses.given import GivenGradient
from entropy_probe.analyses.gradient import differentiate, over_clusters
from entropy_probe.analyses.plan import Plan
from entropy_probe.analyses.policy import Policy
from entropy_probe.analyses.reduced import jackknife
from entropy_probe.estimators import first_order as fo
from entropy_probe.gradients.per_sample import SampleGradients, Side
from entropy_probe.named import NamedVector
from entropy_probe.results.note import NoteKind
from entropy_probe.steps.adamw import Gradient, is_adam
from entropy_probe.steps.afterlife import Coasted, coasted, coasting, no_end
from entropy_probe.steps.copied import copied_step, moved
from entropy_probe.steps.origins import momentum_by_origin
from entropy_probe.steps.plan import scaled
from entropy_probe.types import TokenCoefficients

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


ROUNDED = NoteKind(
    "rounded",
    "training rounds the step to {kind}, and so it is here: {share:.1%} of the elements that would move stay where "
    "they are; se_update is that of the gradient part, as if other update prompts were rounded alike",
    "Trust the error from the evaluation rollouts; set probe.step_dtype to float32 if the trainer keeps a float32 copy "
    "of its weights.",
)


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
        by_prompt: what each update prompt adds to the gradient part, ``[B]``; ``None`` likewise, and for a gradient
            from outside.
        se_update: the error from the update batch; ``None`` for a gradient from outside.
        committed: the change that the moments alone will still make after the step; ``None`` in the frozen geometry,
            within a horizon, and where they have no closed form, unless coasting is asked for and comes to an end.
        origins: parts of the momentum part by the gradients they come from, that of the last step first; none within a
            horizon, and but for Adam with recorded gradients.
        horizon: how many tokens after a changed one count; ``None`` for the whole response.
        alone: where momentum alone leads after the step, where that was taken for ``committed``.
    """

    plan: Plan
    slope: SampleGradients
    length_slope: SampleGradients | None
    change: fo.FirstOrder
    parts: dict[str, fo.FirstOrder]
    by_prompt: Float[Tensor, " B"] | None
    se_update: float | None
    committed: fo.FirstOrder | None
    origins: tuple[fo.FirstOrder, ...] = field(default=(), kw_only=True)
    horizon: int | None = field(default=None, kw_only=True)
    alone: Coasted | None = field(default=None, kw_only=True)

    @property
    def at_rest(self) -> Self:
        """The change by the step and all that momentum alone does after it, where that is known."""
        return self if self.committed is None else replace(self, change=self.change + self.committed)


def predict(planned: Plan, horizon: int | None = None) -> Prediction:
    """The first-order change of the entropy by a step, of the whole response or within a horizon."""
    step, policy, before, sizes = planned.step, planned.policy, planned.before, planned.before.sums.size
    asked = policy.config.coast or is_adam(policy.optimizer)
    own, beside = len(step.components), directions_beside(planned, horizon, later=asked)
    directions = [*step.components.values(), *beside.directions]
    slope = _entropy_slope(planned, directions, horizon)
    dots = over_clusters(policy, planned.evaluation.local, slope.dots)
    length_slope, lengths = length_changes(planned, directions, horizon)
    along = [fo.first_order(dots[k], sizes, before.entropy, float(lengths[k])) for k in range(len(directions))]
    origins, committed = beside.changes(along[own:])
    change = fo.first_order(dots[:own].sum(0), sizes, before.entropy, float(lengths[:own].sum()))
    parts = {} if step.gradient_scale is None else dict(zip(step.components, along, strict=False))
    fields: dict[str, Any] = {"committed": committed, "origins": origins, "horizon": horizon, "alone": beside.alone}
    if isinstance(planned.source, GivenGradient):
        return Prediction(planned, slope, length_slope, change, parts, None, None, **fields)
    if step.gradient_scale is None:
        se_update = jackknife(planned, slope, sizes.sum().item())
        return Prediction(planned, slope, length_slope, change, parts, None, se_update, **fields)
    by_prompt = prompt_contributions(planned, slope, sizes.sum().item())
    if planned.batch.agreement is None:  # else the step is that of another gradient
        coarsest = max(torch.finfo(p.dtype).eps for p in policy.parameters.values())
        fo.check_sums(by_prompt, parts["gradient"].value, max(1e-3, 8 * coarsest))
    if horizon is None:
        _note_what_the_update_error_holds_fixed(planned)
    se_update = fo.update_standard_error(by_prompt)
    return Prediction(planned, slope, length_slope, change, parts, by_prompt, se_update, **fields)


@dataclass(frozen=True, eq=False)
class Beside:
    """Directions beside the step's own: where its momentum comes from, and where it leads.

    Attributes:
        origins: parts of the momentum part by the gradients they come from, that of the last step first.
        later: what the moments alone will still do after the step; ``None`` where it is not asked for, or has no end.
        alone: where that leads, where it was taken.
    """

    origins: list[dict[str, Tensor]]
    later: dict[str, Tensor] | None
    alone: Coasted | None

    @property
    def directions(self) -> list[dict[str, Tensor]]:
        """All of them, ``later`` last."""
        return [*self.origins, *([] if self.later is None else [self.later])]

    def changes(self, along: Sequence[fo.FirstOrder]) -> tuple[tuple[fo.FirstOrder, ...], fo.FirstOrder | None]:
        """Those by the origins and the one by ``later``, from the changes along all directions."""
        count = len(self.origins)
        return tuple(along[:count]), None if self.later is None else along[count]


def directions_beside(planned: Plan, horizon: int | None, *, later: bool) -> Beside:
    """Directions beside those of a step; none within a horizon, and where it leads only if it is asked for."""
    policy, step, config = planned.policy, planned.step, planned.policy.config
    if horizon is not None or config.geometry == "frozen":
        return Beside([], None, None)
    origins = []
    if policy.past and step.gradient_scale is not None:
        origins = momentum_by_origin(policy.parameters, policy.optimizer, step.gradient_scale, policy.past)
    if not later:
        return Beside(origins, None, None)
    if is_adam(policy.optimizer):
        way = way_to_rest(policy, step.gradient.values)
        if way is None:
            policy.log.notes.append(no_end(policy.optimizer))
        return Beside(origins, way, None)
    assert step.stepped is not None
    alone = coasted(policy.parameters, policy.optimizer, step.taken_with, config.learning_rate, step.kept)
    if alone.parameters is None or not alone.steps:
        return Beside(origins, None, alone)
    return Beside(origins, moved(step.stepped, alone.parameters), alone)


def way_to_rest(policy: Policy, gradient: Gradient) -> dict[str, Tensor] | None:
    """What the moments alone will still do after the step with a gradient, clipped; ``None`` where it has no end."""
    given = (policy.parameters, policy.optimizer, gradient, policy.config.learning_rate)
    if is_adam(policy.optimizer):
        return coasting(*given)
    alone = coasted(*given)
    return None if alone.parameters is None else moved(copied_step(*given), alone.parameters)


def entropy_surrogate(planned: Plan, horizon: int | None = None) -> TokenCoefficients:
    """What the entropy is differentiated by, of this rank's rows of the evaluation batch."""
    evaluation, before = planned.evaluation, planned.before
    local, draws = evaluation.local, evaluation.draws.select(evaluation.local.rows)
    config = planned.policy.config
    return entropy_coefficients(
        before.scores, evaluation.own.prompt_ids, local.clusters, draws, before.positions, config, horizon
    )


def _entropy_slope(planned: Plan, directions: Sequence[NamedVector], horizon: int | None) -> SampleGradients:
    """The entropy gradient, along some directions."""
    surrogate, evaluation = entropy_surrogate(planned, horizon), planned.evaluation
    phase = "evaluation gradient" if horizon is None else f"gradient within {horizon} tokens"
    with planned.policy.clock.phase(phase) as progress:
        side = Side(surrogate, directions=directions)
        return differentiate(
            planned.policy, evaluation.own, evaluation.local, side, hooks=planned.hooks, progress=progress
        )


def length_changes(
    planned: Plan, steps: Sequence[NamedVector], horizon: int | None = None
) -> tuple[SampleGradients | None, Float[Tensor, " K"]]:
    """The relative first-order change of the mean length by each of some steps; 0 per sequence."""
    lengths, policy = planned.before.lengths, planned.policy
    if lengths is None:
        return None, torch.zeros(len(steps), dtype=torch.float64)
    own = planned.evaluation.own.select(lengths.rows)
    with policy.clock.phase("length gradient") as progress:
        side = Side(lengths.coefficients(horizon))
        slope = differentiate(policy, own, lengths.local, side, progress=progress, total=False)
    return slope, lengths.along(steps, slope, policy.ranks)


def prompt_contributions(planned: Plan, slope: SampleGradients, total_weight: float) -> Float[Tensor, " B"]:
    """What each update prompt adds, through the gradient part of a step in closed form, to a mean over some batch.

    ``slope`` is the gradient of the sum that ``total_weight`` makes the mean.
    """
    policy, step, update, gradient = planned.policy, planned.step, planned.batch.update, planned.batch.gradient
    assert step.gradient_scale is not None
    direction = scaled(slope.total, step.gradient_scale, -step.gradient.factor / total_weight)
    with policy.clock.phase("update error") as progress:
        if gradient.stored is not None:
            return over_clusters(policy, update.local, gradient.dot_stored(direction))
        side = Side(planned.batch.loss, is_loss=True, directions=[direction])
        again = differentiate(
            policy, update.own, update.local, side, hooks=planned.hooks, progress=progress, total=False
        )
        return over_clusters(policy, update.local, again.dots[0])


def _note_what_the_update_error_holds_fixed(planned: Plan) -> None:
    policy, step = planned.policy, planned.step
    if policy.config.geometry == "adamw" and any(not policy.optimizer.state.get(p) for p in policy.parameters.values()):
        policy.log.notes.append(NO_HISTORY())
    if step.gradient.factor < 1:
        policy.log.notes.append(CLIPPED(factor=step.gradient.factor))
    if step.kept:
        kinds = sorted({str(dtype).removeprefix("torch.") for dtype in step.kept.values()})
        policy.log.notes.append(ROUNDED(kind=" and ".join(kinds), share=step.stays))
