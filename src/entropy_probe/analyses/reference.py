"""Where a KL term has its reference from: the rollouts, a model that is given, or the adapter switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from entropy_probe.analyses.gradient import over_tokens
from entropy_probe.analyses.policy import Policy
from entropy_probe.losses import Loss
from entropy_probe.parallel.batch import LocalRows
from entropy_probe.results.note import NoteKind
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.adapters import flags_kept, has_adapter, without_adapter
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.isolation import evaluating

COPY = "ref"
"""The adapter in which TRL keeps a copy of the one that training started from."""
ADAPTER_OFF = NoteKind(
    "adapter_off",
    "the reference of the KL term is the policy {how}, as TRL takes it from a model with an adapter",
    "Record reference_logprobs in the update batch, or give a reference, if it is another policy.",
)


def check_reference(loss: Loss, update: Rollouts | None, model: nn.Module, reference: nn.Module | None) -> None:
    """Make sure that a loss has the reference that it takes."""
    given = (update is not None and update.reference_logprobs is not None) or reference is not None
    if loss.needs_reference and not given and not has_adapter(model):
        raise ValueError(
            "reference_logprobs: expected [N, L] on an update batch of a loss with a KL term, got None, and a policy "
            "without an adapter to switch off; record the reference's log-probabilities of the sampled tokens, or give "
            "its model (reference), such as the one that training started from"
        )


def with_reference(policy: Policy, given: Rollouts, rollouts: Rollouts, local: LocalRows) -> Rollouts:
    """The update batch with the reference's log-probabilities, where the loss takes them and it has none.

    ``rollouts`` is the batch as it is counted.
    """
    check_reference(policy.config.loss, given, policy.model, policy.reference)
    if given.reference_logprobs is not None or not policy.config.loss.needs_reference:
        return given
    config = policy.config
    with _reference(policy) as model:
        scorer = Scorer(model, config.temperature, config.max_tokens_per_microbatch)
        with policy.clock.phase("score reference") as progress, policy.on_rank(local):
            scorer.prepare(rollouts)
            scores = scorer.score(local.select(rollouts), progress)
    return replace(given, reference_logprobs=over_tokens(policy, local, scores.logprobs))


@contextmanager
def _reference(policy: Policy) -> Iterator[nn.Module]:
    """The reference, ready to be scored."""
    model: Any = policy.model
    if policy.reference is not None:
        with evaluating(policy.reference):
            yield policy.reference
        return
    copied = COPY in model.peft_config
    how = f"with its adapter {COPY!r}" if copied else "with its adapter switched off"
    policy.log.notes.append(ADAPTER_OFF(how=how))
    if not copied:
        with without_adapter(model):
            yield model
        return
    active = model.active_adapters
    with flags_kept(model):
        model.base_model.set_adapter(COPY)
        try:
            yield model
        finally:
            model.base_model.set_adapter(active)
