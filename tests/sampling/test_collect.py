from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from tests.notes import texts

from entropy_probe import Rollouts
from entropy_probe.sampling import (
    EvaluationSettings,
    GenerationSettings,
    HFGenerator,
    Prompt,
    SamplingParameters,
    UpdateSettings,
    encode_prompts,
    group_advantages,
    resample_responses,
    sample_evaluation,
    sample_pilot,
    sample_update,
)
from entropy_probe.sampling.collect import repeated_prompts

PROMPTS = [Prompt(10 * i, text, answer=text) for i, text in enumerate(["0", "012", "11", "2101", "20", "1"])]
BATCH = 7


def _length(prompts, responses):
    return [float(len(response)) for response in responses]


def _update(model, tokenizer, reward=_length, prompts=PROMPTS, batch_size=BATCH, **settings):
    settings = UpdateSettings(**({"num_prompts": 4, "group_size": 3} | settings))
    engine = HFGenerator(model, tokenizer, batch_size)
    return sample_update(engine, tokenizer, prompts, reward, settings, SamplingParameters(1.0, 4))


def _evaluate(model, tokenizer, prompts=PROMPTS, batch_size=BATCH, max_completion_length=4, **settings):
    engine = HFGenerator(model, tokenizer, batch_size)
    parameters = SamplingParameters(1.0, max_completion_length)
    return sample_evaluation(engine, tokenizer, prompts, EvaluationSettings(**settings), parameters)


def _assert_well_formed(rollouts, tokenizer, max_length=4):
    """Right-padded; each row starts with its own prompt and ends with its own response."""
    encoded = dict(zip([p.id for p in PROMPTS], encode_prompts(tokenizer, PROMPTS), strict=True))
    for i in range(len(rollouts)):
        prompt = encoded[int(rollouts.prompt_ids[i])]
        length = int(rollouts.attention_mask[i].sum())
        assert rollouts.attention_mask[i, :length].all()
        assert rollouts.input_ids[i, : len(prompt)].tolist() == prompt
        position = torch.arange(rollouts.input_ids.shape[1])
        assert torch.equal(rollouts.response_mask[i], (position >= len(prompt)) & (position < length))
        response = rollouts.input_ids[i, len(prompt) : length].tolist()
        assert tokenizer.eos_token_id not in response[:-1]
        assert response[-1] == tokenizer.eos_token_id or len(response) == max_length


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_update_batch(model, tokenizer, pad_is_eos):
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    seen = {}

    def reward(prompts, responses):
        seen["prompts"], seen["responses"] = list(prompts), list(responses)
        return _length(prompts, responses)

    rollouts, report = _update(model, tokenizer, reward)
    _assert_well_formed(rollouts, tokenizer)
    groups = rollouts.prompt_ids.view(4, 3)
    assert (groups == groups[:, :1]).all()
    assert rollouts.num_prompts == 4
    assert [p.id for p in seen["prompts"]] == rollouts.prompt_ids.tolist()
    assert not any("<" in response for response in seen["responses"])  # special tokens are left out
    for row, text in enumerate(seen["responses"]):
        kept = rollouts.input_ids[row][rollouts.response_mask[row]]
        assert tokenizer.decode(kept, skip_special_tokens=True) == text
    assert rollouts.rewards.tolist() == [len(text) for text in seen["responses"]]
    assert torch.equal(rollouts.advantages, group_advantages(rollouts.rewards, rollouts.prompt_ids, "group"))
    assert rollouts.advantages.abs().max() > 0.1
    assert (report.num_sequences, report.num_prompts, report.prompts_tried, report.rounds) == (12, 4, 4, 1)
    assert report.prompts_dropped == 0
    assert report.reward_mean == pytest.approx(float(rollouts.rewards.mean()))
    assert report.mean_response_length == pytest.approx(float(rollouts.response_lengths.double().mean()))
    last = rollouts.input_ids[torch.arange(12), rollouts.attention_mask.sum(1) - 1]
    assert report.truncated_fraction == pytest.approx(float((last != tokenizer.eos_token_id).double().mean()))


def _same(a, b):
    return torch.equal(a.prompt_ids, b.prompt_ids) and torch.equal(a.input_ids, b.input_ids)


