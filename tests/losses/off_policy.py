"""A batch off policy with its scores, and a loss's coefficients against autograd on a plain formula."""

from dataclasses import replace

import torch

from entropy_probe import Rollouts
from entropy_probe.losses import build_loss
from entropy_probe.types import TokenScores

LENGTHS = (5, 0, 3, 6, 1, 4, 2, 6)


def batch(spread=0.3, seed=0, *, token_advantages=False, **columns):
    """Responses of unequal lengths with a gap, one empty, off policy, and the scores of the policy as it is."""
    generator = torch.Generator().manual_seed(seed)
    n, length = len(LENGTHS), 9
    mask = torch.zeros(n, length, dtype=torch.bool)
    for row, tokens in enumerate(LENGTHS):
        mask[row, 2 : 2 + tokens] = True
    mask[3, 4] = False

    def noise(scale):
        return scale * torch.randn(n, length, dtype=torch.float64, generator=generator)

    s = -noise(1.0).abs() - 0.05
    advantages = noise(1.0)[:, 0].sign() * (0.5 + noise(1.0)[:, 1].abs())
    if token_advantages:
        advantages = advantages[:, None] * noise(1.0)
    given = {
        "old_logprobs": (s + noise(spread)).clamp(max=-1e-3),
        "sampled_logprobs": (s + noise(spread)).clamp(max=-1e-3),
        "reference_logprobs": (s + noise(1.0)).clamp(max=-1e-3),
        "microbatch_ids": torch.tensor([4, 4, 4, 7, 7, 5, 5, 5]),
    } | columns
    ids = torch.zeros(n, length, dtype=torch.long)
    rollouts = Rollouts(ids, torch.ones_like(ids), mask, torch.arange(n) // 2, advantages, **given)
    return rollouts, TokenScores(s * mask, -s * mask, mask)


def far_batch():
    """Log ratios of every token beyond 20 in either direction for some, and inside for others."""
    rollouts, scores = batch()
    away = 15 * torch.randn(rollouts.input_ids.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = (scores.logprobs - away.clamp(min=0)) * rollouts.response_mask
    far = rollouts.old_logprobs + away.clamp(max=0)
    columns = dict.fromkeys(("old_logprobs", "sampled_logprobs", "reference_logprobs"), far)
    return replace(rollouts, **columns), TokenScores(s, -s, rollouts.response_mask)


def agree(plain, rollouts, scores, settings, *, rtol=0.0):
    """The coefficients are the gradient of the transcription, in both log-probabilities and entropies."""
    loss = build_loss(settings)
    s, h = (x.clone().requires_grad_() for x in (scores.logprobs, scores.entropies))
    expected = torch.autograd.grad(plain.loss(s, h, rollouts, loss), (s, h), allow_unused=True, materialize_grads=True)
    given = scores if loss.needs_scores(rollouts) else None
    got = loss.coefficients(rollouts, given)
    torch.testing.assert_close(got.logprobs, expected[0], rtol=rtol, atol=0 if rtol else 1e-12)
    entropies = torch.zeros_like(h) if got.entropies is None else got.entropies
    torch.testing.assert_close(entropies, expected[1], rtol=rtol, atol=0 if rtol else 1e-12)
