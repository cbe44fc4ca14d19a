"""Steps on a part of the update batch, in the geometry of the planned one.

Formulas: ``docs/theory.md``, "What if" and "Other optimizers".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from entropy_probe.analyses.gradient import differentiate, over_clusters
from entropy_probe.analyses.plan import Plan
from entropy_probe.estimators.jackknife import jackknife_standard_error
from entropy_probe.gradients.leave_out import kept_gradient, reduced_gradients, renormalised
from entropy_probe.gradients.per_sample import SampleGradients, Side
from entropy_probe.named import dot
from entropy_probe.parallel.batch import LocalRows
from entropy_probe.results.probe import PreconditionerReport
from entropy_probe.steps.copied import STEP_ON_COPIES, optimizer_name
from entropy_probe.steps.plan import PlannedStep, plan_step, unrounded_step


def step_on(planned: Plan, kept: Int[Tensor, " K"], factor: float = 1.0) -> PlannedStep:
    """The step on some prompts, numbered by increasing id, in the geometry of the planned one.

    ``factor`` multiplies every token's weight in the loss of the whole batch.
    """
    policy, batch, local = planned.policy, planned.batch, planned.batch.update.local
    own = torch.isin(local.present_clusters, kept).nonzero()[:, 0]
    rollouts = batch.update.own
    given = (policy.scorer, policy.parameters, rollouts, local.local_clusters, own, batch.loss, batch.gradient)
    with policy.on_rank(local):
        gradient = kept_gradient(*given)
    gradient = policy.ranks.sum_vector(gradient, policy.parameters)
    return step_by(planned, {name: None if g is None else factor * g for name, g in gradient.items()})


def step_without(planned: Plan, dropped: Int[Tensor, " D"]) -> PlannedStep:
    """The step without some prompts, numbered by increasing id, with the loss normalised over the others."""
    policy, update, local = planned.policy, planned.batch.update, planned.batch.update.local
    left = ~torch.isin(torch.arange(update.prompts.count), dropped)
    rows = left[update.prompts.index]
    loss, factor, exact = renormalised(policy.config.loss, update.given, planned.batch.scores, rows)
    if exact:
        return step_on(planned, left.nonzero()[:, 0], factor)
    own = rows[local.rows].nonzero()[:, 0]
    place = rows.cumsum(0)[local.rows[own]] - 1  # of these sequences among those that are left
    kept = LocalRows(local.rows[own], local.size, local.clusters.select(own))
    with policy.clock.phase("update gradient") as progress:
        side = Side(loss.select(place), is_loss=True)
        gradient = differentiate(policy, update.own.select(own), kept, side, progress=progress)
    return step_by(planned, gradient.total)


def step_by(planned: Plan, gradient: Mapping[str, Tensor | None]) -> PlannedStep:
    """The step by another gradient, in the geometry of the planned one."""
    policy, step = planned.policy, planned.step

    def frozen() -> tuple[dict[str, Tensor], PreconditionerReport]:
        assert step.gradient_scale is not None
        assert step.preconditioner is not None
        return step.gradient_scale, step.preconditioner

    return plan_step(policy.parameters, policy.optimizer, dict(gradient), policy.config, frozen)


def jackknife(planned: Plan, slope: SampleGradients, total_weight: float) -> float:
    """The error from the update batch of a step that is taken on copies: leave out a block, step again."""
    policy, update, step = planned.policy, planned.batch.update, planned.step
    config, blocks, local = policy.config, update.shares, update.local
    policy.log.notes.append(STEP_ON_COPIES(optimizer=optimizer_name(policy.optimizer), blocks=blocks.count))
    own_factors = [
        renormalised(config.loss, update.given, planned.batch.scores, blocks.index != block)[1]
        for block in local.present_clusters.tolist()
    ]
    direction = {
        name: torch.zeros_like(p) if (x := slope.total[name]) is None else x / total_weight
        for name, p in step.delta.items()
    }
    trained, whole = (policy.parameters, policy.optimizer), step.delta
    if step.kept:  # rounding is as large as a block's share, so that steps are compared without it
        whole = unrounded_step(*trained, planned.batch.gradient.total, config)
    left_out = []
    with policy.clock.phase("update error") as progress, policy.on_rank(local):
        for reduced in reduced_gradients(
            policy.scorer,
            policy.parameters,
            update.own,
            local.local_clusters,
            planned.batch.loss,
            planned.batch.gradient,
            own_factors,
        ):
            left_out.append(dot(direction, unrounded_step(*trained, reduced, config)))
            progress(len(left_out), len(own_factors))
    changes = over_clusters(policy, local, torch.tensor(left_out, dtype=torch.float64))
    sizes = torch.stack([update.prompts.index, blocks.index], 1).unique(dim=0)[:, 1].bincount()
    return jackknife_standard_error(dot(direction, whole), changes, sizes)
