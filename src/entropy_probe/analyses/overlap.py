"""Does a batch hold another's responses, or its own twice, beyond what chance makes of it?

A policy repeats itself: equal responses to equal prompts are evidence only where the policy's own log-probabilities say
that they are rare. Formulas: ``docs/theory.md``, "Clusters and standard errors".
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.results.note import NoteKind
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.cache import digest, sequence_digests

RARE = 0.05
"""A response counts where chance repeats it less often than this in the other batch."""
MIN_SHARE = 0.05
"""Of the rare responses, or of the other batch where that is smaller: a policy that is not quite the sampler's repeats
some more than it expects."""
MAX_PROBABILITY = 1e-6
COPIES = NoteKind(
    "copies",
    "{batch}: {copies} of {sequences} sequences occur more than once, where chance explains {expected:.1f}: they "
    "count as independent and are not, so errors are too small",
    "Give every response once; look for a file that was read, or gathered from ranks, twice.",
)
SHARED = NoteKind(
    "shared_sequences",
    "{shared} of {sequences} evaluation sequences are in the update batch too, where chance explains {expected:.1f}: "
    "the step is fitted to responses that it is judged on, so predicted and realized changes are biased by what they "
    "share",
    "Leave them out of the evaluation batch, or read the one-batch prediction (mode: one_batch).",
)


@dataclass(frozen=True, eq=False)
class Contents:
    """What a batch holds, whatever its order, padding and ids.

    Attributes:
        sequences: a digest of each sequence.
        prompts: a digest of the tokens before each response.
    """

    sequences: tuple[bytes, ...]
    prompts: tuple[bytes, ...]

    @classmethod
    def of(cls, rollouts: Rollouts) -> Contents:
        """Those of a batch."""
        starts, ends = (x.int().argmax(1).tolist() for x in (rollouts.attention_mask, rollouts.response_mask))
        rows = zip(rollouts.input_ids.cpu().numpy(), starts, ends, strict=True)
        return cls(tuple(sequence_digests(rollouts)), tuple(digest(ids[a:b].tobytes()) for ids, a, b in rows))

    def same_as(self, other: Contents) -> bool:
        """Whether the other batch holds the same sequences, each as often."""
        return Counter(self.sequences) == Counter(other.sequences)


@dataclass(frozen=True)
class Overlap:
    """How many sequences are somewhere else too.

    Attributes:
        sequences: how many are.
        expected: how many of the rare ones would be by chance.
        significant: whether chance is ruled out.
    """

    sequences: int
    expected: float
    significant: bool


def shared(batch: Contents, logprobs: Float[Tensor, " N"], other: Contents) -> Overlap:
    """Which sequences of a batch are in another one too; ``logprobs`` are of its responses, nats."""
    return _overlap(batch, logprobs, Counter(other.sequences), Counter(other.prompts), 0)


def copies(batch: Contents, logprobs: Float[Tensor, " N"]) -> Overlap:
    """Which sequences of a batch are copies of others in it."""
    return _overlap(batch, logprobs, Counter(batch.sequences), Counter(batch.prompts), 1)


def _overlap(batch: Contents, logprobs: Tensor, elsewhere: Counter[bytes], draws: Counter[bytes], own: int) -> Overlap:
    """Counts of each distinct sequence against Poisson's law with the mean that the policy gives them."""
    probability = dict(zip(batch.sequences, logprobs.double().exp().tolist(), strict=True))
    drawn = dict(zip(batch.sequences, (draws[prompt] - own for prompt in batch.prompts), strict=True))
    rare = [content for content, p in probability.items() if drawn[content] * p < RARE]
    seen = sum(elsewhere[content] - own for content in rare)
    expected = math.fsum(drawn[content] * probability[content] for content in rare)
    # P(X >= seen) is the regularised lower incomplete gamma function
    chance = torch.special.gammainc(*torch.tensor([[max(seen, 1)], [expected]], dtype=torch.float64)).item()
    matched = sum(elsewhere[content] > own for content in batch.sequences)
    excess = (seen - expected) / max(1, min(len(rare), elsewhere.total()))
    significant = excess > MIN_SHARE and chance < MAX_PROBABILITY
    return Overlap(matched, expected, significant)
