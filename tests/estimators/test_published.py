"""Published scores of tokens against what they are derived from: steps on the logits of one prefix."""

import math

import pytest
import torch
from torch.func import jvp

from entropy_probe import TokenScores
from entropy_probe.estimators.published import PUBLISHED, logit_step, natural_step, repo, steer, surprisal

G = torch.Generator().manual_seed(0)
LOGITS = torch.randn(6, generator=G, dtype=torch.float64)
P = torch.softmax(LOGITS, 0)
ADVANTAGES = torch.randn(6, generator=G, dtype=torch.float64)


def entropy(logits):
    log_p = torch.log_softmax(logits, 0)
    return -(log_p.exp() * log_p).sum()


def every_token() -> TokenScores:
    """One response of one token for each token there is."""
    h, mask = entropy(LOGITS), torch.ones(6, 1, dtype=torch.bool)
    discriminant = (P.square() * (P.log() + h)).sum()
    return TokenScores(P.log()[:, None], h.expand(6, 1), mask, discriminants=discriminant.expand(6, 1))


def along(directions):
    """How entropy moves along a step of the logits for each token."""
    return torch.stack([jvp(entropy, (LOGITS,), (direction,))[1] for direction in directions])


def test_exact_for_a_gradient_step_on_the_logits():
    steps = ADVANTAGES[:, None] * (torch.eye(6, dtype=torch.float64) - P)  # of A log pi
    torch.testing.assert_close(logit_step(ADVANTAGES[:, None], every_token())[:, 0], along(steps))


def test_exact_for_a_natural_gradient_step_on_the_logits():
    fisher = torch.diag(P) - torch.outer(P, P)
    steps = ADVANTAGES[:, None] * (torch.eye(6, dtype=torch.float64) - P) @ torch.linalg.pinv(fisher)
    torch.testing.assert_close(natural_step(ADVANTAGES[:, None], every_token())[:, 0], along(steps))


def test_the_same_mean_as_the_step_on_logits_where_advantages_are_centred():
    """What REPO leaves out is the same for all tokens of a prefix."""
    scores, centred = every_token(), ADVANTAGES - P @ ADVANTAGES
    a, b = (P @ forecast(centred[:, None], scores)[:, 0] for forecast in (repo, logit_step))
    assert a.item() == pytest.approx(b.item(), rel=1e-12)


def test_by_hand():
    s, h = math.log(0.25), 1.5
    scores = TokenScores(
        torch.tensor([[s, 0.0]]), torch.tensor([[h, 0.0]]), torch.tensor([[True, False]]),
        discriminants=torch.tensor([[0.1, 0.0]]),
    )  # fmt: skip
    advantages = torch.tensor([[2.0, 3.0]])
    expected = {steer: -2 * 0.75 * (s + h), surprisal: -2 * s, repo: -2 * 0.25 * (s + h)}
    for forecast, value in expected.items():
        assert forecast(advantages, scores)[0].tolist() == pytest.approx([value, 0.0], abs=1e-6)
    for name, forecast in PUBLISHED.items():
        assert forecast(advantages, scores)[0, 1] == 0, f"{name} is 0 off the response"
