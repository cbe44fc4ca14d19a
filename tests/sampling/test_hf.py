from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from transformers import GenerationConfig

from entropy_probe.demo.policy import build_model
from entropy_probe.sampling import HFGenerator, Prompt, SamplingParameters, encode_prompts, generate_responses

EOS = 1
VOCABULARY = range(5)
HOSTILE = {
    "top_k": 2,
    "top_p": 0.5,
    "min_p": 0.3,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "repetition_penalty": 2.0,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [2],
    "begin_suppress_tokens": [3],
    "bad_words_ids": [[4]],
    "sequence_bias": [[[0], 5.0]],
    "forced_eos_token_id": EOS,
    "min_new_tokens": 2,
    "exponential_decay_length_penalty": (1, 3.0),
    "num_return_sequences": 2,
    "max_length": 4,
}


def _hostile(**extra):
    return GenerationConfig(do_sample=True, eos_token_id=EOS, pad_token_id=0, **(HOSTILE | extra))


def _generate(model, tokenizer, texts, *, temperature=1.0, max_completion_length=3, batch_size=64, seed=0, **more):
    prompts = [Prompt(i, text) for i, text in enumerate(texts)]
    return generate_responses(
        HFGenerator(model, tokenizer, batch_size),
        encode_prompts(tokenizer, prompts),
        range(len(texts)),
        SamplingParameters(temperature, max_completion_length),
        [1_000_000 * seed + i for i in range(len(texts))],
        **more,
    )


