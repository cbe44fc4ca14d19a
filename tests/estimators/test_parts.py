"""Token-level functions given part of a batch and sums over the whole: the parts make up the whole."""

import pytest
import torch

from entropy_probe import TokenScores
from entropy_probe.estimators import first_order as fo
from entropy_probe.estimators import uncertainty
from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.estimators.curvature import per_decision_taylor
from entropy_probe.estimators.importance import sequence_log_weights
from entropy_probe.estimators.realized import per_decision, snis
from entropy_probe.estimators.sampler import sampler_gaps
from entropy_probe.estimators.uncertainty import in_chunks
from entropy_probe.types import Units

N, L = 21, 9
PROMPTS = torch.tensor([4, 7, 1, 4, 4, 9, 7, 1, 3, 9, 9, 3, 5, 4, 1, 6, 6, 8, 2, 2, 7])
PARTS = ([4, 9, 8], [1], [], [7, 3, 5, 6, 2])


def random_scores(seed: int) -> TokenScores:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, L, (N,), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(L) >= L - lengths[:, None]  # responses at the end, prompts before them
    mask[3, -2:] = torch.tensor([False, True])  # a gap
    s, h = (torch.rand(N, L, generator=generator, dtype=torch.float64) * mask for _ in range(2))
    return TokenScores(-s, h, mask)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", ["rao_blackwell", "surprisal"])
@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_parts_make_up_the_whole(norm, kind, grouped):
    before, after, first, second = (random_scores(k) for k in range(4))
    units = Units.prompts(PROMPTS) if grouped else Units.sequences(N)
    weights = torch.rand(N, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    parts = [torch.isin(PROMPTS, torch.tensor(part)).nonzero()[:, 0] for part in PARTS]
    whole = PositionSums(sum((PositionSums.of(before.select(rows)).table for rows in parts), torch.zeros(3, L)))
    torch.testing.assert_close(whole.table, PositionSums.of(before).table, rtol=1e-14, atol=1e-14)

    def on(rows: torch.Tensor) -> list[torch.Tensor]:
        b, a, d, e = (s.select(rows) for s in (before, after, first, second))
        own = units.select(rows)
        c = fo.entropy_coefficients(b, PROMPTS[rows], own, whole, norm, kind)
        by_sequence = [c.logprobs, sequence_log_weights(b, a).T, sampler_gaps(b, a.logprobs).T]
        placed = [torch.zeros(N, x.shape[1], dtype=x.dtype).index_copy(0, rows, x) for x in by_sequence]
        by_unit = [
            fo.entropy(b, own, norm, kind).table,
            snis(a, weights[rows], own, norm, kind).table,
            per_decision(b, a, own, whole, norm).table,
            per_decision_taylor(b, d, e, own, whole, norm).table,
        ]
        return placed + by_unit

    for got, expected in zip(zip(*map(on, parts), strict=True), on(torch.arange(N)), strict=True):
        torch.testing.assert_close(sum(got), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 5, 20, 21, 100])
def test_chunks_are_whole_units_and_all_sequences_once(monkeypatch, size):
    monkeypatch.setattr(uncertainty, "CHUNK_SEQUENCES", size)
    chunks = list(in_chunks(Units.prompts(PROMPTS)))
    assert torch.cat(chunks).sort().values.tolist() == list(range(N))
    prompts = [set(PROMPTS[rows].tolist()) for rows in chunks]
    assert sum(map(len, prompts)) == len(set(PROMPTS.tolist())), "no prompt is in two chunks"
    assert all(len(rows) <= size or len(ids) == 1 for rows, ids in zip(chunks, prompts, strict=True))
    assert [rows.tolist() for rows in in_chunks(Units.sequences(0))] == [[]]
