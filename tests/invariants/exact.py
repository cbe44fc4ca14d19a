"""The enumerable policy before and after a step, with the exact value of what is estimated."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call, jvp

from entropy_probe import Rollouts, TokenScores
from entropy_probe.estimators.first_order import entropy
from entropy_probe.estimators.uncertainty import Sampled
from entropy_probe.types import Units
from tests.invariants.problems import TABLE
from tests.reference.enumeration import Table, TinyPolicy
from tests.whole_batch import per_decision, predicted, snis

STEP = 0.05


@dataclass
class Setting:
    """Scores of every response before and after a step, and their exact derivatives along it."""

    model: TinyPolicy
    table: Table
    before: TokenScores
    after: TokenScores
    slope: TokenScores
    probabilities: Tensor
    exact: dict[str, dict[str, float]]

    @classmethod
    def build(cls) -> "Setting":
        model, table = TinyPolicy(), Table.build()
        generator = torch.Generator().manual_seed(3)
        theta = {n: p.detach() for n, p in model.named_parameters()}
        delta = {n: STEP * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in theta.items()}

        def at(parameters: dict[str, Tensor]) -> "Bound":
            return Bound(model, parameters)

        def scores(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            found = table.token_scores(at(parameters))
            return found.logprobs, found.entropies

        mask = table.rollouts.response_mask
        before, slope = jvp(scores, (theta,), (delta,))
        after = scores({n: theta[n] + delta[n] for n in theta})
        exact: dict[str, dict[str, float]] = {}
        for norm in ("token", "sequence"):
            value, derivative = jvp(lambda q, norm=norm: table.entropy(at(q), norm), (theta,), (delta,))
            new = table.entropy(at({n: theta[n] + delta[n] for n in theta}), norm)
            exact[norm] = {"H": value.item(), "first": derivative.item(), "realized": (new - value).item()}
        return cls(
            model,
            table,
            TokenScores(*before, mask),
            TokenScores(*(x.detach() for x in after), mask),
            TokenScores(*slope, mask),
            table.probabilities(model).detach(),
            exact,
        )

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.multinomial(self.probabilities, n, replacement=True, generator=generator)

    def estimate(self, what: str, rows: Tensor, norm: str, kind: str = "rao_blackwell") -> Sampled:
        """One estimate from one batch, by the package's own functions."""
        before, after, slope = (s.select(rows) for s in (self.before, self.after, self.slope))
        units = Units.sequences(len(rows))
        if what == "H":
            return entropy(before, units, norm, kind).ratio()
        if what in ("snis", "clip", "psis"):
            return snis(before, after, what, units, norm, kind)
        if what == "per_decision":
            return per_decision(before, after, units, norm)
        return predicted(before, slope, self.table.rollouts.prompt_ids[rows], units, norm, kind)


def scores_at(setting: Setting, parameters: dict[str, Tensor]) -> TokenScores:
    """Every response under other parameters, differentiable."""
    return setting.table.token_scores(Bound(setting.model, parameters))


class Bound:
    """The policy with other parameters."""

    def __init__(self, model: TinyPolicy, parameters: dict[str, Tensor]) -> None:
        self.model, self.parameters_ = model, parameters

    def __call__(self, *args: Tensor) -> object:
        return functional_call(self.model, self.parameters_, args)


TARGET = {"H": "H", "first_order": "first"} | dict.fromkeys(("snis", "clip", "psis", "per_decision"), "realized")


AWAY = 0.2


def sampler_scores(model: TinyPolicy, away: float = AWAY) -> TokenScores:
    """Every response under a policy with smaller logits, as at a higher temperature."""
    theta = {n: p.detach() for n, p in model.named_parameters()}
    flatter = {n: (1 - away) * p if n.startswith("out.") else p for n, p in theta.items()}
    found = TABLE.token_scores(Bound(model, flatter))
    return TokenScores(found.logprobs.detach(), found.entropies.detach(), found.response_mask)


def sampled_elsewhere(
    model: TinyPolicy, n: int, away: float = AWAY
) -> tuple[Rollouts, tuple[TokenScores, TokenScores]]:
    """Responses of the other policy with its own log-probabilities, and their scores under the policy and under it."""
    sampler = sampler_scores(model, away)
    rows = torch.multinomial(
        sampler.sequence_logprobs.exp(), n, replacement=True, generator=torch.Generator().manual_seed(6)
    )
    own = TABLE.token_scores(model)
    scores = TokenScores(own.logprobs.detach(), own.entropies.detach(), own.response_mask)
    rollouts = replace(TABLE.rollouts.select(rows), sampled_logprobs=sampler.logprobs[rows])
    return rollouts, (scores.select(rows), sampler.select(rows))