def test_seeds(model, tokenizer):
    first, _ = _update(model, tokenizer, seed=5)
    torch.manual_seed(99)
    assert _same(first, _update(model, tokenizer, seed=5)[0])
    assert not _same(first, _update(model, tokenizer, seed=6)[0])
    first, _ = _evaluate(model, tokenizer, total_sequences=12, seed=5)
    assert _same(first, _evaluate(model, tokenizer, total_sequences=12, seed=5)[0])
    assert not _same(first, _evaluate(model, tokenizer, total_sequences=12, seed=6)[0])


def test_the_draw_does_not_depend_on_the_batching(model, tokenizer):
    for sample, arguments in ((_update, {}), (_evaluate, {"total_sequences": 15})):
        a, _ = sample(model, tokenizer, batch_size=2, **arguments)
        b, _ = sample(model, tokenizer, batch_size=100, **arguments)
        assert _same(a, b)
        assert torch.allclose(a.sampled_logprobs, b.sampled_logprobs, atol=1e-5)
        _assert_well_formed(a, tokenizer)


def test_the_seed_reaches_the_responses(model, tokenizer):
    """With a single prompt the draw is always the same, so only the responses can differ."""
    one = {"prompts": PROMPTS[:1]}
    a, b = (_update(model, tokenizer, num_prompts=1, group_size=20, seed=seed, **one)[0] for seed in (5, 6))
    assert not torch.equal(a.input_ids, b.input_ids)
    a, b = (_evaluate(model, tokenizer, total_sequences=20, seed=seed, **one)[0] for seed in (5, 6))
    assert not torch.equal(a.input_ids, b.input_ids)


def test_update_and_evaluation_do_not_share_random_numbers(model, tokenizer):
    update, _ = _update(model, tokenizer, prompts=PROMPTS[:1], num_prompts=1, group_size=20, seed=3)
    evaluation, _ = _evaluate(model, tokenizer, prompts=PROMPTS[:1], total_sequences=20, seed=3)
    assert not torch.equal(update.input_ids, evaluation.input_ids)


def test_evaluation_draws_with_replacement(model, tokenizer):
    n, k = 3000, len(PROMPTS)
    rollouts, report = _evaluate(model, tokenizer, batch_size=1000, max_completion_length=1, total_sequences=n)
    ids, counts = rollouts.prompt_ids.unique(return_counts=True)
    assert ids.tolist() == [p.id for p in PROMPTS]
    z = (counts - n / k) / (n / k * (1 - 1 / k)) ** 0.5
    assert z.abs().max() < 4.5
    adjacent = float((rollouts.prompt_ids[1:] == rollouts.prompt_ids[:-1]).double().mean())
    assert abs(adjacent - 1 / k) < 4.5 * (1 / k * (1 - 1 / k) / n) ** 0.5  # draws are independent
    assert rollouts.advantages is rollouts.rewards is None
    assert (report.num_sequences, report.num_prompts, report.reward_mean) == (n, k, None)


def test_evaluation_batch(model, tokenizer):
    rollouts, report = _evaluate(model, tokenizer, total_sequences=20)
    _assert_well_formed(rollouts, tokenizer)
    assert report.num_prompts == rollouts.num_prompts < 20
    assert report.mean_response_length == pytest.approx(float(rollouts.response_lengths.double().mean()))


MANY = [
    Prompt(10 * i, text, answer=text)
    for i, text in enumerate(["0", "012", "11", "2101", "20", "1", "00", "10", "02", "22", "12", "21"])
]


def test_evaluation_draws_several_of_distinct_prompts(model, tokenizer):
    first, report = _evaluate(model, tokenizer, prompts=MANY, num_prompts=10, draws_per_prompt=3)
    groups = first.prompt_ids.view(10, 3)
    assert (groups == groups[:, :1]).all()
    assert len(groups[:, 0].unique()) == 10
    assert (report.num_sequences, report.num_prompts) == (30, 10)
    assert len({tuple(row.tolist()) for row in first.input_ids}) > 15  # responses differ within a prompt
    assert _same(first, _evaluate(model, tokenizer, prompts=MANY, total_sequences=30, draws_per_prompt=3)[0])
    with pytest.raises(ValueError, match="at most the 12 prompts of the source, got 13 with 2 draws each"):
        _evaluate(model, tokenizer, prompts=MANY, num_prompts=13, draws_per_prompt=2)


