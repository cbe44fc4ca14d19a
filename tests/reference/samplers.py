"""Other ways to sample from the enumerable policy than the one that is probed: the probability of every response."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_probe import TokenScores
from tests.reference.enumeration import PROMPTS, TEMPERATURE, Table, TinyPolicy


def full_scores(table: Table, model: TinyPolicy, temperature: float = TEMPERATURE) -> TokenScores:
    """Scores of every response, with all that is known of them, by a route of its own."""
    log_p, s = _next_tokens(table, model, temperature)
    mask = table.rollouts.response_mask[:, 1:]
    h = -(log_p.exp() * log_p).sum(-1)
    p, centred = log_p.exp(), log_p + h[..., None]
    v, d = (p * centred.square()).sum(-1), (p.square() * centred).sum(-1)
    s, h, v, d = (torch.nn.functional.pad(x * mask, (1, 0)) for x in (s, h, v, d))
    return TokenScores(s, h, table.rollouts.response_mask, variances=v, discriminants=d)


def _next_tokens(table: Table, model: TinyPolicy, temperature: float) -> tuple[Tensor, Tensor]:
    r = table.rollouts
    log_p = torch.log_softmax(model(r.input_ids, r.attention_mask.long()).logits.detach() / temperature, -1)[:, :-1]
    return log_p, log_p.gather(-1, r.input_ids[:, 1:, None])[..., 0]


def at_temperature(table: Table, model: TinyPolicy, factor: float) -> Tensor:
    """Log-probabilities of tokens at this many times the policy's temperature, ``[N, L]``."""
    return full_scores(table, model, factor * TEMPERATURE).logprobs


def cut(table: Table, model: TinyPolicy, *, top_p: float = 1.0, top_k: int = 4) -> Tensor:
    """Log-probabilities of tokens drawn from the most likely ones, renormalised, ``[N, L]``; -inf for the others."""
    log_p, s = _next_tokens(table, model, TEMPERATURE)
    p, order = log_p.exp().sort(-1, descending=True)
    kept = (p.cumsum(-1) - p < top_p) & (torch.arange(p.shape[-1]) < top_k)
    mass = (p * kept).sum(-1)
    chosen = (order == table.rollouts.input_ids[:, 1:, None]) & kept
    found = torch.where(chosen.any(-1), s - mass.log(), -torch.inf)
    return torch.nn.functional.pad(torch.where(table.rollouts.response_mask[:, 1:], found, 0.0), (1, 0))


def trained(table: Table, steps: int = 10, learning_rate: float = 2e-3) -> TinyPolicy:
    """The policy after some AdamW steps up the exact expected reward; it is their sampler that is old."""
    model = TinyPolicy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (-(table.probabilities(model) * table.rollouts.rewards).sum()).backward()
        optimizer.step()
    return model


def draw(table: Table, logprobs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Row numbers of independent draws: a prompt with replacement, one response each."""
    probabilities = logprobs.sum(1).exp() / PROMPTS
    assert abs(float(probabilities.sum()) - 1) < 1e-9
    return torch.multinomial(probabilities, count, replacement=True, generator=generator)
