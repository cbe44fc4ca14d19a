"""A second differentiation of the same rows, on the graphs that the first one kept."""

import pytest
import torch

from entropy_probe.gradients.hooks import hookable
from entropy_probe.gradients.per_sample import Side, sample_gradients
from entropy_probe.gradients.read_off import KeptPasses
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.isolation import evaluating
from entropy_probe.types import Clusters, TokenCoefficients
from tests.invariants.hf_problems import long_prompts, policy

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

BATCH = long_prompts()
CLUSTERS = Clusters.prompts(BATCH.prompt_ids).index


def random_side(seed: int, **more) -> Side:
    shape, generator = BATCH.input_ids.shape, torch.Generator().manual_seed(seed)
    return Side(TokenCoefficients(*torch.rand(2, *shape, generator=generator, dtype=torch.float64)), **more)


def forward_passes(scorer: Scorer, monkeypatch) -> list[int]:
    """The rows of each forward pass from here on."""
    rows, output = [], scorer.output
    monkeypatch.setattr(scorer, "output", lambda batch: (rows.append(len(batch.rows)), output(batch))[1])
    return rows


@pytest.mark.parametrize(
    ("kind", "settings", "room"),
    [
        ("lora", {}, "some"),
        ("full", {"tie_word_embeddings": True}, "all"),
        pytest.param("lora", {}, "all", marks=pytest.mark.slow),
        pytest.param("full", {}, "none", marks=pytest.mark.slow),
    ],
)
def test_kept_graphs_give_what_new_passes_give(kind, settings, room, monkeypatch):
    model, _ = policy(kind, **settings)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with evaluating(model):
        scorer = Scorer(model, 0.9, 160)
        scorer.prepare(BATCH)
        given = (scorer, parameters, BATCH, CLUSTERS)
        how = {"hooks": hookable(scorer, parameters, BATCH)}
        direction = {name: torch.randn_like(p) for name, p in parameters.items()}
        pairs = torch.randn(1, 6, sum(p.numel() for p in parameters.values()))
        sides = random_side(0, is_loss=True, store=True), random_side(1, directions=[direction], pair_with=pairs)
        expected = [sample_gradients(*given, [side], **how)[0] for side in sides]
        passes = forward_passes(scorer, monkeypatch)
        scorer.kept_tokens = {"all": 10_000, "some": 200, "none": 0}[room]
        kept = KeptPasses()
        (first,) = sample_gradients(*given, [sides[0]], **how, kept=kept)
        whole = len(passes)
        assert whole > 2
        assert {"all": len(kept.passes) == whole, "some": 0 < len(kept.passes) < whole, "none": not kept.passes}[room]
        (second,) = sample_gradients(*given, [sides[1]], **how, kept=kept)
    assert not kept.passes
    assert {"all": len(passes) == whole, "some": whole < len(passes) < 2 * whole, "none": True}[room]
    assert sum(passes[whole:]) < len(BATCH) or room == "none"
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(first.stored, expected[0].stored, **tolerance)
    torch.testing.assert_close(second.dots, expected[1].dots, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second.paired, expected[1].paired, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second.total, expected[1].total, **tolerance)


def test_graphs_are_let_go_where_memory_runs_out(monkeypatch):
    model, _ = policy("lora")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with evaluating(model):
        scorer = Scorer(model, 0.9, 160)
        scorer.prepare(BATCH)
        given, how = (scorer, parameters, BATCH, CLUSTERS), {"hooks": hookable(scorer, parameters, BATCH)}
        (expected,) = sample_gradients(*given, [random_side(1, store=True)], **how)
        scorer.kept_tokens, kept = 10_000, KeptPasses()
        sample_gradients(*given, [random_side(0, is_loss=True, store=True)], **how, kept=kept)
        surrogates, calls = scorer.surrogates, iter(range(100))

        def failing(*args):
            if next(calls) == 1:
                raise torch.OutOfMemoryError
            return surrogates(*args)

        monkeypatch.setattr(scorer, "surrogates", failing)
        (second,) = sample_gradients(*given, [random_side(1, store=True)], **how, kept=kept)
    assert not kept.passes
    assert not scorer.kept_tokens
    torch.testing.assert_close(second.stored, expected.stored, rtol=1e-4, atol=1e-5)