@pytest.mark.parametrize(
    ("settings", "prompts", "sequences"),
    [({"draws_per_prompt": "auto", "num_prompts": 12}, 12, 60), ({"relative_error": 0.1}, None, 64),
     ({"max_minutes": 1, "draws_per_prompt": 8}, 10, 80)],
)  # fmt: skip
def test_a_pilot_is_drawn_as_the_batch_is_and_shares_nothing_with_it(model, tokenizer, settings, prompts, sequences):
    settings = EvaluationSettings(**settings, seed=3)
    assert settings.needs_pilot
    subject = (HFGenerator(model, tokenizer, 64), tokenizer, MANY)
    pilot, report = sample_pilot(*subject, settings, SamplingParameters(1.0, 4))
    assert len(pilot) == report.num_sequences == sequences
    assert prompts is None or pilot.num_prompts == prompts
    assert report.seconds > 0
    batch, _ = sample_evaluation(*subject, settings.pilot(len(MANY)), SamplingParameters(1.0, 4))
    assert not _same(pilot, batch)


def test_sizes_in_place_of_a_wish():
    auto = EvaluationSettings(total_sequences=100, draws_per_prompt="auto", seed=7)
    assert auto.num_clusters is None
    assert auto.sized(100, 4) == EvaluationSettings(num_prompts=25, draws_per_prompt=4, seed=7)
    assert EvaluationSettings(relative_error=0.1).sized(500, None) == EvaluationSettings(total_sequences=500)
    assert EvaluationSettings(num_prompts=20, draws_per_prompt="auto").sized(0, 5).num_clusters == 20
    assert EvaluationSettings(total_sequences=48, draws_per_prompt=4).num_clusters == 12


def test_update_draws_uniformly_without_replacement(model, tokenizer):
    counts = dict.fromkeys([p.id for p in PROMPTS], 0)
    for seed in range(120):
        settings = UpdateSettings(num_prompts=2, group_size=2, seed=seed, allow_zero_advantages=True)
        engine = HFGenerator(model, tokenizer)
        rollouts, _ = sample_update(engine, tokenizer, PROMPTS, _length, settings, SamplingParameters(1.0, 1))
        drawn = set(rollouts.prompt_ids.tolist())
        assert len(drawn) == 2
        for prompt_id in drawn:
            counts[prompt_id] += 1
    p = 2 / 6
    assert all(abs(n - 120 * p) < 4.5 * (120 * p * (1 - p)) ** 0.5 for n in counts.values())


def _only_odd_vary(prompts, responses):
    """Prompts 10, 30 and 50 get varied rewards, prompts 0, 20 and 40 equal ones."""
    return [float(i % 2) if prompt.id % 20 else 0.25 for i, prompt in enumerate(prompts)]


def test_filter_resamples_other_prompts(model, tokenizer):
    rollouts, report = _update(
        model, tokenizer, _only_odd_vary, num_prompts=3, filter_zero_advantage=True, max_resampling_rounds=9
    )
    assert sorted(set(rollouts.prompt_ids.tolist())) == [10, 30, 50]
    assert len(rollouts) == 9
    _assert_well_formed(rollouts, tokenizer)
    assert (rollouts.advantages.view(3, 3).abs().max(1).values > 0.1).all()
    assert report.num_prompts == 3
    assert report.rounds > 1
    assert report.prompts_dropped == report.prompts_tried - 3 > 0
    assert texts(report.notes) == []


def test_filter_falls_short_and_says_so(model, tokenizer):
    rollouts, report = _update(
        model, tokenizer, _only_odd_vary, num_prompts=5, filter_zero_advantage=True, max_resampling_rounds=9
    )
    assert rollouts.num_prompts == report.num_prompts == 3
    assert (report.prompts_tried, report.prompts_dropped) == (6, 3)
    assert texts(report.notes) == ["filter_zero_advantage: asked for 5 prompts, got 3 after trying 6 in 2 rounds"]


