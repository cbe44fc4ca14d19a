"""Whole probes that run on any device, and the numbers they give, for comparing a device with the CPU."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts, load_checkpoint
from entropy_probe.demo.policy import build_model, build_tokenizer
from entropy_probe.results.probe import Record
from entropy_probe.sampling import (
    EvaluationSettings,
    HFGenerator,
    Prompt,
    SamplingParameters,
    resample_responses,
    sample_evaluation,
)
from tests.gradients.layers import Mixed
from tests.invariants.problems import batches
from tests.notes import texts
from tests.reference.enumeration import TEMPERATURE, TinyPolicy, trained_optimizer

__all__ = ["SCENARIOS", "Numbers", "disagreements", "hf_policy", "numbers", "on_device", "rollouts"]

Numbers = dict[str, float]
ROUNDING = (
    "horizons",  # differences of changes that hardly differ
    "influence",
    "difference_influence",
    ".difference.degrees_of_freedom",
    "noise_floor",
    "step_rounding",
    "timing",
    "memory",
    "versions",
    "config",
)
"""Parts of a result that may be next to 0, are rounding themselves, or are about the machine."""


def numbers(result: Record) -> Numbers:
    """Every number of a result by its place in the file."""

    def leaves(value: Any, where: str) -> Iterator[tuple[str, float]]:
        for key, x in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            if key not in ROUNDING and f"{where}.{key}" not in ROUNDING:
                yield from leaves(x, f"{where}.{key}")
        if isinstance(value, float):
            yield where, value

    return dict(leaves(result.model_dump(mode="json"), ""))


def disagreements(expected: Numbers, found: Numbers, tolerance: float) -> list[str]:
    """Numbers that differ by more than the tolerance, relative to them or, for differences, to what they are of."""
    if expected.keys() != found.keys():
        return [f"other numbers: {sorted(expected.keys() ^ found.keys())}"]
    out = []
    for key, x in expected.items():
        size = max(abs(x), abs(expected.get(key.replace("difference", "realized"), 0.0)))
        if not abs(found[key] - x) <= tolerance * size + 1e-15:
            out.append(f"{key}: expected {x:.9g}, got {found[key]:.9g}")
    return out


def on_device(
    model: nn.Module, device: torch.device, cls: type = torch.optim.AdamW, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model moved to a device, and an optimizer with a history that was made on the CPU."""
    of_cpu = {key: x for key, x in options.items() if key not in ("fused", "capturable")}
    state = trained_optimizer(model, cls=cls, **of_cpu).state_dict()
    model = model.to(device)
    if hasattr(model, "tie_weights"):  # moving may have made two of one
        model.tie_weights()
    optimizer = cls([p for p in model.parameters() if p.requires_grad], lr=1e-3, **options)
    state["param_groups"] = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(state)
    return model, optimizer


def hf_policy(kind: str, *, tied: bool = False) -> nn.Module:
    """A tiny random Qwen2 on the CPU."""
    model: Any = build_model(hidden_size=32, initializer_range=0.2, tie_word_embeddings=tied)
    if kind == "lora":
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model.eval()


def rollouts(groups: int, size: int, seed: int, vocabulary: int = 60) -> Rollouts:
    """Groups of responses to left-padded prompts that are long enough to be shared."""
    prompt, response = 24, 6
    g = torch.Generator().manual_seed(seed)
    n = groups * size
    ids = torch.randint(1, vocabulary, (n, prompt + response), generator=g)
    ids[:, :prompt] = ids[::size, :prompt].repeat_interleave(size, 0)
    column = torch.arange(prompt + response)
    left = torch.randint(0, 6, (groups, 1), generator=g).repeat_interleave(size, 0)
    attention = (column >= left) & (column < prompt + torch.randint(3, response + 1, (n, 1), generator=g))
    ids_of_prompts = torch.arange(groups).repeat_interleave(size)
    advantages = torch.randn(n, generator=g)
    return Rollouts(ids, attention, attention & (column >= prompt), ids_of_prompts, advantages=advantages)