@torch.no_grad()
def _exact(model, prompt, temperature, max_length):
    """The probability of every response, from unpadded teacher forcing in float64 softmax."""
    responses = [
        (*head, last)
        for n in range(1, max_length + 1)
        for head in itertools.product([v for v in VOCABULARY if v != EOS], repeat=n - 1)
        for last in (VOCABULARY if n == max_length else [EOS])
    ]
    probabilities = {}
    for response in responses:
        ids = torch.tensor([[*prompt, *response]])
        logprobs = (model(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        probabilities[response] = float(logprobs[at, torch.tensor(response)].sum().exp())
    return probabilities


def _chi_square_z(counts, probabilities):
    """Standardised Pearson statistic, outcomes expected fewer than 5 times pooled."""
    n = sum(counts.values())
    large = [r for r, p in probabilities.items() if n * p >= 5]
    cells = [(counts[r], n * probabilities[r]) for r in large]
    rest = n - sum(e for _, e in cells)
    if rest >= 5:
        cells.append((n - sum(o for o, _ in cells), rest))
    df = len(cells) - 1
    assert df >= 10
    return (sum((o - e) ** 2 / e for o, e in cells) - df) / (2 * df) ** 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_samples_follow_the_full_softmax(model, tokenizer, temperature):
    """Hub settings are ignored, left padding does not matter, every response has its exact probability."""
    model.generation_config = _hostile()
    texts = ["012", "2"] * 3000  # two lengths in one batch
    completions = _generate(model, tokenizer, texts, temperature=temperature, batch_size=2000)
    for start, text in enumerate(("012", "2")):
        counts = Counter(c.token_ids for c in completions[start::2])
        (prompt,) = encode_prompts(tokenizer, [Prompt(0, text)])
        exact = _exact(model, prompt, temperature, max_length=3)
        assert sum(exact.values()) == pytest.approx(1)
        assert set(counts) <= set(exact)
        assert abs(_chi_square_z(counts, exact)) < 4.5
        wrong = _exact(model, prompt, temperature * 1.3, max_length=3)
        assert _chi_square_z(counts, wrong) > 4.5  # the check has the power to see a wrong distribution


def test_the_whole_vocabulary_is_sampled(tokenizer):
    """More than the 50 tokens of the library's own top-k default, each as often as its probability says."""
    model = build_model(hidden_size=16, num_layers=1, initializer_range=0.2)
    completions = _generate(model, tokenizer, ["1+1="] * 20_000, max_completion_length=1, batch_size=20_000)
    prompt = torch.tensor([completions[0].prompt_token_ids])
    probabilities = model(input_ids=prompt).logits[0, -1].double().softmax(-1).tolist()
    exact = {(v,): p for v, p in enumerate(probabilities)}
    assert abs(_chi_square_z(Counter(c.token_ids for c in completions), exact)) < 4.5


@pytest.mark.parametrize("name", HOSTILE)
def test_no_hub_setting_reaches_the_sampler(model, tokenizer, name):
    clean = _generate(model, tokenizer, ["012", "2"] * 20, max_completion_length=5)
    model.generation_config = GenerationConfig(**{name: HOSTILE[name]}, eos_token_id=EOS, do_sample=True)
    assert _generate(model, tokenizer, ["012", "2"] * 20, max_completion_length=5) == clean


# peft reads an attribute that transformers has renamed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_model(tokenizer):
    peft = pytest.importorskip("peft")
    base = build_model(vocab_size=5, hidden_size=16, num_layers=1, initializer_range=0.6, seed=3)
    plain = _generate(base, tokenizer, ["012", "2"] * 20)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(base, config).train()
    clean = _generate(model, tokenizer, ["012", "2"] * 20)
    hostile = base.generation_config = _hostile()
    assert _generate(model, tokenizer, ["012", "2"] * 20) == clean != plain
    assert base.generation_config is hostile
    assert "generation_config" not in vars(model)


def _prepare_for_state_check(model):
    model.train()
    model.model.layers[0].eval()
    model.generation_config = _hostile()
    model.config.use_cache = False
    torch.manual_seed(123)
    return (
        {name: m.training for name, m in model.named_modules()},
        model.generation_config,
        model.generation_config.to_dict(),
        torch.get_rng_state(),
        set(vars(model)),
        model.config.to_dict(),
        {name: x.clone() for name, x in model.state_dict().items()},
    )


def _assert_state(model, state):
    training, config, content, rng, attributes, model_config, weights = state
    assert {name: m.training for name, m in model.named_modules()} == training
    assert model.generation_config is config
    assert config.to_dict() == content
    assert torch.equal(torch.get_rng_state(), rng)
    assert set(vars(model)) == attributes
    assert model.config.to_dict() == model_config
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


def test_state_is_left_as_found(model, tokenizer):
    state = _prepare_for_state_check(model)
    _generate(model, tokenizer, ["012", "2"])
    _assert_state(model, state)


def test_state_is_left_as_found_after_an_error(model, tokenizer):
    state = _prepare_for_state_check(model)

    def fail(done, total):
        assert not model.training
        assert not torch.is_grad_enabled()
        raise RuntimeError(f"stopped at {done} of {total}")

    with pytest.raises(RuntimeError, match="stopped at 1 of 2"):
        _generate(model, tokenizer, ["012", "2"], batch_size=1, progress=fail)
    _assert_state(model, state)


def test_dropout_is_off(tokenizer):
    model = build_model(vocab_size=5, hidden_size=16, num_layers=1, initializer_range=0.6, attention_dropout=0.9)
    assert _generate(model.train(), tokenizer, ["012"] * 40) == _generate(model.eval(), tokenizer, ["012"] * 40)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_any_precision_is_sampled(tokenizer, dtype, tolerance):
    model = build_model().to(dtype)
    for found in _generate(model, tokenizer, ["1+1=", "23"]):
        prompt, tokens = list(found.prompt_token_ids), list(found.token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
        expected = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
        assert found.logprobs is not None
        assert list(found.logprobs) == pytest.approx(expected.tolist(), abs=tolerance)


def test_seeds(model, tokenizer):
    texts = ["012", "2", "01"] * 20
    first = _generate(model, tokenizer, texts, seed=7)
    torch.rand(3)
    assert _generate(model, tokenizer, texts, seed=7) == first
    assert _generate(model, tokenizer, texts, seed=8) != first


def test_order_is_kept_and_progress_reported(model, tokenizer):
    texts = ["012", "2", "0101", "1", "00"]
    seen = []
    completions = _generate(
        model, tokenizer, texts, batch_size=2, progress=lambda done, total: seen.append((done, total))
    )
    encoded = encode_prompts(tokenizer, [Prompt(0, text) for text in texts])
    assert [list(c.prompt_token_ids) for c in completions] == encoded
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_responses_end_with_the_first_end_token(model, tokenizer, pad_is_eos):
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    completions = _generate(model, tokenizer, ["012", "2"] * 100, max_completion_length=4)
    assert {len(c.token_ids) for c in completions} == {1, 2, 3, 4}
    assert {c.truncated for c in completions} == {False, True}
    for c in completions:
        assert EOS not in c.token_ids[:-1]
        assert (c.token_ids[-1] == EOS) == (not c.truncated)
        assert not c.truncated or len(c.token_ids) == 4
    # the pad token (id 0) is an ordinary token of the policy when it is sampled before the end
    assert any(0 in c.token_ids for c in completions)


def test_end_tokens_of_the_model_count_too(model, tokenizer):
    model.generation_config = GenerationConfig(eos_token_id=[4, 3])
    completions = _generate(model, tokenizer, ["012"] * 100, max_completion_length=8)
    assert {c.token_ids[-1] for c in completions if not c.truncated} == {1, 3, 4}
    assert all(not {1, 3, 4} & set(c.token_ids[:-1]) for c in completions)


def test_errors(model, tokenizer):
    cases = [
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"temperature": float("nan")}, "temperature: expected a positive number, got nan"),
        ({"max_completion_length": 0}, "max_completion_length: expected a positive number, got 0"),
        ({"batch_size": 0}, "batch_size: expected a positive number, got 0"),
        (
            {"max_completion_length": 254},
            "prompt 1: expected prompt and response within the model's context of 256 tokens, got 3 \\+ 254",
        ),
    ]
    for arguments, match in cases:
        with pytest.raises(ValueError, match=match):
            _generate(model, tokenizer, ["0", "012"], **arguments)
    assert len(_generate(model, tokenizer, ["012"], max_completion_length=253)) == 1
    with pytest.raises(ValueError, match="prompt 1: expected at least one token, got none"):
        _generate(model, tokenizer, ["0", ""])
    with pytest.raises(ValueError, match="expected a Hugging Face causal language model with generate, got Linear"):
        _generate(torch.nn.Linear(2, 2), tokenizer, ["0"])


def test_tokenizer_without_an_end_token(model, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"tokenizer: expected an eos_token, got none; set tokenizer.eos_token"):
        _generate(model, tokenizer, ["0"])


def test_no_pad_token_is_needed(model, tokenizer):
    clean = _generate(model, tokenizer, ["012", "2"] * 20)
    tokenizer.pad_token = None
    assert _generate(model, tokenizer, ["012", "2"] * 20) == clean
