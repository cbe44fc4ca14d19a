"""A policy small enough to list every response, so that every expectation is a sum.

Vocabulary of four tokens (0 ends the response), prompts of one token, at most three response tokens: 40 responses per
prompt. Everything in float64 in a plain module, so that agreement can be asked for to 1e-10.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from entropy_probe import Rollouts, TokenScores

EOS, VOCABULARY, LONGEST, PROMPTS = 0, 4, 3, 3
TEMPERATURE = 0.8


class TinyPolicy(nn.Module):
    """Causal: logits depend on the mean embedding of the tokens so far. Only linear layers are trained if asked."""

    def __init__(self, seed: int = 0, width: int = 5, train_embedding: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, width, dtype=torch.float64)
        self.inner = nn.Linear(width, width, dtype=torch.float64)
        self.out = nn.Linear(width, VOCABULARY, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
        self.embed.weight.requires_grad_(train_embedding)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        mask = attention_mask.double()[..., None]
        summed = (self.embed(input_ids) * mask).cumsum(1)
        mean = summed / mask.cumsum(1).clamp(min=1)
        return SimpleNamespace(logits=self.out(torch.tanh(self.inner(mean + self.embed(input_ids)))))


def all_responses() -> list[tuple[int, ...]]:
    done = []
    for length in range(1, LONGEST + 1):
        for body in product(range(1, VOCABULARY), repeat=length - 1):
            done.append((*body, EOS))
    done += list(product(range(1, VOCABULARY), repeat=LONGEST))
    return done


@dataclass(frozen=True, eq=False)
class Table:
    """Every response to every prompt, in one batch, with a reward for each."""

    rollouts: Rollouts

    @classmethod
    def build(cls) -> Table:
        responses = all_responses()
        ids = torch.zeros(PROMPTS * len(responses), 1 + LONGEST, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for p in range(PROMPTS):
            for r, response in enumerate(responses):
                row = p * len(responses) + r
                ids[row, 0], mask[row, : len(response) + 1] = p + 1, 1
                ids[row, 1 : len(response) + 1] = torch.tensor(response)
        answers = mask.clone()
        answers[:, 0] = 0
        prompt_ids = torch.arange(PROMPTS).repeat_interleave(len(responses))
        generator = torch.Generator().manual_seed(5)
        rewards = torch.rand(len(ids), generator=generator, dtype=torch.float64)
        return cls(Rollouts(ids, mask, answers, prompt_ids, rewards=rewards))

    @property
    def per_prompt(self) -> int:
        return len(self.rollouts) // PROMPTS

    def token_scores(self, model: TinyPolicy) -> TokenScores:
        """Differentiable scores by a route that shares nothing with the package."""
        r = self.rollouts
        log_p = torch.log_softmax(model(r.input_ids, r.attention_mask.long()).logits / TEMPERATURE, -1)
        s = torch.zeros(r.input_ids.shape, dtype=torch.float64)
        h = torch.zeros_like(s)
        s[:, 1:] = log_p[:, :-1].gather(-1, r.input_ids[:, 1:, None])[..., 0] * r.response_mask[:, 1:]
        h[:, 1:] = -(log_p.exp() * log_p).sum(-1)[:, :-1] * r.response_mask[:, 1:]
        return TokenScores(s, h, r.response_mask)

    def probabilities(self, model: TinyPolicy) -> Tensor:
        """Probability of each row under a uniform choice of prompt; sums to 1."""
        return self.token_scores(model).logprobs.sum(1).exp() / PROMPTS

    def entropy(self, model: TinyPolicy, normalization: str) -> Tensor:
        """Exact H, differentiable."""
        scores, p = self.token_scores(model), self.probabilities(model)
        total = (p * scores.entropies.sum(1)).sum()
        return total if normalization == "sequence" else total / (p * scores.response_lengths).sum()

    def sample(self, model: TinyPolicy, count: int, generator: torch.Generator) -> Tensor:
        """Row numbers of ``count`` independent draws: prompt with replacement, one response each."""
        return torch.multinomial(self.probabilities(model).detach(), count, replacement=True, generator=generator)

    def sample_groups(self, model: TinyPolicy, groups: int, size: int, generator: torch.Generator) -> Tensor:
        """Row numbers of ``groups`` groups: a prompt each, drawn uniformly, with ``size`` independent responses."""
        prompts = torch.randint(PROMPTS, (groups,), generator=generator)
        p = self.probabilities(model).detach().view(PROMPTS, -1)[prompts]
        rows = torch.multinomial(p, size, replacement=True, generator=generator)
        return (rows + prompts[:, None] * self.per_prompt).flatten()

    def update_batch(self, rows: Tensor, group: int) -> Rollouts:
        """A trainer's batch: every group is a prompt of its own, advantages centred within the group."""
        batch = self.rollouts.select(rows)
        assert batch.rewards is not None
        rewards = batch.rewards.view(-1, group)
        advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
        return Rollouts(
            batch.input_ids,
            batch.attention_mask,
            batch.response_mask,
            torch.arange(len(rows) // group).repeat_interleave(group),
            advantages=advantages,
            rewards=batch.rewards,
        )


def trained_optimizer(
    model: nn.Module, seed: int = 1, lr: float = 1e-3, cls: type = torch.optim.AdamW, **options: object
) -> torch.optim.Optimizer:
    """An optimizer with a history: three steps on random gradients, the parameters put back afterwards."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    optimizer = cls(parameters, lr=lr, **options)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()
    for p, value in zip(parameters, before, strict=True):
        p.data.copy_(value)
        p.grad = None
    return optimizer
