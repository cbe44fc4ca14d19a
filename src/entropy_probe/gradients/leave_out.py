"""The update gradient of a batch without some of its prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.gradients.per_sample import SampleGradients, cluster_backward
from entropy_probe.losses import Loss
from entropy_probe.parallel.shards import from_shard, local
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.forward import Scorer
from entropy_probe.types import TokenCoefficients, TokenScores

EXACT = 1e-12
"""Rounding of coefficients, relative to the largest."""


def renormalised(
    loss: Loss, rollouts: Rollouts, scores: TokenScores | None, kept: Bool[Tensor, " N"]
) -> tuple[TokenCoefficients, float, bool]:
    """The loss of the step without some sequences, beside that of the whole.

    Args:
        loss: the trainer's loss.
        rollouts: the update batch.
        scores: its scores, where the loss takes them.
        kept: the sequences that stay.

    Returns:
        The coefficients of these sequences, the factor that comes nearest to taking them there from those in the whole
        batch, and whether it does: it does where all terms of the loss divide by one number for the batch.
    """
    rows = kept.nonzero()[:, 0]
    before = _stacked(loss.coefficients(rollouts, scores).select(rows))
    reduced = loss.coefficients(rollouts.select(rows), None if scores is None else scores.select(rows))
    after = _stacked(reduced)
    size = before.square().sum()
    factor = float((before * after).sum() / size) if size > 0 else 1.0  # nothing is left where all are masked out
    exact = bool((after - factor * before).abs().max() <= EXACT * after.abs().max())
    return reduced, factor, exact


def _stacked(coefficients: TokenCoefficients) -> Tensor:
    of_logprobs, of_entropies = coefficients.logprobs, coefficients.entropies
    return torch.stack([of_logprobs, torch.zeros_like(of_logprobs) if of_entropies is None else of_entropies])


def reduced_gradients(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    blocks: Tensor,
    loss: TokenCoefficients,
    whole: SampleGradients,
    factors: list[float],
) -> Iterator[dict[str, Tensor | None]]:
    """The gradient of the loss without block 0, without block 1, and so on.

    Args:
        scorer: the policy.
        parameters: what to differentiate with respect to.
        rollouts: the update batch.
        blocks: the block of each sequence, ``[N]``.
        loss: coefficients of the whole batch's loss.
        whole: its gradient; where it keeps no gradient per block, each block is differentiated again.
        factors: what the remaining tokens' coefficients are multiplied by, of :func:`renormalised`.
    """
    for block, factor in enumerate(factors):
        if whole.stored is not None:
            share: Mapping[str, Tensor] = by_name(whole.stored[block], parameters)
        else:
            (share,) = cluster_backward(scorer, parameters, rollouts, (blocks == block).nonzero()[:, 0], [loss])
        yield reduced_gradient(whole.total, share, factor)


def reduced_gradient(
    total: Mapping[str, Tensor | None], share: Mapping[str, Tensor], factor: float
) -> dict[str, Tensor | None]:
    """``factor`` times a gradient without a share of it.

    Elements that nothing but the share reaches become 0 exactly, and not the rounding error of a difference, which an
    optimizer that divides by the gradient's size would turn into a full step.

    Args:
        total: the gradient; ``None`` where the loss does not reach.
        share: what is left out; nothing of parameters that it lacks.
        factor: what the rest is multiplied by.
    """
    return {name: _without(x, share.get(name), factor) for name, x in total.items()}


def kept_gradient(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    clusters: Tensor,
    kept: Tensor,
    loss: TokenCoefficients,
    whole: SampleGradients,
) -> dict[str, Tensor | None]:
    """The gradient of the loss over some clusters only, every token at the weight that it has in the whole batch.

    Args:
        scorer: the policy.
        parameters: what to differentiate with respect to.
        rollouts: the update batch.
        clusters: the cluster of each sequence, ``[N]``.
        kept: which clusters, ``[K]``.
        loss: coefficients of the whole batch's loss.
        whole: its gradient; where it keeps no gradient per cluster, the kept clusters are differentiated again.
    """
    if whole.stored is not None:
        shares: Mapping[str, Tensor] = by_name(whole.stored[kept].sum(0), parameters)
    else:
        rows = torch.isin(clusters, kept).nonzero()[:, 0]
        shares = cluster_backward(scorer, parameters, rollouts, rows, [loss])[0]
    return {
        name: None if total is None else shares[name].to(total.dtype) if name in shares else torch.zeros_like(total)
        for name, total in whole.total.items()
    }


def by_name(flat: Float[Tensor, " P"], parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """A gradient as it is stored, by parameter name."""
    pieces = zip(parameters.items(), flat.split([local(p).numel() for p in parameters.values()]), strict=True)
    return {name: from_shard(piece.view(local(p).shape).to(p.device), p) for (name, p), piece in pieces}


def _without(total: Tensor | None, share: Tensor | None, factor: float) -> Tensor | None:
    if total is None or share is None:
        return total if total is None else factor * total
    rest = total - share
    rounding = 16 * torch.finfo(share.dtype).eps * share.abs()
    return factor * rest.masked_fill_(rest.abs() <= rounding, 0.0)
