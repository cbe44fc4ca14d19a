"""Scores of a batch, put together microbatch by microbatch."""

from __future__ import annotations

import torch
from torch import nn

from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.logits import FlatScores
from entropy_probe.scoring.packing import Microbatch
from entropy_probe.types import TokenScores


class ScoreSheet:
    """Scores of every response token of a batch, in the caller's layout on the CPU.

    A pass that computes log-probabilities for another purpose fills one in as it goes. What is written twice is the
    same twice, so a microbatch may be done again.

    Args:
        rollouts: the batch.
        model: the policy, whose precision the scores have, at least float32.
    """

    def __init__(self, rollouts: Rollouts, model: nn.Module) -> None:
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        self._mask = rollouts.response_mask
        self._columns = [torch.zeros(rollouts.input_ids.shape, dtype=dtype) for _ in FlatScores._fields]

    def write(self, batch: Microbatch, scores: FlatScores) -> None:
        """Enter the scores of a microbatch."""
        for flat, column in zip(scores, self._columns, strict=True):
            batch.scatter(flat, column)

    def read(self) -> TokenScores:
        """The scores.

        Raises:
            ValueError: if a score is not finite.
        """
        logprobs, entropies, variances, discriminants = self._columns
        for name, values in (("log-probabilities", logprobs), ("entropies", entropies)):
            bad = ~torch.isfinite(values).all(1)
            if bool(bad.any()):
                raise ValueError(
                    f"scores: expected finite {name}, got non-finite ones in {int(bad.sum())} sequences (first index "
                    f"{int(bad.nonzero()[0])}); look for non-finite weights, or responses the policy cannot produce"
                )
        return TokenScores(logprobs, entropies, self._mask, variances=variances, discriminants=discriminants)