def test_filter_stops_at_the_bound(model, tokenizer):
    _, report = _update(
        model, tokenizer, _only_odd_vary, num_prompts=4, filter_zero_advantage=True, max_resampling_rounds=0
    )
    assert report.rounds == 1
    assert report.prompts_tried == 4
    assert report.num_prompts < 4
    assert "got" in texts(report.notes)[0]


def test_without_filter_equal_rewards_are_kept_and_reported(model, tokenizer):
    rollouts, report = _update(model, tokenizer, _only_odd_vary, num_prompts=6)
    assert rollouts.num_prompts == 6
    assert texts(report.notes) == ["3 of 6 prompts have equal rewards, so their advantages are 0"]
    assert (rollouts.advantages[rollouts.prompt_ids % 20 == 0] == 0).all()


def test_equal_rewards_everywhere_are_an_error_unless_allowed(model, tokenizer):
    def by_prompt(prompts, responses):
        """Differs between prompts, never within one."""
        return [float(prompt.id) for prompt in prompts]

    with pytest.raises(
        ValueError, match=r"equal ones for each of 4 prompts, such as '.*' to prompt \d+ \(answer '"
    ) as no:
        _update(model, tokenizer, by_prompt)
    assert str(no.value).count(" with reward ") == 2
    rollouts, report = _update(model, tokenizer, by_prompt, allow_zero_advantages=True)
    assert not rollouts.advantages.any()
    assert texts(report.notes)[0].startswith("every prompt has equal rewards, so every advantage is 0")


def test_columns_of_the_whole_source_reach_the_reward(model, tokenizer):
    """A field that no drawn prompt has is a column all the same."""
    prompts = [Prompt(i, "01", columns={"level": i} if i else {}) for i in range(2)]
    seen = []

    def reward(completions, completion_ids, level):
        seen.extend(zip(completion_ids, level, strict=True))
        return [float(i % 2) for i in range(len(completions))]

    drawn = set()
    for seed in range(12):
        rollouts, _ = _update(model, tokenizer, reward, prompts, num_prompts=1, seed=seed)
        drawn |= set(rollouts.prompt_ids.tolist())
        rows = zip(rollouts.input_ids, rollouts.response_mask, rollouts.prompt_ids.tolist(), strict=True)
        assert seen == [(ids[mask].tolist(), prompt or None) for ids, mask, prompt in rows]
        seen.clear()
    assert drawn == {0, 1}


def test_scale_rewards_is_passed_on(model, tokenizer):
    for scale in ("group", "batch", "none"):
        rollouts, _ = _update(model, tokenizer, scale_rewards=scale)
        expected = group_advantages(rollouts.rewards, rollouts.prompt_ids, scale)
        assert torch.equal(rollouts.advantages, expected)


def test_truncated_responses_are_masked_and_count(model, tokenizer, tmp_path):
    """In rewards, advantages and the number of sequences they stay, as in the trainer."""
    whole, _ = _update(model, tokenizer)
    masked, report = _update(model, tokenizer, mask_truncated_completions=True)
    last = whole.input_ids[torch.arange(12), whole.attention_mask.sum(1) - 1]
    truncated = last != tokenizer.eos_token_id
    assert 0 < truncated.sum() < 12
    assert torch.equal(masked.response_mask, whole.response_mask & ~truncated[:, None])
    assert torch.equal(masked.advantages, whole.advantages)
    assert report.truncated_fraction == pytest.approx(truncated.double().mean().item())
    masked.to_parquet(tmp_path / "update.parquet")
    again = Rollouts.from_parquet(tmp_path / "update.parquet")
    assert torch.equal(again.response_mask, masked.response_mask)
    assert torch.equal(again.attention_mask, masked.attention_mask)


