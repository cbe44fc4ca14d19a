"""A device too small for a microbatch: the microbatch is halved, the numbers stay, and the result says so."""

from functools import cache, partial

import pytest
import torch
from peft import LoraConfig, get_peft_model

from entropy_probe import EntropyProbe, ProbeConfig
from entropy_probe.demo.policy import build_model
from tests.invariants.problems import float32_problem
from tests.notes import texts
from tests.reference.enumeration import trained_optimizer

NUMBERS = ("entropy", "predicted", "components", "realized", "difference")


class Limited:
    """Makes a model's passes over more than ``tokens`` tokens run out of memory, forward or on the way back."""

    def __init__(self, model, where: str, tokens: int) -> None:
        self.failures = self.done = 0
        layers = [m for m in model.modules() if type(m).__name__ == "Qwen2DecoderLayer"]
        # on the way back the last layers have been differentiated by the time the first is reached
        layers[-1 if where == "forward" else 0].register_forward_hook(self.hook)
        self.where, self.tokens = where, tokens

    def fail(self) -> None:
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def hook(self, module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        size = hidden.shape[0] * hidden.shape[1]
        if self.where == "forward" and size > self.tokens:
            self.fail()
        if self.where == "backward" and hidden.requires_grad and size > self.tokens:
            hidden.register_hook(lambda gradient: self.fail())
        self.done += 1


def problem(lora: bool):
    model, optimizer, update, evaluation = float32_problem()
    if lora:
        model = get_peft_model(
            build_model(vocab_size=30, hidden_size=32, initializer_range=0.2),
            LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        )
        optimizer = trained_optimizer(model)
    return model, optimizer, update, evaluation


def run(lora: bool, where: str | None, tokens: int = 0, **settings):
    torch.manual_seed(0)
    model, optimizer, update, evaluation = problem(lora)
    limited = Limited(model, where, tokens) if where else None
    config = ProbeConfig(learning_rate=1e-3, max_tokens_per_microbatch=400, **settings)
    probe = EntropyProbe(model, optimizer, config)
    return probe.run(update=update, evaluation=evaluation), probe.one_batch(update, geometry="frozen"), limited


roomy = cache(partial(run, where=None))
"""Where everything fits, which is the same for every way not to."""


# peft reads an attribute that transformers has renamed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("where", ["backward", pytest.param("forward", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("lora", "settings"),
    [(True, {}), (True, {"max_stored_gradient_gib": 0.0}), (False, {}), (False, {"max_stored_gradient_gib": 0.0})],
)
def test_microbatches_are_halved_and_the_numbers_stay(lora, settings, where):
    plain, plain_one, _ = roomy(lora, **settings)
    small, small_one, limited = run(lora, where, tokens=60 if lora else 30, **settings)
    assert limited.failures >= 2
    assert plain.diagnostics.per_sample_gradients == ("linear-layer hooks" if lora else "hooks")
    said = [m for m in texts(small.diagnostics.notes) if "out of memory" in m]
    assert len(said) == 1
    assert "max_tokens_per_microbatch was lowered to" in said[0]
    assert not any("out of memory" in m for m in texts(plain.diagnostics.notes))
    rounding = 1e-3 * plain.realized.standard_error
    for name in NUMBERS:
        a, b = (getattr(result, name) for result in (plain, small))
        pairs = [(a[k], b[k]) for k in a] if name == "components" else [(a, b)]
        for x, y in pairs:
            assert y.value == pytest.approx(x.value, rel=1e-3, abs=rounding), name
            assert y.standard_error == pytest.approx(x.standard_error, rel=1e-3, abs=rounding), name
    assert small.diagnostics.gradient_norm == pytest.approx(plain.diagnostics.gradient_norm, rel=1e-5)
    assert small_one.cross_prompt.delta_h1 == pytest.approx(plain_one.cross_prompt.delta_h1, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("where", ["backward", pytest.param("forward", marks=pytest.mark.slow)])
def test_a_single_sequence_that_does_not_fit_is_one_error(where):
    with pytest.raises(
        MemoryError, match=r"sequence \d+: its tokens alone, 16 with padding, do not fit the device's memory"
    ):
        run(True, where, tokens=10)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_attribution_in_smaller_microbatches():
    model, optimizer, update, evaluation = problem(True)
    probe = EntropyProbe(model, optimizer, ProbeConfig(max_tokens_per_microbatch=400))
    plain = probe.attribute(update=update, evaluation=evaluation)
    limited = Limited(model, "forward", 60)
    small = probe.attribute(update=update, evaluation=evaluation)
    assert limited.failures >= 2
    assert small.summary.method == plain.summary.method == "forward-mode"
    assert any("out of memory" in m for m in texts(small.result.diagnostics.notes))
    torch.testing.assert_close(small.tokens, plain.tokens, rtol=1e-3, atol=1e-4 * plain.tokens.abs().max().item())
    limited.tokens = 10
    with pytest.raises(MemoryError, match="with padding, do not fit"):
        probe.attribute(update=update, evaluation=evaluation)
