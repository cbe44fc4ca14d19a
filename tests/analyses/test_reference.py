"""The reference of a KL term: who is asked for its log-probabilities, and what is left as it was."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from entropy_probe import EntropyProbe, ProbeConfig
from entropy_probe.demo.policy import build_model
from tests.invariants.hf_problems import rollouts
from tests.invariants.traces import assert_same, state
from tests.notes import texts

LOSS = {"trainer": "trl", "beta": 0.5}


def policy(adapters: tuple[str, ...] = ("default",)) -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.nn.Module]:
    """A policy with adapters that do something, and the model below them."""
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = build_model(initializer_range=0.2)
    torch.manual_seed(3)
    model = get_peft_model(build_model(initializer_range=0.2), settings)
    for name in adapters[1:]:
        model.add_adapter(name, settings)
    model.set_adapter("default")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return model, optimizer, base


def batches():
    return rollouts(12, 0), rollouts(16, 1, group=1)


def logprobs(model, batch) -> torch.Tensor:
    """Of the sampled tokens, on a route of its own."""
    with torch.no_grad():
        log_p = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits.log_softmax(-1)
    out = torch.zeros(batch.input_ids.shape)
    out[:, 1:] = log_p[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return out


def predicted(model, optimizer, update, evaluation, **more):
    result = EntropyProbe(model, optimizer, ProbeConfig(loss=LOSS), **more).predict(
        update=update, evaluation=evaluation
    )
    return result.predicted.value, " ".join(texts(result.diagnostics.notes))


@pytest.mark.parametrize("adapters", [("default",), ("default", "ref")], ids=["off", "copy"])
def test_the_adapter_is_switched_off_or_over_and_everything_left_as_it_was(adapters):
    model, optimizer, base = policy(adapters)
    update, evaluation = batches()
    before, flags = state(model, optimizer), [p.requires_grad for p in model.parameters()]
    value, notes = predicted(model, optimizer, update, evaluation)
    assert_same(before, state(model, optimizer))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert list(model.active_adapters) == ["default"]
    if len(adapters) > 1:
        model.set_adapter("ref")
        base = model
        assert "with its adapter 'ref'" in notes
    else:
        assert "with its adapter switched off" in notes
    given = replace(update, reference_logprobs=logprobs(base, update))
    if len(adapters) > 1:
        model.set_adapter("default")
    expected, notes = predicted(model, optimizer, given, evaluation)
    assert value == pytest.approx(expected, rel=1e-4)
    assert "adapter" not in notes


def test_a_model_of_its_own_goes_before_the_adapter_and_rollouts_before_it():
    model, optimizer, _ = policy()
    update, evaluation = batches()
    other = build_model(initializer_range=0.2, seed=5)
    value, notes = predicted(model, optimizer, update, evaluation, reference=other)
    given = replace(update, reference_logprobs=logprobs(other, update))
    assert value == pytest.approx(predicted(model, optimizer, given, evaluation)[0], rel=1e-4)
    assert "adapter" not in notes
    off = predicted(model, optimizer, update, evaluation)[0]
    assert value != pytest.approx(off, rel=1e-2)
    assert predicted(model, optimizer, given, evaluation, reference=model)[0] == pytest.approx(value, rel=1e-4)


def test_full_weights_without_a_reference_are_refused():
    model = build_model(initializer_range=0.2)
    with pytest.raises(ValueError, match=r"reference_logprobs: expected .*without an adapter .*give its model"):
        predicted(model, torch.optim.AdamW(model.parameters(), lr=1e-4), *batches())
