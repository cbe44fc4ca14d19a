"""The interface of engines, and what the Hugging Face engine promises behind it."""

from __future__ import annotations

import inspect
import random

import pytest
import torch
from tests.notes import noted, texts

from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.sampling import (
    Completion,
    Engine,
    EvaluationSettings,
    HFGenerator,
    Prompt,
    SamplingParameters,
    UpdateSettings,
    encode_prompts,
    generate_responses,
    resample_responses,
    sample_evaluation,
    sample_evaluation_file,
    sample_update,
)
from entropy_probe.sampling.evaluation import SHARD_SEQUENCES
from entropy_probe.sampling.hf import draw_tokens
from entropy_probe.scoring.forward import Scorer

PROMPTS = [Prompt(10 * i, text, answer=text) for i, text in enumerate(["0", "012", "11", "2101", "20", "1"])]
PARAMETERS = SamplingParameters(1.0, 8)
EOS = 1


class CoinEngine:
    """An engine without a model: coin flips that depend on the seed alone, as another library might make them."""

    context_length: int | None = 40
    notes = noted("the coin is fair")

    def __init__(self) -> None:
        self.calls: list[int] = []

    def generate(self, prompts, parameters, seeds, progress=None):
        self.calls.append(len(prompts))
        return [self._respond(tuple(p), parameters, seed) for p, seed in zip(prompts, seeds, strict=True)]

    def _respond(self, prompt, parameters, seed) -> Completion:
        coin, ids = random.Random(seed), []
        while len(ids) < parameters.max_completion_length and EOS not in ids:
            ids.append(coin.choice((EOS, 2)))
        return Completion(prompt, tuple(ids), EOS not in ids, tuple(-0.5 for _ in ids))


def test_any_engine_fits_behind_the_interface(tokenizer, tmp_path):
    engine = CoinEngine()
    assert isinstance(engine, Engine)
    settings = UpdateSettings(num_prompts=4, group_size=3)
    update, report = sample_update(
        engine, tokenizer, PROMPTS, lambda responses: [float(len(x)) for x in responses], settings, PARAMETERS
    )
    assert len(update) == 12
    assert "the coin is fair" in texts(report.notes)
    evaluation, report = sample_evaluation(
        engine, tokenizer, PROMPTS, EvaluationSettings(total_sequences=30, seed=5), PARAMETERS
    )
    assert texts(report.notes) == texts(engine.notes)
    assert torch.equal(evaluation.sampled_logprobs, -0.5 * evaluation.response_mask)
    again = resample_responses(engine, evaluation, PARAMETERS, seed=5)
    assert torch.equal(again.input_ids, evaluation.input_ids)
    assert engine.calls == [12, 30, 30]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda found: found[:-1], "CoinEngine: expected 2 completions, got 1"),
        (lambda found: found[::-1], "CoinEngine: prompt 7: expected the completion to repeat its prompt's tokens"),
        (lambda found: [Completion(c.prompt_token_ids, (), False) for c in found], "response of 1 to 8 tokens, got 0"),
        (lambda found: [Completion(c.prompt_token_ids, (2,) * 9, True) for c in found], "of 1 to 8 tokens, got 9"),
        (
            lambda found: [Completion(c.prompt_token_ids, (2, 2), True, (0.0,)) for c in found],
            "log-probability for each of 2 response tokens, got 1",
        ),
        (
            lambda found: [Completion(c.prompt_token_ids, (2,), True, (float("nan"),)) for c in found],
            "expected finite log-probabilities",
        ),
    ],
)
def test_what_an_engine_returns_is_checked(monkeypatch, change, match):
    engine = CoinEngine()
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda *arguments: change(generate(*arguments)))
    with pytest.raises(ValueError, match=match):
        generate_responses(engine, [[2, 3], [4]], [7, 8], PARAMETERS, [1, 2])


def test_the_engine_says_how_long_a_sequence_may_be():
    with pytest.raises(ValueError, match=r"prompt 8: .* within the model's context of 40 tokens, got 33 \+ 8"):
        generate_responses(CoinEngine(), [[2], [2] * 33], [7, 8], PARAMETERS, [1, 2])


@pytest.fixture
def sampled(model, tokenizer):
    """Prompts with repeats, seeds, and responses to them in one batch."""
    prompts = encode_prompts(tokenizer, [PROMPTS[i] for i in (0, 1, 1, 2, 3, 1, 4, 5, 3, 3, 3, 0)] * 4)
    seeds = list(range(len(prompts)))
    return prompts, seeds, HFGenerator(model, tokenizer, 64).generate(prompts, PARAMETERS, seeds)


def tokens(completions) -> list[tuple]:
    return [(c.prompt_token_ids, c.token_ids, c.truncated) for c in completions]


@pytest.mark.parametrize("batch_size", [1, 5, 48])
def test_a_response_depends_on_its_seed_and_not_on_the_batch(model, tokenizer, sampled, batch_size):
    prompts, seeds, expected = sampled
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(batch_size)).tolist()
    engine = HFGenerator(model, tokenizer, batch_size)
    found = engine.generate([prompts[i] for i in order], PARAMETERS, [seeds[i] for i in order])
    assert tokens(found) == [tokens(expected)[i] for i in order]
    assert texts(engine.notes) == []
    other = engine.generate(prompts, PARAMETERS, [seed + 1000 for seed in seeds])
    assert sum(a == b for a, b in zip(tokens(other), tokens(expected), strict=True)) < len(prompts) / 2


