"""The reference must itself be right."""

import torch

from entropy_probe.scoring.forward import Scorer

from .enumeration import TEMPERATURE, Table, TinyPolicy


def test_probabilities_sum_to_one_and_both_entropy_forms_agree():
    model, table = TinyPolicy(), Table.build()
    p, scores = table.probabilities(model), table.token_scores(model)
    torch.testing.assert_close(p.sum(), torch.ones((), dtype=torch.float64))
    surprisal = (p * -scores.logprobs.sum(1)).sum()
    torch.testing.assert_close(table.entropy(model, "sequence"), surprisal)


def test_scorer_agrees_with_reference():
    model, table = TinyPolicy(), Table.build()
    scorer = Scorer(model, TEMPERATURE, max_tokens_per_microbatch=10)
    scorer.prepare(table.rollouts)
    got, expected = scorer.score(table.rollouts), table.token_scores(model)
    torch.testing.assert_close(got.logprobs, expected.logprobs.detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got.entropies, expected.entropies.detach(), atol=1e-12, rtol=1e-12)
