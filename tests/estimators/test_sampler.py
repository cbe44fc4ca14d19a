"""Log-probabilities of a sampler: whether the tokens were drawn with them, and known ways of recording them wrongly."""

import math

import pytest
import torch
from torch import Tensor

from entropy_probe import TokenScores
from entropy_probe.estimators.sampler import (
    MISTAKES,
    Mismatch,
    mistake_sums,
    recorded_amiss,
    sampler_gaps,
    sampler_mismatch,
)
from tests.reference.enumeration import Table, TinyPolicy
from tests.reference.samplers import at_temperature, cut, draw, full_scores

TABLE, MODEL = Table.build(), TinyPolicy()
SCORES = full_scores(TABLE, MODEL)


def mismatch(scores: TokenScores, sampled: Tensor) -> Mismatch:
    return sampler_mismatch(sampler_gaps(scores, sampled), int(scores.response_mask.sum()))


@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_tokens_tell_whose_log_probabilities_they_were_drawn_with(factor):
    """The same two sets of numbers, tokens drawn from the one or from the other."""
    other, generator = at_temperature(TABLE, MODEL, factor), torch.Generator().manual_seed(0)
    of_policy = [draw(TABLE, SCORES.logprobs, 1000, generator) for _ in range(50)]
    of_sampler = [draw(TABLE, other, 1000, generator) for _ in range(50)]
    assert min(mismatch(SCORES.select(rows), other[rows]).z for rows in of_policy) > 4
    assert max(mismatch(SCORES.select(rows), other[rows]).z for rows in of_sampler) < 4


def test_a_renormalised_part_of_the_vocabulary_is_never_less_likely():
    part, generator = cut(TABLE, MODEL, top_p=0.8), torch.Generator().manual_seed(0)
    rows = draw(TABLE, part, 300, generator)
    found = mismatch(SCORES.select(rows), part[rows])
    assert found.never_lower
    assert found.z < 4
    hot = at_temperature(TABLE, MODEL, 1.2)
    rows = draw(TABLE, hot, 300, generator)
    assert not mismatch(SCORES.select(rows), hot[rows]).never_lower


def gapped() -> TokenScores:
    """Long responses with a gap, as tool output leaves it, beside a prompt and padding; one of a single token."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(40, 14, dtype=torch.bool)
    mask[:, 2:12] = True
    mask[:, 5:7] = False
    mask[0, 3:] = False
    s = -3 * torch.rand(mask.shape, generator=generator, dtype=torch.float64).square() * mask
    return TokenScores(s, mask.double(), mask)


def recorded(scores: TokenScores, mistake: str) -> Tensor:
    """The log-probabilities as the mistake would have them, by loops; garbage off the response."""
    out = torch.full_like(scores.logprobs, 7.0)
    for row, mask in enumerate(scores.response_mask):
        places = mask.nonzero()[:, 0].tolist()
        s = scores.logprobs[row, places].tolist()
        made = {
            "all 0": [0.0] * len(s),
            "sum": [sum(s)] * len(s),
            "mean": [sum(s) / len(s)] * len(s),
            "with the prompt's": [sum(s) - 11.0] * len(s),
            "running": [sum(s[: k + 1]) for k in range(len(s))],
            "before": [-1.3, *s[:-1]],
            "after": [*s[1:], 0.0],
            "sign": [-x for x in s],
            "base 10": [x / math.log(10) for x in s],
            "base 2": [x / math.log(2) for x in s],
            "probabilities": [math.exp(x) for x in s],
            "none": [x - 0.2 * (k % 3) for k, x in enumerate(s)],
        }[mistake]
        out[row, places] = torch.tensor(made, dtype=torch.float64)
    return out


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("all 0", "all 0"),
        ("sum", "same number at every token"),
        ("mean", "same number at every token"),
        ("with the prompt's", "same number at every token"),
        ("running", "running sums"),
        ("before", "token before"),
        ("after", "token after"),
        ("sign", "wrong sign"),
        ("base 10", "base 10"),
        ("base 2", "base 2"),
        ("probabilities", "not their logarithms"),
        ("none", None),
    ],
)
def test_mistakes_are_recognised(mistake, said):
    scores = gapped()
    sampled = recorded(scores, mistake)
    sums = mistake_sums(scores, sampled)
    found = recorded_amiss(sums, mismatch(scores, sampled))
    assert found is None if said is None else found is not None and said in found
    parts = torch.cat([mistake_sums(scores.select(rows), sampled[rows]) for rows in torch.arange(40).split(17)], 1)
    assert torch.equal(parts, sums)
    noise = 0.02 * torch.randn(sampled.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noisy = torch.where(sampled == 0, 0.0, sampled + noise)
    assert recorded_amiss(mistake_sums(scores, noisy), mismatch(scores, noisy)) == found


def test_log_probabilities_near_0_are_not_missing_ones():
    """As where the batch is checked against other prompts, at which its tokens are unlikely."""
    scores = gapped()
    near = torch.where(scores.response_mask, -0.1, 0.0).double() * (scores.logprobs < -0.5)
    assert recorded_amiss(mistake_sums(scores, near), mismatch(scores, near)) is None
    none = torch.zeros_like(near)
    assert recorded_amiss(mistake_sums(scores, none), mismatch(scores, none)) == "all 0, as where none were recorded"


def test_a_uniform_sampler_is_no_mistake():
    """Its log-probabilities are the same at every token, and right."""
    uniform = -math.log(4) * TABLE.rollouts.response_mask.double()
    rows = draw(TABLE, uniform, 300, torch.Generator().manual_seed(0))
    scores = SCORES.select(rows)
    assert recorded_amiss(mistake_sums(scores, uniform[rows]), mismatch(scores, uniform[rows])) is None
    assert len(MISTAKES) * 3 == len(mistake_sums(scores, uniform[rows]))