def out_of_memory_above(model, monkeypatch, rows: int) -> list[int]:
    """Make the model's forward pass fail on more than ``rows`` sequences; the sizes it was called with."""
    sizes: list[int] = []
    forward = model.forward

    def limited(*, input_ids, **rest):
        sizes.append(len(input_ids))
        if len(input_ids) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(input_ids=input_ids, **rest)

    limited.__signature__ = inspect.signature(forward)  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(model, "forward", limited)
    return sizes


def test_out_of_memory_halves_the_batch_and_changes_nothing(model, tokenizer, sampled, monkeypatch):
    prompts, seeds, expected = sampled
    sizes = out_of_memory_above(model, monkeypatch, 3)
    engine = HFGenerator(model, tokenizer, 40)
    seen = []
    found = engine.generate(prompts, PARAMETERS, seeds, lambda done, total: seen.append(done))
    assert tokens(found) == tokens(expected)
    assert max(sizes) > 3
    assert texts(engine.notes) == ["sampling ran out of memory: the batch size was lowered to 2"]
    assert seen == sorted(set(seen))
    assert seen[-1] == len(prompts)


def test_a_single_sequence_that_does_not_fit_is_an_error(model, tokenizer, monkeypatch):
    out_of_memory_above(model, monkeypatch, 0)
    with pytest.raises(MemoryError, match=r"a single sequence of up to \d+ tokens does not fit the device's memory"):
        HFGenerator(model, tokenizer, 8).generate([[2, 3, 4]] * 5, PARAMETERS, range(5))
    assert not model.training


def test_equal_prompts_are_computed_once_and_ended_sequences_leave(model, tokenizer, monkeypatch):
    engine, prompts = HFGenerator(model, tokenizer, 64), [[2, 3, 4]] * 32 + [[3]] * 32
    engine.generate(prompts, PARAMETERS, range(64))  # compared with plain calls, once
    sizes = out_of_memory_above(model, monkeypatch, 10_000)
    completions = engine.generate(prompts, PARAMETERS, range(64))
    assert sizes[0] == 2
    assert sizes[1] == 64
    assert sizes == sizes[:1] + sorted(sizes[1:], reverse=True)
    longest = sum(len(c.token_ids) == 8 for c in completions)
    assert longest <= sizes[-1] <= 2 * max(1, longest) + 1 < 64


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_the_sampler_reports_the_log_probabilities_of_the_policy(architecture, tokenizer):
    from entropy_probe.demo.policy import build_model

    model = build_model(architecture, initializer_range=0.2)
    parameters = SamplingParameters(0.7, 12)
    rollouts, _ = sample_evaluation(
        HFGenerator(model, tokenizer, 16), tokenizer, PROMPTS, EvaluationSettings(total_sequences=40), parameters
    )
    scorer = Scorer(model, 0.7, 512)
    scorer.prepare(rollouts)
    torch.testing.assert_close(rollouts.sampled_logprobs, scorer.score(rollouts).logprobs, rtol=1e-4, atol=1e-4)


def test_inversion_at_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    for u, expected in ((0.0, 3), (1 - 2**-53, 1), (0.5, 3), (0.9, 1)):
        token, logprob = draw_tokens(logits, torch.tensor([u], dtype=torch.float64), 1.0)
        assert token.item() == expected
        assert logprob.item() == pytest.approx(torch.log_softmax(logits, -1)[0, expected].item())


def into_file(engine, tokenizer, directory, sequences=600, policy="p", seed=1):
    settings = EvaluationSettings(total_sequences=sequences, seed=seed)
    path = directory / "evaluation.parquet"
    report = sample_evaluation_file(
        engine, tokenizer, PROMPTS, settings, PARAMETERS, path, shards=directory / "shards", policy=policy
    )
    return Rollouts.from_parquet(path), report


def test_shards_hold_the_same_draws_as_one_batch(tokenizer, tmp_path):
    engine = CoinEngine()
    sharded, report = into_file(engine, tokenizer, tmp_path)
    assert engine.calls == [SHARD_SEQUENCES, SHARD_SEQUENCES, 600 - 2 * SHARD_SEQUENCES]
    assert [p.name for p in sorted((tmp_path / "shards").iterdir())] == [f"shard-0000{k}.parquet" for k in range(3)]
    whole, of_whole = sample_evaluation(engine, tokenizer, PROMPTS, EvaluationSettings(total_sequences=600), PARAMETERS)
    for name in ("input_ids", "attention_mask", "response_mask", "prompt_ids", "sampled_logprobs"):
        assert torch.equal(getattr(sharded, name), getattr(whole, name)), name
    assert report == of_whole
    assert 0 < report.truncated_fraction < 0.1


def test_sampling_goes_on_with_the_shard_it_stopped_in(tokenizer, tmp_path):
    engine = CoinEngine()
    expected, report = into_file(engine, tokenizer, tmp_path)
    files = sorted((tmp_path / "shards").iterdir())
    files[1].unlink()
    engine.calls.clear()
    again, of_again = into_file(engine, tokenizer, tmp_path)
    assert engine.calls == [SHARD_SEQUENCES]
    assert torch.equal(again.input_ids, expected.input_ids)
    assert of_again == report


@pytest.mark.parametrize("change", [{"policy": "q"}, {"seed": 2}, {"sequences": 601}])
def test_shards_of_another_run_are_not_taken_over(tokenizer, tmp_path, change):
    engine = CoinEngine()
    into_file(engine, tokenizer, tmp_path)
    engine.calls.clear()
    into_file(engine, tokenizer, tmp_path, **change)
    assert len(engine.calls) == 3
