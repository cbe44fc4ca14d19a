"""Gradients over a batch that ranks share, and what each update prompt adds along a direction."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.analyses.batches import UpdateBatch
from entropy_probe.analyses.policy import Policy
from entropy_probe.gradients.hooks import Hooks
from entropy_probe.gradients.per_sample import SampleGradients, Side, sample_gradients, stored_bytes
from entropy_probe.gradients.read_off import KeptPasses
from entropy_probe.parallel.batch import LocalRows
from entropy_probe.results.note import NOTHING_TO_DO, NoteKind
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.forward import Progress
from entropy_probe.scoring.sheet import ScoreSheet
from entropy_probe.types import TokenCoefficients, TokenScores

PASSED_OVER_TWICE = NoteKind(
    "passed_over_twice",
    "per-prompt update gradients exceed max_stored_gradient_gib: the update batch is passed over twice",
    f"{NOTHING_TO_DO} Raise probe.max_stored_gradient_gib to pass over the batch once.",
)


def update_loss(policy: Policy, update: UpdateBatch, *, checked: bool) -> tuple[TokenCoefficients, TokenScores | None]:
    """The loss of the step, of this rank's rows of the update batch, and the whole batch's scores if it takes any.

    The scores are checked against the policy unless the batch has been (``checked``).
    """
    loss, local, scores = policy.config.loss, update.local, None
    if loss.needs_scores(update.given):
        scores = policy.reference_scores(update.rollouts, local, "score update")
        if not checked:
            policy.check_rollouts("update", scores, local, update.rollouts)
        scores = whole_scores(policy, local, scores)
    # by the trainer's own groups
    coefficients = loss.coefficients(update.given, scores).select(local.rows)
    policy.log.notes += loss.notes(update.given, scores)
    return coefficients, scores


def whole_scores(policy: Policy, local: LocalRows, own: TokenScores) -> TokenScores:
    """Scores of the whole batch from those of the rows that each rank has."""
    logprobs, entropies, mask = (
        over_tokens(policy, local, x) for x in (own.logprobs, own.entropies, own.response_mask.double())
    )
    discriminants = None if own.discriminants is None else over_tokens(policy, local, own.discriminants)
    return TokenScores(logprobs, entropies, mask.bool(), discriminants=discriminants)


def over_tokens(policy: Policy, local: LocalRows, values: Float[Tensor, "n L"]) -> Float[Tensor, "N L"]:
    """Values of this rank's sequences, with those of all others in their places."""
    return policy.ranks.sum(local.by_sequence(values.T).T.contiguous())


def over_clusters(policy: Policy, local: LocalRows, values: Float[Tensor, "*k u"]) -> Float[Tensor, "*k U"]:
    """Values of this rank's clusters, with those of all others in their places."""
    return policy.ranks.sum(local.by_cluster(values))


def differentiate(
    policy: Policy,
    own: Rollouts,
    local: LocalRows,
    side: Side,
    *,
    progress: Progress,
    hooks: Hooks | None = None,
    total: bool = True,
    sheet: ScoreSheet | None = None,
    kept: KeptPasses | None = None,
) -> SampleGradients:
    """The gradient of a surrogate: its total over the whole batch, everything else of this rank's clusters.

    Without ``total`` that is not added up over ranks. A ``sheet`` gets the scores of the pass. With hooks ``kept`` gets
    the forward passes of a first call for a second one.
    """
    parameters, ranks = policy.parameters, policy.ranks
    with policy.on_rank(local):
        how = {"hooks": hooks, "progress": progress, "sheet": sheet, "kept": kept}
        (gradients,) = sample_gradients(policy.scorer, parameters, own, local.local_clusters, [side], **how)
    if not total:
        return gradients
    if gradients.stored is None:
        return replace(gradients, total=ranks.sum_vector(gradients.total, parameters))
    # in float64, so that the step does not depend on which sequences share a microbatch or a rank
    named = parameters.items()
    double = {name: torch.zeros((), dtype=torch.float64, device=p.device).expand(p.shape) for name, p in named}
    exact = ranks.sum_vector(gradients.total_of_stored(parameters), double)
    dtypes = {name: torch.promote_types(p.dtype, torch.float32) for name, p in named}
    return replace(gradients, total={name: None if x is None else x.to(dtypes[name]) for name, x in exact.items()})


def update_gradient(
    policy: Policy,
    update: UpdateBatch,
    loss: TokenCoefficients,
    *,
    store: bool,
    hooks: Hooks | None,
    scored: bool,
    check: bool = True,
    kept: KeptPasses | None = None,
) -> SampleGradients:
    """The loss gradient of the whole step, with the share of each prompt (or block) if it is wanted and fits.

    A batch that was not scored before is now, by this pass, and the scores are kept; with ``check`` the batch is held
    against the policy by these. ``kept`` gets the forward passes, to differentiate something else of the same rows.
    """
    fits = stored_bytes(policy.parameters, update.shares.count) <= policy.config.max_stored_gradient_gib * 2**30
    if store and not fits:
        policy.log.notes.append(PASSED_OVER_TWICE())
    sheet = None if scored else ScoreSheet(update.own, policy.model)
    with policy.clock.phase("update gradient") as progress:
        side = Side(loss, is_loss=True, store=store and fits)
        how = {"hooks": hooks if side.store else None, "progress": progress, "sheet": sheet, "kept": kept}
        gradient = differentiate(policy, update.own, update.local, side, **how)
    if sheet is not None:
        with policy.on_rank(update.local):
            scores = policy.keep_scores(update.rollouts, update.local, sheet.read())
        if check:
            policy.check_rollouts("update", scores, update.local, update.rollouts)
    return gradient
