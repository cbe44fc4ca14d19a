"""Stop texts end a response with the token that completes one, and change nothing else."""

from __future__ import annotations

import pytest
import torch

from entropy_probe.sampling import (
    EvaluationSettings,
    GenerationSettings,
    HFGenerator,
    Prompt,
    SamplingParameters,
    UpdateSettings,
    resample_responses,
    sample_evaluation,
    sample_update,
)
from entropy_probe.sampling.responses import cut_at_stop
from entropy_probe.scoring.forward import Scorer

PROMPTS = [Prompt(i, text) for i, text in enumerate(["0", "012", "11"])]


@pytest.mark.parametrize(
    ("text", "stop", "length"),
    [
        ("0120122", ["12"], 3),
        ("0120122", ["22", "20"], 4),
        ("012", ["2"], 3),
        ("012", ["0"], 1),
        ("0101", ["2"], None),
        ("", ["2"], None),
    ],
)
def test_cut(tokenizer, text, stop, length):
    assert cut_at_stop(tokenizer(text)["input_ids"], stop, tokenizer) == length


def test_special_tokens_and_tokens_of_several_characters_count(tokenizer):
    end = tokenizer.eos_token_id
    zero, one = tokenizer("01")["input_ids"]
    assert cut_at_stop([zero, end, one], [tokenizer.eos_token], tokenizer) == 2
    tokenizer.add_tokens(["</a> 1"])
    (long,) = tokenizer("</a> 1")["input_ids"]
    # the token that completes the text stays whole, whatever it holds besides
    assert cut_at_stop([zero, long, one], ["</a>"], tokenizer) == 2


def _batch(model, tokenizer, stop):
    engine, parameters = HFGenerator(model, tokenizer), SamplingParameters(1.0, 6, stop)
    rollouts, report = sample_evaluation(engine, tokenizer, PROMPTS, EvaluationSettings(total_sequences=60), parameters)
    return engine, parameters, rollouts, report


def test_a_stopped_batch_is_the_unstopped_one_cut(model, tokenizer):
    _, _, whole, plain = _batch(model, tokenizer, ())
    engine, parameters, cut, report = _batch(model, tokenizer, ("12", "00"))
    assert plain.stopped_fraction == 0 < report.stopped_fraction < 1
    stopped = 0
    for i in range(len(whole)):
        response = whole.input_ids[i][whole.response_mask[i]].tolist()
        length = cut_at_stop(response, ("12", "00"), tokenizer)
        stopped += length is not None
        assert cut.input_ids[i][cut.response_mask[i]].tolist() == response[:length]
        kept = whole.sampled_logprobs[i][whole.response_mask[i]][:length]
        assert torch.equal(cut.sampled_logprobs[i][cut.response_mask[i]], kept)
    assert report.stopped_fraction == stopped / 60
    ended = sum(tokenizer.eos_token_id in row.tolist() for row in cut.input_ids)
    assert report.truncated_fraction == pytest.approx((60 - stopped - ended) / 60)
    again = resample_responses(engine, cut, parameters, seed=1, tokenizer=tokenizer)
    assert torch.equal(again.input_ids, cut.input_ids)


def test_surprisal_minus_entropy_has_mean_zero_up_to_the_stop(model, tokenizer):
    """The stop is a rule on the past: with it, as without, each token is a draw of the policy."""
    engine, parameters = HFGenerator(model, tokenizer), SamplingParameters(1.0, 6, ("1", "02"))
    settings = EvaluationSettings(total_sequences=1500)
    rollouts, _ = sample_evaluation(engine, tokenizer, PROMPTS, settings, parameters)
    scorer = Scorer(model, 1.0, 4096)
    scorer.prepare(rollouts)
    scores = scorer.score(rollouts)
    excess = torch.where(rollouts.response_mask, -scores.logprobs.double() - scores.entropies.double(), 0.0).sum(1)
    assert abs(float(excess.mean() / excess.std()) * 1500**0.5) < 4.5


def test_stop_needs_text_and_a_tokenizer(model, tokenizer):
    with pytest.raises(ValueError, match="stop: expected texts of at least one character"):
        SamplingParameters(1.0, 4, ("a", ""))
    with pytest.raises(ValueError, match="at least 1 character"):
        GenerationSettings(stop=("",))
    engine, parameters, cut, _ = _batch(model, tokenizer, ("1",))
    with pytest.raises(ValueError, match=r"expected the tokenizer beside stop texts \['1'\], got none"):
        resample_responses(engine, cut, parameters, seed=1)


def test_rewards_see_the_cut_response(model, tokenizer):
    engine, parameters = HFGenerator(model, tokenizer), SamplingParameters(1.0, 6, ("1",))
    seen = []

    def reward(completions, completion_ids, **kwargs):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [float(len(text)) for text in completions]

    sample_update(engine, tokenizer, PROMPTS, reward, UpdateSettings(num_prompts=3, group_size=8), parameters)
    assert any("1" in text for text, _ in seen)
    assert all("1" not in text[:-1] for text, _ in seen)
    assert all(tokenizer.decode(ids, skip_special_tokens=True) == text for text, ids in seen)
