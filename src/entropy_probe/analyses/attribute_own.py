"""Contributions from one batch: of each prompt's tokens to the entropy of the other prompts' responses.

Formulas: ``docs/theory.md``, "Attribution".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.analyses.own_batch import OwnPrediction
from entropy_probe.analyses.predict import entropy_surrogate
from entropy_probe.gradients.cross import gradient_pair
from entropy_probe.named import dot
from entropy_probe.scoring.slopes import SlopeMethod
from entropy_probe.steps.plan import scaled
from entropy_probe.types import TokenCoefficients, TokenScores


@dataclass(frozen=True, eq=False)
class OwnTerms:
    """What prompts' gradients add through their own entropy gradients, which is left out of contributions.

    Attributes:
        tokens: of this rank's sequences, ``[n, L]``.
        by_parameter: summed over all prompts, by parameter.
        prompts: prompts of the batch, B.
    """

    tokens: Float[Tensor, "n L"]
    by_parameter: dict[str, float]
    prompts: int

    def others(self, whole: Tensor) -> Tensor:
        """Contributions of tokens through the mean entropy gradient of the other prompts, from those through all."""
        return self.prompts / (self.prompts - 1) * (whole - self.tokens)

    def others_of(self, name: str, whole: float) -> float:
        """The same of a parameter."""
        return self.prompts / (self.prompts - 1) * (whole - self.by_parameter.get(name, 0.0))


def token_contributions(loss: TokenCoefficients, slopes: TokenScores) -> Float[Tensor, "n L"]:
    """Tokens' contributions from the slopes of their scores along the entropy gradient, as the step scales it."""
    # adding 0 turns the -0 of a token without an advantage into 0
    tokens = loss.logprobs.double() * slopes.logprobs.double() + 0.0
    if loss.entropies is not None:
        tokens += loss.entropies.double() * slopes.entropies.double()
    return tokens


def own_terms(prediction: OwnPrediction, method: SlopeMethod) -> OwnTerms:
    """Prompt by prompt: its entropy gradient, and the slopes of its own tokens along that."""
    plan, policy, step = prediction.plan, prediction.plan.policy, prediction.plan.step
    local, loss, own = plan.batch.update.local, plan.batch.loss, plan.evaluation.own
    assert step.gradient_scale is not None
    factor, surrogate = (
        -step.gradient.factor / plan.before.sums.size.sum().item(),
        entropy_surrogate(plan, prediction.horizon),
    )
    tokens, products = torch.zeros(own.input_ids.shape, dtype=torch.float64), dict.fromkeys(policy.parameters, 0.0)
    clusters = local.local_clusters
    with policy.clock.phase("own attribution") as progress, policy.on_rank(local):
        for unit, rows in enumerate(torch.split(clusters.argsort(stable=True), clusters.bincount().tolist())):
            x, y = gradient_pair(policy.scorer, policy.parameters, own, rows, surrogate, loss)
            direction = scaled({name: x.get(name) for name in policy.parameters}, step.gradient_scale, factor)
            for name in x.keys() & y.keys():
                products[name] += dot({name: direction[name]}, {name: y[name]})
            tokens[rows] = token_contributions(loss.select(rows), method.along(direction, own.select(rows)).slopes)
            progress(unit + 1, len(local.present_clusters))
    summed = policy.ranks.sum(torch.tensor([products[name] for name in policy.parameters], dtype=torch.float64))
    by_parameter = dict(zip(policy.parameters, summed.tolist(), strict=True))
    return OwnTerms(tokens, by_parameter, plan.batch.update.prompts.count)