def test_errors(model, tokenizer):
    with pytest.raises(ValueError, match="num_prompts: expected at most the 6 prompts of the source, got 7"):
        _update(model, tokenizer, num_prompts=7)
    with pytest.raises(ValueError, match="all 6 prompts tried in 2 rounds have equal rewards over their 3 responses"):
        _update(model, tokenizer, lambda responses: [1.0] * len(responses), filter_zero_advantage=True)
    with pytest.raises(ValueError, match="expected a list of 12 numbers, one per response, got 11 of them"):
        _update(model, tokenizer, lambda responses: [1.0] * (len(responses) - 1))
    with pytest.raises(ValueError, match=r"expected a finite number for a response to prompt .*, got nan"):
        _update(model, tokenizer, lambda responses: [float("nan")] * len(responses))
    twice = [PROMPTS[0], PROMPTS[0]]
    with pytest.raises(ValueError, match="prompts: expected distinct ids, got 1 for 2 prompts"):
        _evaluate(model, tokenizer, prompts=twice, total_sequences=2)
    with pytest.raises(ValueError, match="prompts: expected at least one, got none"):
        _evaluate(model, tokenizer, prompts=[], total_sequences=2)


@pytest.mark.parametrize(
    ("settings", "fields", "match"),
    [
        (GenerationSettings, {"top_p": 0.95}, "expected 1.0, got 0.95; the full softmax is the policy"),
        (GenerationSettings, {"top_k": 50}, "expected 0, got 50; the full softmax is the policy"),
        (GenerationSettings, {"batch_size": 0}, "batch_size"),
        (GenerationSettings, {"engine": "tgi"}, "expected hf or vllm, got 'tgi'; sample elsewhere and set rollouts"),
        (GenerationSettings, {"temperature": 1.0}, "Extra inputs"),
        (UpdateSettings, {"num_prompts": 2, "group_size": 1}, "greater than or equal to 2"),
        (UpdateSettings, {"num_prompts": 0, "group_size": 2}, "num_prompts"),
        (UpdateSettings, {"num_prompts": 2, "group_size": 2, "scale_rewards": "std"}, "scale_rewards"),
        (EvaluationSettings, {"total_sequences": 0}, "total_sequences"),
        (EvaluationSettings, {}, "expected one size: .* got none"),
        (EvaluationSettings, {"total_sequences": 9, "relative_error": 0.1}, "total_sequences and relative_error"),
        (EvaluationSettings, {"num_prompts": 9, "draws_per_prompt": 2}, "greater than or equal to 10"),
        (EvaluationSettings, {"num_prompts": 20}, "expected draws_per_prompt beside num_prompts, got none"),
        (EvaluationSettings, {"total_sequences": 50, "draws_per_prompt": 4}, "of 10 prompts or more with 4 draws"),
        (EvaluationSettings, {"relative_error": 1.0}, "relative_error"),
    ],
)
def test_bad_settings(settings, fields, match):
    with pytest.raises(ValidationError, match=match):
        settings(**fields)


def test_resampling_an_unchanged_model_gives_the_batch_again(model, tokenizer):
    rollouts, _ = _evaluate(model, tokenizer, total_sequences=20, seed=3)
    engine, parameters = HFGenerator(model, tokenizer, BATCH), SamplingParameters(1.0, 4)
    again = resample_responses(engine, rollouts, parameters, seed=3)
    for name in ("input_ids", "attention_mask", "response_mask", "prompt_ids"):
        assert torch.equal(getattr(again, name), getattr(rollouts, name)), name
    other = resample_responses(engine, rollouts, parameters, seed=4)
    assert torch.equal(other.prompt_ids, rollouts.prompt_ids)
    assert not torch.equal(other.input_ids, rollouts.input_ids)
    # padding on the left makes no difference
    names = ("input_ids", "attention_mask", "response_mask")
    columns = [torch.nn.functional.pad(getattr(rollouts, name), (3, 0)) for name in names]
    padded = resample_responses(engine, type(rollouts)(*columns, rollouts.prompt_ids), parameters, seed=3)
    assert torch.equal(padded.input_ids, rollouts.input_ids)


def test_a_source_that_repeats_its_prompts_says_so():
    """Copies are drawn as in training on that source; a probe counts them as one prompt."""
    once = [Prompt(k, f"{k}=") for k in range(3)]
    assert repeated_prompts(once) == ()
    copies = [*once, Prompt(3, "1="), Prompt(4, ({"role": "user", "content": "1="},)), Prompt(5, "1=", answer="1")]
    assert texts(repeated_prompts(copies)) == [
        "the source holds 6 prompts, 4 of them distinct: copies are drawn as they are there",
    ]
