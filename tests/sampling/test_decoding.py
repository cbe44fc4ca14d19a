"""No cache is believed: whatever is wrong with it, log-probabilities are those of plain calls."""

from __future__ import annotations

import inspect

import pytest
import torch
from tests.notes import texts
from tests.tiny_architectures import tiny_model
from transformers import cache_utils

from entropy_probe.sampling import HFGenerator, SamplingParameters
from entropy_probe.sampling.decoding import WAYS, Decoding, ModelCall, plain_logprobs

PROMPTS = [(2, 3, 4, 3, 2, 4, 4)] * 3 + [(4, 3)] * 2 + [(3,)]


class Watched:
    """The model's forward behind another function, which sees its arguments."""

    def __init__(self, model, monkeypatch, change):
        self.calls, forward = 0, model.forward

        def changed(**arguments):
            self.calls += 1
            return change(forward, **arguments)

        changed.__signature__ = inspect.signature(forward)  # pyright: ignore[reportFunctionMemberAccess]
        monkeypatch.setattr(model, "forward", changed)


def cache_of(arguments):
    return arguments.get("cache", arguments.get("past_key_values"))


def draw(model, tokenizer, prompts=PROMPTS, length=6, engine=None):
    engine = engine or HFGenerator(model, tokenizer, 16)
    found = engine.generate(prompts, SamplingParameters(1.0, length), range(len(prompts)))
    return engine, found


def assert_plain(model, completions):
    for completion in completions:
        ids = torch.tensor([completion.prompt_token_ids + completion.token_ids])
        with torch.no_grad():
            log_p = model(input_ids=ids, use_cache=False).logits[0, -len(completion.token_ids) - 1 : -1].log_softmax(-1)
        plain = log_p.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert list(completion.logprobs) == pytest.approx(plain.tolist(), abs=1e-4)


def test_a_cache_that_the_model_ignores_is_not_used(model, tokenizer, monkeypatch):
    def forgetful(forward, **arguments):
        arguments.pop("position_ids", None)
        if cache_of(arguments) is None:
            return forward(**arguments)
        mask = arguments["attention_mask"][:, -1:]
        return forward(input_ids=arguments["input_ids"], attention_mask=mask, use_cache=False)

    with monkeypatch.context() as patch:
        Watched(model, patch, forgetful)
        engine, found = draw(model, tokenizer)
    assert_plain(model, found)
    (message,) = texts(engine.notes)
    assert message.startswith("sampling goes on recomputing whole sequences at every token, which is slow: ")
    assert "log-probabilities differ from a plain call's by" in message


def test_prompts_of_one_length_share_a_batch_where_padding_changes_anything(model, tokenizer, monkeypatch):
    seen = []

    def padding_matters(forward, **arguments):
        seen.append(arguments["attention_mask"].float().mean().item())
        output = forward(**arguments)
        output.logits = output.logits + (1 - arguments["attention_mask"].float().mean(1))[:, None, None] * torch.arange(
            5
        )
        return output

    with monkeypatch.context() as patch:
        Watched(model, patch, padding_matters)
        engine, _ = draw(model, tokenizer)
        seen.clear()
        _, found = draw(model, tokenizer, engine=engine)
    assert_plain(model, found)
    assert set(seen) == {1.0}
    (message,) = texts(engine.notes)
    assert message.startswith("sampling goes on with the model's cache and prompts of one length to a batch: ")


def test_a_fault_that_short_sequences_do_not_show_is_seen_in_the_batch(model, tokenizer, monkeypatch):
    def short_sighted(forward, **arguments):
        output = forward(**arguments)
        if cache_of(arguments) is not None and arguments["attention_mask"].shape[1] > 40:
            output.logits = output.logits.flip(-1)
        return output

    with monkeypatch.context() as patch:
        Watched(model, patch, short_sighted)
        engine, found = draw(model, tokenizer, [tuple([2, 3, 4] * 13)] * 4 + [(3, 2)] * 2, length=12)
    assert any(len(c.token_ids) > 5 for c in found)
    assert_plain(model, found)
    (message,) = texts(engine.notes)
    assert message.startswith("sampling goes on recomputing whole sequences")


