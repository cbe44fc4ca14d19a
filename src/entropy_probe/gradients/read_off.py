"""Gradients of clusters read off layers, a microbatch at a time, from new forward passes or from those kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from entropy_probe.gradients.hooks import HookedPass, Hooks
from entropy_probe.gradients.layers import Sink
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.forward import Progress, Scorer
from entropy_probe.scoring.packing import Microbatch
from entropy_probe.scoring.sheet import ScoreSheet
from entropy_probe.types import TokenCoefficients


class Sums(Sink):
    """Where a pass over a batch accumulates."""

    @abstractmethod
    def empty(self, clusters: Tensor) -> Sums:
        """Empty sums for one microbatch with these clusters, for :meth:`merge` once it is known to be complete."""

    @abstractmethod
    def merge(self, added: Sums, clusters: Tensor) -> None:
        """Add the sums of a microbatch whose clusters are ``clusters``, distinct."""


@dataclass(eq=False)
class KeptPasses:
    """Forward passes whose graphs a second differentiation of the same rows uses up, as far as there is memory.

    Attributes:
        passes: with the clusters of each.
        used: whether there was a second one.
    """

    passes: list[tuple[HookedPass, Tensor]] = field(default_factory=list)
    used: bool = False

    def has_room(self, scorer: Scorer, batch: Microbatch) -> bool:
        """Whether a microbatch's pass may be kept; lets go of the others where memory has run out."""
        if not scorer.kept_tokens:
            self.passes.clear()
        tokens = sum(other.batch.input_ids.numel() for other, _ in self.passes) + batch.input_ids.numel()
        return not self.used and tokens <= scorer.kept_tokens


def read_off_layers(
    scorer: Scorer,
    hooks: Hooks,
    rollouts: Rollouts,
    clusters: Tensor,
    coefficients: Sequence[TokenCoefficients],
    sums: Sequence[Sums],
    sheet: ScoreSheet | None = None,
    progress: Progress | None = None,
    kept: KeptPasses | None = None,
) -> None:
    """Add what each sequence adds to the sums, a microbatch at a time.

    Args:
        scorer: the policy.
        hooks: how to read gradients.
        rollouts: the batch.
        clusters: the cluster of each sequence.
        coefficients: of the surrogates.
        sums: of each surrogate.
        sheet: gets the scores of new passes.
        progress: called with sequences done and in all.
        kept: passes to use, or else to be kept.
    """

    def backward(forward: HookedPass, present: Tensor, *, keep: bool) -> list[Sums]:
        """What the microbatch adds, by cluster; kept apart until it is complete."""
        added = [side.empty(present) for side in sums]
        forward.backward(coefficients, added, sheet, keep=keep)
        return added

    def hooked(batch: Microbatch) -> tuple[Tensor, list[Sums]]:
        present, of_rows = clusters[batch.leaders].unique(return_inverse=True)
        keep = kept is not None and kept.has_room(scorer, batch)
        forward = HookedPass(scorer, hooks, batch, of_rows)
        added = backward(forward, present, keep=keep)
        if kept is not None and keep:
            kept.passes.append((forward, present))
        return present, added

    def merge(present: Tensor, added: list[Sums]) -> None:
        for side, more in zip(sums, added, strict=True):
            side.merge(more, present)

    left, done = torch.ones(len(rollouts), dtype=torch.bool), 0
    report: Progress = progress or (lambda *_: None)
    while kept is not None and kept.passes:
        kept.used = True
        forward, present = kept.passes.pop(0)
        outcome = scorer.attempt(forward.batch, lambda _, f=forward, p=present: backward(f, p, keep=False))
        if outcome is None:
            kept.passes.clear()
            break
        merge(present, outcome[0])
        left[forward.batch.rows] = False
        done += len(forward.batch.rows)
        report(done, len(rollouts))
    share = _prompts_are_whole(rollouts.prompt_ids, clusters)

    def rest(more: int, _: int) -> None:
        report(done + more, len(rollouts))

    for _, (present, added) in scorer.each(rollouts, hooked, left.nonzero()[:, 0], share=share, progress=rest):
        merge(present, added)


def _prompts_are_whole(prompt_ids: Tensor, clusters: Tensor) -> bool:
    """Whether no prompt's sequences are spread over several clusters, so that they may share a row."""
    pairs = torch.stack([prompt_ids, clusters], 1).unique(dim=0)
    return len(pairs) == prompt_ids.unique().numel()
