"""Taking the steps of recorded batches again, for good: from a checkpoint to a later step of the same run."""

from __future__ import annotations

from dataclasses import replace

import torch

from entropy_probe.analyses.gradient import update_gradient, update_loss
from entropy_probe.analyses.own_batch import admit_own
from entropy_probe.analyses.policy import Policy
from entropy_probe.analyses.reference import with_reference
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.steps.adamw import ClippedGradient, clip_gradient


def batch_gradient(policy: Policy, batch: Rollouts) -> ClippedGradient:
    """The gradient of the policy's loss on a batch, clipped as training does.

    Raises:
        ValueError: for unusable rollouts, or a gradient that is not finite.
    """
    update, _ = admit_own(policy, batch)
    policy.prepare(update.rollouts, update.rollouts)
    update = replace(update, given=with_reference(policy, update.given, update.rollouts, update.local))
    loss, scores = update_loss(policy, update, checked=False)
    gradient = update_gradient(policy, update, loss, store=False, hooks=None, scored=scores is not None)
    return clip_gradient(gradient.total, policy.config.max_grad_norm)


def take_step(policy: Policy, gradient: ClippedGradient, rate_factor: float) -> None:
    """Step the policy and its optimizer for good, at the optimizer's rates times a factor, which they stay at."""
    for group in policy.optimizer.param_groups:
        group["lr"] *= rate_factor
    for name, parameter in policy.parameters.items():
        value = gradient.values[name]
        parameter.grad = None if value is None else value.to(parameter.dtype)
    with torch.enable_grad():
        policy.optimizer.step()
    policy.optimizer.zero_grad(set_to_none=True)
