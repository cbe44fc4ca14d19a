"""Hooks on parameters (``register_hook``) act in training's backward passes, not in the entropy's derivative."""

import pytest
import torch

from entropy_probe import ProbeResult
from tests.invariants.problems import batches, probe
from tests.notes import texts
from tests.reference.enumeration import TEMPERATURE, TinyPolicy, trained_optimizer

UPDATE, EVALUATION = batches()


def training_gradient(model: TinyPolicy) -> dict[str, torch.Tensor]:
    """Of the dapo loss, as training's backward pass leaves it in ``.grad``."""
    log_p = torch.log_softmax(model(UPDATE.input_ids, UPDATE.attention_mask.long()).logits / TEMPERATURE, -1)
    s = log_p[:, :-1].gather(-1, UPDATE.input_ids[:, 1:, None])[..., 0] * UPDATE.response_mask[:, 1:]
    (-(s * UPDATE.token_advantages[:, 1:]).sum() / UPDATE.response_mask.sum()).backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradient


def hooked() -> tuple[TinyPolicy, list]:
    """A policy of which one weight is trained a quarter as fast, one by half of its rows, and one is watched."""
    model = TinyPolicy()
    parameters = list(model.parameters())
    rows = (torch.arange(parameters[-1].shape[0]) % 2).double()
    mask = rows.view(-1, *[1] * (parameters[-1].dim() - 1))
    hooks = [lambda g: g * 0.25, lambda g: g * mask, lambda g: None]
    return model, [
        p.register_hook(f) for p, f in zip((parameters[0], parameters[-1], parameters[0]), hooks, strict=True)
    ]


def values(result: ProbeResult) -> dict[str, float]:
    assert result.predicted
    assert result.realized
    parts = {name: part.value for name, part in result.components.items()}
    return parts | {"predicted": result.predicted.value, "realized": result.realized.value}


def test_the_step_has_them_and_the_slope_does_not():
    model, handles = hooked()
    before = [p._backward_hooks for p in model.parameters()]
    subject = probe(model, trained_optimizer(model), max_grad_norm=None)
    result = subject.run(update=UPDATE, evaluation=EVALUATION)
    assert [p._backward_hooks for p in model.parameters()] == before
    gradient = training_gradient(model)
    for handle in handles:
        handle.remove()
    plain = subject.run(gradient=gradient, evaluation=EVALUATION)
    assert values(result) == pytest.approx(values(plain), rel=1e-9)
    without = subject.run(update=UPDATE, evaluation=EVALUATION)
    assert values(result)["gradient"] != pytest.approx(values(without)["gradient"], rel=0.05)
    (said,) = [text for text in texts(result.diagnostics.notes) if "gradient hooks" in text]
    assert said.startswith("2 parameters have gradient hooks, ")
    assert not any("gradient hooks" in text for text in texts(without.diagnostics.notes))


@pytest.mark.parametrize("gib", [2.0, 0.0])
def test_one_batch_multiplies_a_gradient_with_them_and_one_without(gib):
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model), max_grad_norm=None, max_stored_gradient_gib=gib)
    plain = subject.one_batch(UPDATE, geometry="frozen").cross_prompt
    for p in model.parameters():
        p.register_hook(lambda g: 0.5 * g)
    result = subject.one_batch(UPDATE, geometry="frozen").cross_prompt
    assert plain
    assert result
    assert result.delta_h1 == pytest.approx(0.5 * plain.delta_h1, rel=1e-9)


def test_tokens_of_the_update_batch_have_them():
    model, _ = hooked()
    attribution = probe(model, trained_optimizer(model), horizon=None).attribute(update=UPDATE, evaluation=EVALUATION)
    gradient = attribution.result.components["gradient"].value
    assert attribution.tokens.sum().item() == pytest.approx(gradient, rel=1e-6)