def _probe(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> EntropyProbe:
    return EntropyProbe(model, optimizer, ProbeConfig(**settings))


def enumerable(device: torch.device, cls: type = torch.optim.AdamW, **settings: Any) -> Numbers:
    """The enumerable policy in float64."""
    model, optimizer = on_device(TinyPolicy(), device, cls)
    update, evaluation = batches()
    return numbers(
        _probe(model, optimizer, temperature=TEMPERATURE, **settings).run(update=update, evaluation=evaluation)
    )


def curvature(device: torch.device) -> Numbers:
    """A sweep of the enumerable policy with its direct curvature."""
    model, optimizer = on_device(TinyPolicy(), device)
    update, evaluation = batches(n=200)
    rates = [1e-5, 1e-4, 3e-4, 1e-3]
    sweep = _probe(model, optimizer, temperature=TEMPERATURE).sweep(
        update=update, evaluation=evaluation, learning_rates=rates, direct_curvature=True
    )
    assert sweep.curvature.direct is not None, texts(sweep.notes)
    return numbers(sweep)


def every_layer(device: torch.device) -> Numbers:
    """Layers with and without a formula, in float64."""
    model, optimizer = on_device(Mixed().double(), device)
    update, evaluation = rollouts(4, 3, 0, 12), rollouts(12, 1, 1, 12)
    result = _probe(model, optimizer, learning_rate=1e-4).run(update=update, evaluation=evaluation)
    assert result.diagnostics.per_sample_gradients.startswith("hooks; by autograd"), result.diagnostics
    return numbers(result)


def hugging_face(
    device: torch.device, kind: str, *, tied: bool = False, fused: bool = False, **settings: Any
) -> Numbers:
    """A tiny Qwen2: chunked head, shared prompts, taps. Changes drown in the rounding of autocast."""
    model, optimizer = on_device(hf_policy(kind, tied=tied), device, **({"fused": True} if fused else {}))
    probe = _probe(model, optimizer, **({"learning_rate": 1e-3, "max_tokens_per_microbatch": 256} | settings))
    work = probe.predict if "autocast" in settings else probe.run
    result = work(update=rollouts(6, 4, 0), evaluation=rollouts(16, 1, 1))
    assert result.diagnostics.prefix_sharing == "on", result.diagnostics
    assert result.diagnostics.head == "chunked", result.diagnostics
    assert "hooks" in result.diagnostics.per_sample_gradients, result.diagnostics
    robust = (".entropy.value", ".diagnostics.gradient_norm") if "autocast" in settings else None
    return {key: x for key, x in numbers(result).items() if robust is None or key in robust}


def attribution(device: torch.device, model: nn.Module, update: Rollouts, evaluation: Rollouts) -> Numbers:
    """Contributions of the update tokens, of prompts and of layers."""
    placed, optimizer = on_device(model, device)
    found = _probe(placed, optimizer, learning_rate=1e-3).attribute(update=update, evaluation=evaluation, folds=2)
    assert found.summary.method.startswith("forward-mode"), found.summary
    assert found.standard_errors is not None
    largest = float(found.tokens.abs().max())  # what is next to 0 is compared with this
    parts = {"token": found.tokens, "prompt": found.prompts, "error": found.standard_errors}
    out = {f"{name} {k}": largest + float(x) for name, xs in parts.items() for k, x in enumerate(xs.flatten())}
    return out | {f"layer {layer.layer} {layer.module}": largest + layer.total for layer in found.layers}


def one_batch(device: torch.device, kept: str) -> Numbers:
    """The cross-prompt statistic with adapters; ``kept`` says of how many sides gradients fit, as the result does."""
    model, optimizer = on_device(hf_policy("lora"), device)
    one_side = 6 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    sides = {"one pass": 2.0, "two passes, one side": 1.5, "two passes, since": 0.5}[kept]
    settings = {"max_stored_gradient_gib": sides * one_side / 2**30, "learning_rate": 1e-4, "geometry": "frozen"}
    result = _probe(model, optimizer, **settings).one_batch(rollouts(6, 4, 0))
    assert result.cross_prompt is not None
    assert result.cross_prompt.gradients.startswith(kept), result.cross_prompt.gradients
    return {key: x for key, x in numbers(result).items() if "bars_dot_ratio" not in key}


def sampling(device: torch.device) -> Numbers:
    """Responses and the log-probabilities they were sampled with; then a step so large that others are sampled."""
    model, optimizer = on_device(hf_policy("lora"), device)
    engine, parameters = HFGenerator(model, build_tokenizer(), batch_size=8), SamplingParameters(1.0, 12)
    prompts = [Prompt(k, f"{k}+{3 * k}=") for k in range(6)]
    drawn, _ = sample_evaluation(engine, build_tokenizer(), prompts, EvaluationSettings(total_sequences=24), parameters)
    config = ProbeConfig(learning_rate=0.05, on_low_ess="resample", measure_noise_floor=False)
    probe = EntropyProbe(model, optimizer, config, resample=lambda r: resample_responses(engine, r, parameters, seed=2))
    result = probe.measure(update=rollouts(6, 4, 0), evaluation=drawn)
    assert result.realized is not None
    assert result.realized.estimator == "resampled", result.realized
    assert result.diagnostics.mismatch is not None
    assert result.diagnostics.mismatch.max < 1e-4
    found = {f"token {k}": float(x) for k, x in enumerate(drawn.input_ids.flatten())}
    assert drawn.sampled_logprobs is not None
    found |= {f"logprob {k}": float(x) for k, x in enumerate(drawn.sampled_logprobs.flatten())}
    return found | {"entropy": result.entropy.value}


def checkpoint(device: torch.device) -> Numbers:
    """A checkpoint with adapters as the Trainer writes it, loaded onto the device, with a fused optimizer."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as temporary:
        base, directory = Path(temporary) / "base", Path(temporary) / "checkpoint-3"
        build_model(hidden_size=32, initializer_range=0.2).save_pretrained(base)
        model: Any = hf_policy("lora")
        model.peft_config["default"].base_model_name_or_path = str(base)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": trained, "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
        for step in range(3):
            g = torch.Generator().manual_seed(step)
            for p in trained:
                p.grad = 1e-2 * torch.randn(p.shape, generator=g)
            optimizer.step()
        assert isinstance(model, PeftModel)
        model.save_pretrained(directory)
        torch.save(optimizer.state_dict(), directory / "optimizer.pt")
        (directory / "trainer_state.json").write_text('{"global_step": 3}')
        state = load_checkpoint(directory, device=device)
    assert {p.device.type for p in state.model.parameters()} == {device.type}
    probe = _probe(state.model, state.optimizer, max_tokens_per_microbatch=256)
    return numbers(probe.run(update=rollouts(6, 4, 0), evaluation=rollouts(16, 1, 1)))


EXACT, SINGLE = 1e-9, 2e-3
SCENARIOS: dict[str, tuple[Callable[[torch.device], Numbers], float]] = {
    "enumerable": (enumerable, EXACT),
    "frozen geometry": (partial(enumerable, geometry="frozen"), EXACT),
    "two passes": (partial(enumerable, max_stored_gradient_gib=0.0), EXACT),
    "copied step": (partial(enumerable, cls=torch.optim.SGD), EXACT),
    "curvature": (curvature, 1e-5),
    "every layer": (every_layer, EXACT),
    "lora": (partial(hugging_face, kind="lora"), SINGLE),
    "lora, two passes": (partial(hugging_face, kind="lora", max_stored_gradient_gib=0.0), SINGLE),
    "lora, fused kernel": (partial(hugging_face, kind="lora", fused=True), SINGLE),
    "full, tied": (partial(hugging_face, kind="full", tied=True), SINGLE),
    "autocast": (partial(hugging_face, kind="lora", autocast="bfloat16"), 5e-2),
    "one batch": (partial(one_batch, kept="one pass"), SINGLE),
    "one batch, one side kept": (partial(one_batch, kept="two passes, one side"), SINGLE),
    "one batch, two passes": (partial(one_batch, kept="two passes, since"), SINGLE),
    "attribution": (lambda d: attribution(d, TinyPolicy(), *batches()), EXACT),
    "attribution, lora": (lambda d: attribution(d, hf_policy("lora"), rollouts(6, 4, 0), rollouts(16, 1, 1)), SINGLE),
    "sampling": (sampling, SINGLE),
    "checkpoint": (checkpoint, SINGLE),
}
"""Each with the relative difference that another order of summation may make."""
