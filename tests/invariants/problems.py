"""Batches of the enumerable policy and of a small model, probes of them, and the numbers of their results."""

from dataclasses import replace

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig, ProbeResult, Rollouts
from entropy_probe.demo.policy import build_model
from tests.reference.enumeration import TEMPERATURE, Table, TinyPolicy

TABLE = Table.build()


def batches(seed: int = 0, groups: int = 9, size: int = 4, n: int = 60) -> tuple[Rollouts, Rollouts]:
    generator = torch.Generator().manual_seed(seed)
    model = TinyPolicy()
    update = TABLE.update_batch(TABLE.sample_groups(model, groups, size, generator), size)
    return update, TABLE.rollouts.select(TABLE.sample(model, n, generator))


def with_reference(update: Rollouts, seed: int = 3) -> Rollouts:
    noise = torch.randn(update.input_ids.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return replace(update, reference_logprobs=noise - 2)


def probe(model: torch.nn.Module, optimizer: torch.optim.Optimizer, **settings: object) -> EntropyProbe:
    defaults = {"temperature": TEMPERATURE, "merge_equal_prompts": False}
    return EntropyProbe(model, optimizer, ProbeConfig(**(defaults | settings)))


def numbers(result: ProbeResult) -> dict[str, float]:
    assert result.predicted
    assert result.realized
    assert result.difference
    out = {f"component {k}": v.value for k, v in result.components.items()}
    out |= {f"component error {k}": v.standard_error for k, v in result.components.items()}
    for name in ("entropy", "predicted", "realized", "difference"):
        out[name] = getattr(result, name).value
        out[f"{name} error"] = getattr(result, name).standard_error
    return out | {
        "se_update": result.predicted.se_update,
        "ess": result.realized.ess,
        "gradient norm": result.diagnostics.gradient_norm,
    }


def same(a: dict[str, float], b: dict[str, float], rel: float = 1e-10) -> None:
    for key, value in a.items():
        assert b[key] == pytest.approx(value, rel=rel, abs=rel * 1e-3), key


def pad(rollouts: Rollouts, left: int, right: int) -> Rollouts:
    """The same sequences, padded on the left as generation engines do, with junk ids under the padding."""
    n, length = rollouts.input_ids.shape
    sizes = rollouts.attention_mask.sum(1)
    out = [torch.full((n, left + length + right), 3), *(torch.zeros(n, left + length + right).bool() for _ in range(2))]
    for i in range(n):
        start = left + length - int(sizes[i])
        for target, source in zip(
            out, (rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask), strict=True
        ):
            target[i, start : start + int(sizes[i])] = source[i, : int(sizes[i])]
    return Rollouts(*out, rollouts.prompt_ids, advantages=rollouts.advantages)


def float32_problem() -> tuple[torch.nn.Module, torch.optim.Optimizer, Rollouts, Rollouts]:
    model = build_model(vocab_size=30, hidden_size=32, initializer_range=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    optimizer.zero_grad()

    def batch(n: int, prompt_ids: torch.Tensor) -> Rollouts:
        ids = torch.randint(2, 30, (n, 14), generator=generator)
        mask = torch.ones_like(ids)
        response = mask.clone()
        response[:, :4] = 0
        return Rollouts(ids, mask, response, prompt_ids, advantages=torch.randn(n, generator=generator))

    return model, optimizer, batch(12, torch.arange(4).repeat_interleave(3)), batch(40, torch.arange(40))


def with_advantages(update: Rollouts, advantages: torch.Tensor) -> Rollouts:
    return Rollouts(update.input_ids, update.attention_mask, update.response_mask, update.prompt_ids,
                    advantages=advantages, rewards=update.rewards)  # fmt: skip
