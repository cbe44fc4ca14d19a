"""An update batch of an older policy, by its own account: ``old_logprobs`` that are not the policy's.

In a later step on the same rollouts the tokens are not the policy's, and need not be. What can be checked is that they
were drawn with ``old_logprobs``, and that the sampler's own log-probabilities are these.
Formulas: ``docs/theory.md``, "Do the rollouts fit the policy" and "The sampler".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_probe.analyses.admission import Role
from entropy_probe.estimators.policy_fit import MAX_Z
from entropy_probe.estimators.sampler import Mismatch, sampler_gaps, sampler_mismatch
from entropy_probe.losses.pieces import ROUNDING
from entropy_probe.parallel.batch import LocalRows
from entropy_probe.results.note import Note, NoteKind
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenScores

OLD_AMISS = NoteKind(
    "old_logprobs_amiss",
    "{role}: old_logprobs are not those that the responses were drawn with: the tokens are likelier under the policy "
    "than ratios of mean 1 allow (z = {z:+.1f}, |Δ log π| {mean:.3g} nats per token on average), so the importance "
    "ratios of the loss are wrong",
    "Record the log-probabilities of the policy that sampled, after temperature, one for each response token.",
)
SAMPLED_NOT_OLD = NoteKind(
    "sampled_not_old",
    "{role}: sampled_logprobs differ from old_logprobs by {mean:.3g} nats per token on average, {max:.3g} at most: the "
    "responses were not sampled by the policy that ratios are taken to",
    "Expected of an engine with other numerics if the trainer corrects for it (use_vllm); else record both anew.",
)

NEARER, NOTABLE = 2.0, 0.005
"""How many times as far from the old policy as from this one a sampler may be, and from how many nats per token on."""


@dataclass(frozen=True, eq=False)
class OldPolicy:
    """How a batch agrees with the policy that it says it is from.

    Attributes:
        behind: that policy's log-probabilities against the policy's.
        sampled: the sampler's against that policy's; ``None`` without any.
        notes: what is wrong.
    """

    behind: Mismatch
    sampled: Mismatch | None
    notes: tuple[Note, ...]


def old_policy(
    role: Role,
    scores: TokenScores,
    local: LocalRows,
    rollouts: Rollouts,
    add_up: Callable[[Tensor], Tensor],
    largest: float,
) -> OldPolicy | None:
    """Check a batch against the older policy that it is from; ``None`` if it is the policy's as it is.

    ``add_up`` joins numbers of this rank's sequences with those of all others; ``largest`` is the mean difference of
    log-probabilities that is allowed, nats per token.
    """
    old, sampled = rollouts.old_logprobs, rollouts.sampled_logprobs
    if old is None or role != "update":  # entropy is that of the policy's own responses
        return None

    def compared(with_scores: TokenScores, logprobs: Tensor) -> Mismatch:
        gaps = add_up(sampler_gaps(with_scores, logprobs[local.rows]))
        return sampler_mismatch(gaps[:, rollouts.response_mask.any(1)], int(rollouts.response_mask.sum()))

    behind = compared(scores, old)
    if behind.max < ROUNDING:
        return None
    notes = []
    if behind.z > MAX_Z:
        notes.append(OLD_AMISS(role=role, z=behind.z, mean=behind.mean))
    of_sampler = None
    if sampled is not None:
        then = torch.where(scores.response_mask, old[local.rows].to(scores.logprobs.dtype), 0.0)
        of_sampler = compared(replace(scores, logprobs=then), sampled)
        # who sampled for another policy is not nearer to this one
        nearer = of_sampler.mean > max(NOTABLE, NEARER * compared(scores, sampled).mean)
        if of_sampler.mean > largest or nearer:
            notes.append(SAMPLED_NOT_OLD(role=role, mean=of_sampler.mean, max=of_sampler.max))
    return OldPolicy(behind, of_sampler, tuple(notes))
