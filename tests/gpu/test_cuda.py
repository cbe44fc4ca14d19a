"""The probe on a CUDA device against the CPU. Run with ``make test-gpu``; skipped where there is no such device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.demo.policy import build_model, build_tokenizer
from entropy_probe.sampling import HFGenerator, SamplingParameters
from entropy_probe.scoring.forward import Scorer
from entropy_probe.steps.adamw import shadow_step
from tests.devices import SCENARIOS, disagreements, hf_policy, on_device, rollouts
from tests.invariants.problems import batches
from tests.invariants.traces import assert_same, state
from tests.notes import texts
from tests.reference.enumeration import TinyPolicy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here; tests/gpu runs where there is one"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_same_numbers_as_on_the_cpu(name):
    run, tolerance = SCENARIOS[name]
    differing = disagreements(run(CPU), run(CUDA), tolerance)
    assert differing == [], "\n".join(differing)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize(
    "how", [{}, {"foreach": False}, {"fused": True}, {"capturable": True}, {"amsgrad": True}], ids=str
)
def test_the_step_on_copies_is_the_optimizers_own(cls, how):
    model, optimizer = on_device(TinyPolicy().float(), CUDA, cls, weight_decay=0.1, **how)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    g = torch.Generator().manual_seed(2)
    gradient = {n: torch.randn(p.shape, generator=g).to(CUDA) for n, p in named.items()}
    stepped = shadow_step(named, optimizer, gradient)
    before = {n: p.detach().clone() for n, p in named.items()}
    for n, p in named.items():
        p.grad = gradient[n]
    optimizer.step()
    for n, p in named.items():
        if how.get("capturable"):  # the same arithmetic in another order
            torch.testing.assert_close(stepped[n] - before[n], p.detach() - before[n], rtol=1e-3, atol=1e-7)
        else:
            assert torch.equal(stepped[n], p), n


class Noisy(TinyPolicy):
    """Draws from the random states of both devices, and counts in a buffer; may fail after some calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.fatal = 0

    def forward(self, input_ids, attention_mask):
        torch.rand(3)
        torch.rand(3, device=input_ids.device)
        self.count += 1
        if self.fatal and self.count.item() >= self.fatal:
            raise ZeroDivisionError
        return super().forward(input_ids, attention_mask)


@pytest.mark.parametrize("fatal", [0, 1, 4, 9])
def test_everything_is_as_it_was(fatal):
    model, optimizer = on_device(Noisy(), CUDA)
    model.train()
    model.fatal = fatal
    update, evaluation = batches(n=20)
    probe = EntropyProbe(model, optimizer, ProbeConfig(temperature=0.8, max_tokens_per_microbatch=20))
    before, random = state(model, optimizer), torch.cuda.get_rng_state(CUDA)
    if fatal:
        with pytest.raises(ZeroDivisionError):
            probe.run(update=update, evaluation=evaluation)
    else:
        probe.run(update=update, evaluation=evaluation)
    assert_same(before, state(model, optimizer))
    assert torch.equal(random, torch.cuda.get_rng_state(CUDA))


def test_tf32_does_not_reach_the_numbers():
    model, optimizer = on_device(hf_policy("full"), CUDA)
    found = []
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        result = EntropyProbe(model, optimizer).predict(update=rollouts(6, 4, 0), evaluation=rollouts(16, 1, 1))
        found.append(result.entropy.value)
    torch.set_float32_matmul_precision("highest")
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def _large() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build_model(vocab_size=4096, hidden_size=256, num_layers=4)
    return on_device(model, CUDA)


def _peak(work) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(CUDA)
    work()
    torch.cuda.synchronize(CUDA)
    return torch.cuda.max_memory_reserved(CUDA)


def test_peak_memory_does_not_grow_with_the_number_of_sequences():
    model, optimizer = _large()
    config = ProbeConfig(max_tokens_per_microbatch=2048, learning_rate=1e-5)

    def probed(sequences: int) -> int:
        probe, evaluation = EntropyProbe(model, optimizer, config), rollouts(sequences, 1, 1)
        return _peak(lambda: probe.run(update=rollouts(32, 8, 0), evaluation=evaluation))

    probed(256)  # libraries allocate work space on their first call
    small, large = probed(256), probed(2048)
    assert large <= 1.1 * small, (small, large)


def _scores(model: nn.Module, batch: Rollouts, max_tokens: int):
    scorer = Scorer(model, 1.0, max_tokens)
    scorer.prepare(batch)
    return scorer, scorer.score(batch)


def test_out_of_memory_halves_the_microbatch():
    model, _ = _large()
    batch = rollouts(2048, 1, 1, vocabulary=4000)
    whole = int(batch.attention_mask.sum()) * 2
    _, expected = _scores(model, batch, 1024)
    small = _peak(lambda: _scores(model, batch, 1024))
    large = _peak(lambda: _scores(model, batch, whole))
    assert large > 1.5 * small, (small, large)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((small + large) / 2 / total, CUDA)
    try:
        scorer, found = _scores(model, batch, whole)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    assert "out of memory" in texts(scorer.notes)[0]
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=1e-5)


def test_sampling_out_of_memory_halves_the_batch():
    model, _ = _large()
    prompts = [[5 + k % 80] * 64 for k in range(512)]
    parameters, seeds = SamplingParameters(1.0, 64), list(range(len(prompts)))

    def sampled(size: int):
        engine = HFGenerator(model, build_tokenizer(), batch_size=size)
        return engine, engine.generate(prompts, parameters, seeds)

    _, expected = sampled(32)
    small, large = _peak(lambda: sampled(32)), _peak(lambda: sampled(512))
    assert large > 1.5 * small, (small, large)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((small + large) / 2 / total, CUDA)
    try:
        engine, found = sampled(512)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    assert "out of memory" in texts(engine.notes)[0]
    same = sum(a.token_ids == b.token_ids for a, b in zip(expected, found, strict=True))
    assert same >= 0.98 * len(prompts)  # a uniform number within rounding of a boundary may give another token


def test_rollouts_may_be_on_the_device():
    model, optimizer = on_device(hf_policy("lora"), CUDA)
    update, evaluation = rollouts(6, 4, 0), rollouts(16, 1, 1)
    columns = ("input_ids", "attention_mask", "response_mask", "prompt_ids", "advantages")
    there = [Rollouts(*(getattr(batch, name).to(CUDA) for name in columns)) for batch in (update, evaluation)]
    probe = EntropyProbe(model, optimizer, ProbeConfig(learning_rate=1e-4))
    a = probe.predict(update=update, evaluation=evaluation).predicted
    b = probe.predict(update=there[0], evaluation=there[1]).predicted
    assert a is not None
    assert b is not None
    assert a.value == pytest.approx(b.value, rel=1e-5)


def test_nothing_stays_on_the_device():
    model, optimizer = on_device(hf_policy("lora"), CUDA)
    held = torch.cuda.memory_allocated(CUDA)
    probe = EntropyProbe(model, optimizer, ProbeConfig(learning_rate=1e-4))
    for _ in range(3):
        probe.run(update=rollouts(6, 4, 0), evaluation=rollouts(16, 1, 1))
    assert torch.cuda.memory_allocated(CUDA) <= held + 2**20