def test_an_error_of_the_cache_is_a_reason_too(model, tokenizer, monkeypatch):
    def refusing(forward, **arguments):
        if cache_of(arguments) is not None:
            raise RuntimeError("not\nhere")
        return forward(**arguments)

    with monkeypatch.context() as patch:
        Watched(model, patch, refusing)
        engine, found = draw(model, tokenizer)
    assert_plain(model, found)
    assert texts(engine.notes)[0].endswith("it fails (RuntimeError: not here)")


def test_a_model_that_sees_what_follows_is_refused(tokenizer):
    model = tiny_model("bert, is_decoder: false")
    said = "BertLMHeadModel whose log-probabilities depend on the tokens before alone, .* without a cache, log-prob"
    with pytest.raises(ValueError, match=said):
        draw(model, tokenizer, [(5, 6, 7, 8)] * 2)
    assert not model.training


def test_the_check_is_made_once(model, tokenizer, monkeypatch):
    counter = Watched(model, monkeypatch, lambda forward, **arguments: forward(**arguments))
    engine, first = draw(model, tokenizer)
    with_check = counter.calls
    _, again = draw(model, tokenizer, engine=engine)
    assert again == first
    assert texts(engine.notes) == []
    without = counter.calls - with_check
    assert without <= 6
    assert with_check - without <= 20


def test_in_half_precision_rounding_is_no_fault(model, tokenizer):
    engine, _ = draw(model.to(torch.bfloat16), tokenizer)
    assert texts(engine.notes) == []


@pytest.mark.parametrize("architecture", ["qwen2", "mamba", "rwkv", "bart", "gemma3_text", "minimax", "openai-gpt"])
def test_architectures_with_their_own_states(architecture, tokenizer):
    """Prompts of several lengths, repeated and dropped rows."""
    model = tiny_model(architecture)
    engine, found = draw(model, tokenizer, length=12)
    assert_plain(model, found)
    if architecture in ("rwkv", "openai-gpt"):
        assert texts(engine.notes)[0].endswith("it fails (TypeError: its forward takes no cache)")
    if architecture == "bart":  # it counts positions from the first token, padding or not
        assert "prompts of one length to a batch: with the model's cache, log-prob" in texts(engine.notes)[0]


# classes of caches that came with transformers 5
MIXED = (
    ["qwen2", "falcon_h1", "minimax", "mamba"] if hasattr(cache_utils, "LinearAttentionAndFullAttentionLayer") else []
)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("architecture", MIXED)
def test_each_way_is_right_or_found_out(architecture, way):
    """Which of a cache's methods moves all that it holds is different for each; the comparison tells."""
    model = tiny_model(architecture)
    call, prompts = ModelCall(model), [(5, 6, 7, 8, 9)] * 2
    right = (
        way.select is None
        or {
            "qwen2": True,
            "falcon_h1": way.select == "reorder_cache",  # the other method moves its keys and not its states
            "minimax": way.select == "batch_select_indices",  # and here the other way round
            "mamba": way.select == "reorder_cache" and not way.masks,
        }[architecture]
    )
    response = [11, 23, 37, 41]
    try:
        with torch.no_grad():
            state, drawn = Decoding(call, [*prompts, (7, 5, 6, 9, 8)], way), []
            state.select(torch.tensor([2, 0]))
            for token in response:
                drawn.append(float(state.logits.log_softmax(-1)[1, token]))
                state.advance(torch.tensor([token, token]))
        plain = plain_logprobs(call, prompts[0], response, 1.0, 10)[0].tolist()
        found = drawn == pytest.approx(plain, abs=1e-4)
    except (AttributeError, TypeError, RuntimeError):
        found = False
    assert found == right
