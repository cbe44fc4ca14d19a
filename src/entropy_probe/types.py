"""The data that flows through the package, and the legend of shapes and units.

Legend of shapes (also used as suffixes of local names):

* ``N`` sequences, ``L`` padded tokens per sequence (prompt and response), ``V`` vocabulary,
* ``T`` response tokens of a whole batch laid out flat, ``U`` independent clusters,
* ``B`` prompts of the update batch, ``G`` responses per prompt.

Units: log-probabilities and entropies are in nats. Entropies and entropy changes of a batch are in nats per
token or nats per sequence, and every :class:`Estimate` says which. A negative change means that entropy falls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Log-probabilities and next-token entropies of sampled tokens under one set of parameters, in nats.

    Attributes:
        logprobs: ``s_t = log pi(y_t | prompt, y_<t)`` at response tokens, 0 elsewhere, ``[N, L]``.
        entropies: ``h_t``, the entropy of the next-token distribution that ``y_t`` was drawn from, at response
            tokens, 0 elsewhere, ``[N, L]``.
        response_mask: which entries count, ``[N, L]``.
        log_weights: logarithm of what each sequence counts, where another policy sampled it: ``pi / pi_sampler`` over
            its mean in the batch, float64, ``[N]``. ``None`` where all count the same.
        variances: of the surprisal of a token drawn in place of ``y_t``, nats squared, 0 off the response, ``[N, L]``.
            ``None`` where these are not the scores of a policy but their derivatives, or were put together by hand.
        discriminants: the mean of ``pi (log pi + h)`` over tokens drawn in place of ``y_t``, nats, 0 off the response,
            ``[N, L]``; ``None`` likewise.
    """

    logprobs: Float[Tensor, "N L"]
    entropies: Float[Tensor, "N L"]
    response_mask: Bool[Tensor, "N L"]
    log_weights: Float[Tensor, " N"] | None = None
    variances: Float[Tensor, "N L"] | None = None
    discriminants: Float[Tensor, "N L"] | None = None

    def select(self, rows: Tensor) -> TokenScores:
        """The scores of the sequences at the given indices, in that order."""
        columns = (self.logprobs, self.entropies, self.response_mask)
        optional = (self.log_weights, self.variances, self.discriminants)
        return TokenScores(*(x[rows] for x in columns), *(None if x is None else x[rows] for x in optional))

    @property
    def answered(self) -> Bool[Tensor, " N"]:
        """Which sequences have a response."""
        return self.response_mask.any(1)

    @property
    def weights(self) -> Float[Tensor, " N"]:
        """What each sequence counts, with mean 1 over the batch, float64."""
        if self.log_weights is None:
            return torch.ones(len(self.response_mask), dtype=torch.float64)
        return self.log_weights.double().exp()

    @property
    def sequence_logprobs(self) -> Float[Tensor, " N"]:
        """``S``, the log-probability of each response in nats, summed in float64."""
        return self.logprobs.sum(1, dtype=torch.float64)

    @property
    def response_lengths(self) -> Int[Tensor, " N"]:
        """``T``, the number of response tokens of each sequence."""
        return self.response_mask.sum(1)


@dataclass(frozen=True, eq=False)
class TokenCoefficients:
    """A scalar surrogate ``sum_it logprobs_it * s_it + entropies_it * h_it`` whose autograd gradient is an estimate.

    Attributes:
        logprobs: constant coefficient of each log-probability, ``[N, L]``.
        entropies: constant coefficient of each entropy, ``[N, L]``; ``None`` when all are 0.
    """

    logprobs: Float[Tensor, "N L"]
    entropies: Float[Tensor, "N L"] | None

    def select(self, rows: Tensor) -> TokenCoefficients:
        """The coefficients of the sequences at the given indices, in that order."""
        return TokenCoefficients(self.logprobs[rows], None if self.entropies is None else self.entropies[rows])

    @property
    def size(self) -> Float[Tensor, "N L"]:
        """How large the coefficients of each token are; 0 where it does nothing."""
        return self.logprobs.abs() + (0.0 if self.entropies is None else self.entropies.abs())


@dataclass(frozen=True, eq=False)
class Clusters:
    """Which sequences belong to the same independent cluster.

    Attributes:
        index: the cluster of each sequence, 0 to ``count - 1``, ``[N]``.
        count: the number of clusters, ``U``; those of the whole batch, also where ``index`` is that of a part of it.
    """

    index: Int[Tensor, " N"]
    count: int

    @classmethod
    def sequences(cls, num_sequences: int) -> Clusters:
        """Every sequence is a cluster: responses drawn independently, prompts with replacement."""
        return cls(torch.arange(num_sequences), num_sequences)

    @classmethod
    def prompts(cls, prompt_ids: Int[Tensor, " N"]) -> Clusters:
        """The sequences of a prompt form a cluster: distinct prompts, several responses each."""
        distinct, index = prompt_ids.unique(return_inverse=True)
        return cls(index, distinct.numel())

    def select(self, rows: Tensor) -> Clusters:
        """The clusters of the sequences at the given indices, numbered as before."""
        return Clusters(self.index[rows], self.count)

    def total(self, values: Float[Tensor, " N"]) -> Float[Tensor, " U"]:
        """Sum over the sequences of each cluster, in float64; 0 for clusters without any here, so that parts add up."""
        return torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.index, values.double())
