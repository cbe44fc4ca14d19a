"""The update gradient of a batch without some of its prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.gradients.per_sample import SampleGradients, cluster_backward
from entropy_probe.losses import Loss
from entropy_probe.parallel.shards import from_shard, local
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.forward import Scorer
from entropy_probe.types import TokenCoefficients

__all__ = ["kept_gradient", "reduced_gradients", "renormalisation"]


def renormalisation(rollouts: Rollouts, blocks: Tensor, loss: Loss) -> list[float]:
    """What the remaining tokens' weights are multiplied by when the loss no longer counts a block.

    One number per block, since every supported loss divides by one number for the batch.

    Args:
        rollouts: the update batch.
        blocks: the block of each sequence, ``[N]``.
        loss: the trainer's loss.
    """
    whole = loss.weights(rollouts)
    factors = []
    for block in range(int(blocks.max()) + 1):
        kept = blocks != block
        reduced = loss.weights(rollouts.select(kept))
        before = whole[kept].sum().item()
        factors.append(reduced.sum().item() / before if before else 1.0)  # nothing is left where all are masked out
    return factors


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

    Elements that only the left-out block reaches become 0 exactly, and not the rounding error of a difference, which
    an optimizer that divides by the gradient's size would turn into a full step.

    Args:
        scorer: the policy.
        parameters: what to differentiate with respect to.
        rollouts: the update batch.
        blocks: the block of each sequence, ``[N]``.
        loss: coefficients of the whole batch's loss.
        whole: its gradient; where it keeps no gradient per block, each block is differentiated again.
        factors: of :func:`renormalisation`.
    """
    for block, factor in enumerate(factors):
        if whole.stored is not None:
            share: Mapping[str, Tensor] = _by_name(whole.stored[block], parameters)
        else:
            (share,) = cluster_backward(scorer, parameters, rollouts, (blocks == block).nonzero()[:, 0], [loss])
        yield {name: _without(total, share.get(name), factor) for name, total in whole.total.items()}


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
        shares: Mapping[str, Tensor] = _by_name(whole.stored[kept].sum(0), parameters)
    else:
        rows = torch.isin(clusters, kept).nonzero()[:, 0]
        shares = cluster_backward(scorer, parameters, rollouts, rows, [loss])[0]
    return {
        name: None if total is None else shares[name].to(total.dtype) if name in shares else torch.zeros_like(total)
        for name, total in whole.total.items()
    }


def _by_name(flat: Tensor, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    pieces = zip(parameters.items(), flat.split([local(p).numel() for p in parameters.values()]), strict=True)
    return {name: from_shard(piece.view(local(p).shape).to(p.device), p) for (name, p), piece in pieces}


def _without(total: Tensor | None, share: Tensor | None, factor: float) -> Tensor | None:
    if total is None or share is None:
        return total if total is None else factor * total
    rest = total - share
    rounding = 16 * torch.finfo(share.dtype).eps * share.abs()
    return factor * rest.masked_fill_(rest.abs() <= rounding, 0.0)
