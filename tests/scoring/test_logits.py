"""Chunked head against dense float64 autograd."""

import pytest
import torch

from entropy_probe.scoring import logits as module
from entropy_probe.scoring.logits import (
    FlatScores,
    HeadBasis,
    OutputHead,
    head_scores,
    head_surrogate,
    logit_scores,
    plain_scores,
)


def example(bias: bool, dtype: torch.dtype = torch.float64, tokens: int = 300):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 6, generator=g, dtype=dtype)
    weight = torch.randn(50, 6, generator=g, dtype=dtype)
    offset = torch.randn(50, generator=g, dtype=dtype) if bias else None
    targets = torch.randint(0, 50, (tokens,), generator=g)
    return hidden, weight, offset, targets


def dense(hidden, weight, bias, targets, temperature):
    log_p = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias) / temperature, -1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def moments(hidden, weight, bias, temperature):
    """The variance of log p, and the mean of p (log p + h), over the vocabulary."""
    log_p = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias) / temperature, -1).detach()
    p, centred = log_p.exp(), log_p - (log_p.exp() * log_p).sum(-1, keepdim=True)
    return (p * centred.square()).sum(-1), (p.square() * centred).sum(-1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_and_gradients(bias, temperature, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 1)  # the least chunk, 64 tokens, so that there are several
    hidden, weight, offset, targets = example(bias)
    inputs = [x.requires_grad_() for x in (hidden, weight, offset) if x is not None]
    s, h = dense(hidden, weight, offset, targets, temperature)
    head = OutputHead(weight, offset, temperature)
    got = head_scores(head, hidden, targets)
    logits = torch.nn.functional.linear(hidden, weight, offset)
    expected = FlatScores(s.detach(), h.detach(), *moments(hidden, weight, offset, temperature))
    torch.testing.assert_close(got, expected)
    before = logits.detach().clone()
    torch.testing.assert_close(plain_scores(logits.detach(), targets, temperature), expected)
    assert torch.equal(logits, before)
    torch.testing.assert_close(logit_scores(logits, targets, temperature), (s, h))
    g = torch.Generator().manual_seed(1)
    a, c = (torch.randn(len(targets), generator=g, dtype=torch.float64) for _ in range(2))
    for entropies in (c, None):
        expected = (a * s).sum() + (0 if entropies is None else (entropies * h).sum())
        chunks = []
        value = head_surrogate(head, hidden, targets, a, entropies, scores=chunks.append)
        assert len(chunks) == 5
        torch.testing.assert_close(FlatScores.joined(chunks), got)
        torch.testing.assert_close(value, expected)
        basis = HeadBasis.of(head, hidden.detach(), targets)
        torch.testing.assert_close(basis.scores, got)
        by_basis = basis.surrogate(hidden, a, entropies)
        torch.testing.assert_close(by_basis, expected)
        torch.testing.assert_close(
            torch.autograd.grad(3 * by_basis, hidden), torch.autograd.grad(3 * expected, hidden, retain_graph=True)
        )
        # a factor behind the surrogate must reach the gradient
        torch.testing.assert_close(
            torch.autograd.grad(3 * value, inputs), torch.autograd.grad(3 * expected, inputs, retain_graph=True)
        )


def test_never_holds_all_logits():
    hidden, weight, _, targets = example(False, tokens=4096)
    weight = weight.repeat(4000, 1)
    seen = []
    original = OutputHead.logits

    class Watched(OutputHead):
        def logits(self, hidden):
            out = original(self, hidden)
            seen.append(out.shape[0])
            return out

    head_scores(Watched(weight, None, 1.0), hidden[:200], targets[:200])
    assert max(seen) == 64


def test_masked_vocabulary_entries_add_nothing():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 12, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 9, (8,), generator=g)
    masked = torch.cat([logits[:, :9], torch.full((8, 3), -torch.inf, dtype=torch.float64)], 1)
    torch.testing.assert_close(logit_scores(masked, targets, 1.0), logit_scores(logits[:, :9], targets, 1.0))
    bias = torch.zeros(12, dtype=torch.float64)
    bias[9:] = -torch.inf
    eye = torch.eye(12, dtype=torch.float64)
    finite = OutputHead(eye, bias, 1.0)
    found = head_scores(finite, logits, targets)
    torch.testing.assert_close(found, plain_scores(logits[:, :9], targets, 1.0))
    torch.testing.assert_close(found[:2], logit_scores(logits[:, :9], targets, 1.0))
    impossible = torch.full_like(targets, 10)
    assert torch.isinf(head_scores(finite, logits, impossible)[0]).all()
    assert torch.isinf(logit_scores(masked, impossible, 1.0)[0]).all()


def test_half_precision_hidden_states_are_scored_in_float32():
    hidden, weight, _, targets = example(False, torch.bfloat16)
    found = head_scores(OutputHead(weight, None, 1.0), hidden, targets)
    assert {x.dtype for x in found} == {torch.float32}
