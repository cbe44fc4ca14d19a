"""What draws of one prompt have in common, and how many to draw of each."""

import pytest
import torch

from entropy_probe.estimators.draws import best_draws, between
from entropy_probe.types import Clusters


def drawn(counts: torch.Tensor, share: float, generator: torch.Generator) -> tuple[torch.Tensor, Clusters]:
    prompt = torch.arange(len(counts)).repeat_interleave(counts)
    of_prompt, own = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (len(counts), len(prompt)))
    return share**0.5 * of_prompt[prompt] + (1 - share) ** 0.5 * own, Clusters.prompts(prompt)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_components_are_unbiased_and_the_effect_is_that_on_the_mean(share):
    generator = torch.Generator().manual_seed(4)
    counts = torch.tensor([2, 4, 3, 4, 6, 5] * 5)
    batches = [drawn(counts, share, generator) for _ in range(400)]
    values, influences = [between(x - x.mean(), prompts) for x, prompts in batches], [x.mean() for x, _ in batches]
    shares = torch.tensor([one.share for one in values])
    assert abs(shares.mean() - share) < 4 * shares.std() / 400**0.5 + 0.01
    effect = torch.stack(influences).var() * counts.sum()
    assert torch.tensor([one.design_effect for one in values]).mean() == pytest.approx(effect.item(), rel=0.2)
    assert 3.5 < values[0].draws < 4.0


def test_without_repeated_prompts_or_variance_there_is_none():
    assert between(torch.randn(5), Clusters.sequences(5)) is None
    assert between(torch.randn(4), Clusters.prompts(torch.zeros(4, dtype=torch.long))) is None
    assert between(torch.zeros(4), Clusters.prompts(torch.tensor([0, 0, 1, 1]))) is None


@pytest.mark.parametrize(("share", "prompt", "response"), [(0.05, 60.0, 40.0), (0.3, 20.0, 20.0), (0.1, 500.0, 20.0)])
def test_the_best_number_of_draws_has_the_least_variance_for_its_cost(share, prompt, response):
    costs = {k: (1 + (k - 1) * share) / k * (prompt + k * response) for k in range(1, 17)}
    assert costs[best_draws(share, prompt, response)] <= min(costs.values()) * 1.02


def test_next_to_nothing_in_common_is_bounded():
    assert best_draws(-0.1, 40.0, 40.0) == best_draws(0.02, 40.0, 40.0) == 7
    assert best_draws(0.0, 4000.0, 4.0) == 16
    assert best_draws(1.0, 40.0, 40.0) == 1
