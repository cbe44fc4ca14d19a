"""What a two-batch probe costs, how much memory it takes, and how many sequences its estimators save.

Everything is a ratio measured in one run. Cost: the whole probe (generation excluded) over one plain training
gradient on as many sequences, from interleaved rounds. Memory: the peak of a fresh process per batch size.
Variance: against the surprisal estimator with a leave-one-out baseline for the first-order change, and
self-normalised importance sampling of the surprisal for the realized change, on the demo's checkpoint.

Run ``python benchmarks/two_batch.py`` (some minutes), or with ``--quick`` at sizes that only show that it works.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from entropy_probe import EntropyProbe, ProbeConfig, ProbeResult, Rollouts, load_checkpoint
from entropy_probe.analyses.provenance import library_versions
from entropy_probe.demo.policy import build_model, build_tokenizer
from entropy_probe.demo.train import LORA_TARGETS, MAX_COMPLETION_LENGTH, quiet_single_thread, train_demo
from entropy_probe.sampling import (
    EvaluationSettings,
    HFGenerator,
    PromptSource,
    SamplingParameters,
    UpdateSettings,
    load_prompts,
    load_reward,
    sample_evaluation,
    sample_update,
)
from entropy_probe.sampling.responses import completed_rollouts, generate_responses, sequence_seeds

SECTIONS = ("memory", "lora", "full", "variance")
MIB = 2**20


@dataclass(frozen=True)
class Setup:
    """A random Qwen2 policy and its two batches; evaluation prompts are drawn from a pool of their own."""

    num_layers: int = 4
    hidden_size: int = 256
    intermediate_size: int = 1024
    vocab_size: int = 8192
    num_prompts: int = 16
    group_size: int = 8
    prompt_tokens: int = 64
    response_tokens: int = 64
    evaluation_prompts: int = 256
    max_tokens_per_microbatch: int = 8192
    max_stored_gradient_gib: float = 2.0

    @property
    def num_sequences(self) -> int:
        """Sequences of the update batch, and of the evaluation batch."""
        return self.num_prompts * self.group_size

    @property
    def config(self) -> ProbeConfig:
        """The probe's settings: defaults but for the two bounds."""
        return ProbeConfig(
            max_tokens_per_microbatch=self.max_tokens_per_microbatch,
            max_stored_gradient_gib=self.max_stored_gradient_gib,
        )

    def policy(self, *, lora: bool) -> tuple[nn.Module, torch.optim.AdamW]:
        """The policy and an optimizer that has taken two steps."""
        torch.manual_seed(0)
        model: Any = build_model(
            "qwen2",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=2048,
        )
        if lora:
            # not the usual start at B = 0, where half of the gradients vanish
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                model = get_peft_model(model, LoraConfig(r=8, target_modules=LORA_TARGETS, init_lora_weights=False))
            model.eval()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6)
        for _ in range(2):
            for p in trained:
                p.grad = 1e-3 * torch.randn_like(p)
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    def batches(self, model: nn.Module) -> tuple[Rollouts, Rollouts]:
        """An update batch in groups and an evaluation batch of as many single draws: the policy's own responses.

        The prompts are random tokens. Other responses would not fit the policy, and the probe would look for the cause.
        """
        source = torch.Generator().manual_seed(0)
        shape = (self.num_prompts + self.evaluation_prompts, self.prompt_tokens)
        prompts = torch.randint(2, self.vocab_size, shape, generator=torch.Generator().manual_seed(1)).tolist()
        update_ids = torch.arange(self.num_prompts).repeat_interleave(self.group_size).tolist()
        drawn = torch.randint(self.evaluation_prompts, (self.num_sequences,), generator=source) + self.num_prompts
        engine, parameters = HFGenerator(model, build_tokenizer(), 128), SamplingParameters(1.0, self.response_tokens)

        def responses(ids: list[int], stream: int) -> Rollouts:
            seeds = sequence_seeds(0, stream, 0, range(len(ids)))
            completions = generate_responses(engine, [prompts[k] for k in ids], ids, parameters, seeds)
            return completed_rollouts(ids, completions, advantages=torch.randn(len(ids), generator=source))

        return responses(update_ids, 0), responses(drawn.tolist(), 1)


FULL = Setup()
QUICK = Setup(2, 32, 64, 512, 4, 2, prompt_tokens=8, response_tokens=8, max_tokens_per_microbatch=64)


def training_gradient(model: Any, rollouts: Rollouts, max_tokens: int) -> list[Tensor]:
    """The gradient of one training step as trainers take it: whole logits of a microbatch's response positions."""
    mask, device = rollouts.response_mask, next(model.parameters()).device
    coefficients = -rollouts.token_advantages * mask / mask.sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in trained]
    length = rollouts.input_ids.shape[1]
    keep = length - int(mask.any(0).int().argmax())
    for rows in torch.arange(len(rollouts)).split(max(1, max_tokens // length)):
        input_ids = rollouts.input_ids[rows].to(device)
        attention_mask = rollouts.attention_mask[rows].long().to(device)
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=keep + 1)
        log_p = torch.log_softmax(output.logits[:, :-1].float(), -1)
        logprobs = log_p.gather(-1, input_ids[:, -keep:, None])[..., 0]
        loss = (coefficients[rows, -keep:].to(logprobs) * logprobs).sum()
        for sum_, gradient in zip(total, torch.autograd.grad(loss, trained), strict=True):
            sum_ += gradient
    return total


def check_fit(result: ProbeResult) -> None:
    """Raise unless both batches are the policy's own, on which a probe does no more than it has to."""
    fits = result.diagnostics.policy_fit
    for fit in (fits.update, fits.evaluation):
        if fit is None or fit.status != "ok":
            raise RuntimeError(f"expected the policy's own responses, got {fit}")


def cost(setup: Setup, *, lora: bool, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Time of the whole probe over that of one training gradient, and where the probe's time goes."""
    model, optimizer = setup.policy(lora=lora)
    update, evaluation = setup.batches(model)

    def gradient_norm() -> float:
        gradient = training_gradient(model, update, setup.max_tokens_per_microbatch)
        return float(torch.cat([g.reshape(-1) for g in gradient]).norm())

    def whole_probe() -> ProbeResult:
        # a probe of its own each time: it would remember the scores of the evaluation batch
        return EntropyProbe(model, optimizer, setup.config).run(update=update, evaluation=evaluation)

    expected, result = gradient_norm(), whole_probe()  # warm-up
    if abs(result.diagnostics.gradient_norm - expected) > 1e-3 * expected:
        norm = result.diagnostics.gradient_norm
        raise RuntimeError(
            f"gradient norm: {expected:g} in training, {norm:g} in the probe; they must do the same work"
        )
    check_fit(result)
    training: list[float] = []
    whole: list[float] = []
    shares: list[dict[str, float]] = []
    for round_ in range(rounds):
        for task in ("training", "probe")[:: 1 if round_ % 2 else -1]:
            gc.collect()
            wall, start = time.perf_counter(), clock()
            if task == "training":
                training_gradient(model, update, setup.max_tokens_per_microbatch)
                training.append(clock() - start)
            else:
                result = whole_probe()
                whole.append(clock() - start)
                wall = time.perf_counter() - wall
                named = {phase: seconds / wall for phase, seconds in result.timing.items()}
                shares.append(named | {"rest": 1 - sum(named.values())})
    paired = [p / t for p, t in zip(whole, training, strict=True)]
    return {
        "ratio": median(whole) / median(training),
        "ratio_min": min(paired),
        "ratio_max": max(paired),
        "training_seconds": median(training),
        "probe_seconds": median(whole),
        "rounds": rounds,
        "shares": {phase: median(s[phase] for s in shares) for phase in shares[0]},
        "num_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "head": result.diagnostics.head,
        "prefix_sharing": result.diagnostics.prefix_sharing,
        "per_sample_gradients": result.diagnostics.per_sample_gradients,
    }


def peak_mib() -> float:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MIB


def memory_worker(setup: Setup) -> dict[str, Any]:
    """Peak memory of this process after the imports, with policy and batches in place, and after a probe."""
    peaks = {"imports": peak_mib()}
    model, optimizer = setup.policy(lora=True)
    update, evaluation = setup.batches(model)
    peaks["ready"] = peak_mib()
    EntropyProbe(model, optimizer, setup.config).run(update=update, evaluation=evaluation)
    return peaks | {"probe": peak_mib()}


def memory(setup: Setup, threads: int) -> dict[str, Any]:
    """Peak memory at the given batch size and at 8 times as many prompts, each in a fresh process.

    Measured with per-prompt update gradients kept (the default) and with a second pass in their place. It has to run
    before this process grows, since a child starts with its parent's peak.
    """
    filled = setup.num_sequences * (setup.prompt_tokens + setup.response_tokens) >= setup.max_tokens_per_microbatch
    found: dict[str, Any] = {"fills_a_microbatch": filled}
    for name, gib in (("stored", setup.max_stored_gradient_gib), ("second_pass", 0.0)):
        peaks = []
        for factor in (1, 8):
            of_size = replace(setup, num_prompts=factor * setup.num_prompts, max_stored_gradient_gib=gib)
            arguments = ["--threads", str(threads), "--memory-worker", json.dumps(asdict(of_size))]
            output = subprocess.run(
                [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            peaks.append({"num_sequences": of_size.num_sequences} | json.loads(output))
        small, large = peaks
        found[name] = {
            "sizes": peaks,
            "growth": large["probe"] / small["probe"] - 1,
            "growth_net_of_imports": (large["probe"] - large["imports"]) / (small["probe"] - small["imports"]) - 1,
        }
    return found


@dataclass(frozen=True)
class VarianceSetup:
    """Sizes of the variance comparison, and the training arguments of its checkpoint."""

    sequences: int = 2048
    repeats: int = 48
    num_prompts: int = 16
    group_size: int = 8
    training: tuple[tuple[str, int], ...] = ()


FULL_VARIANCE = VarianceSetup()
QUICK_VARIANCE = VarianceSetup(
    sequences=64, repeats=12, training=(("warm_start_steps", 150), ("steps", 2), ("save_steps", 2))
)
ESTIMATORS = {"ours": {}, "reference": {"entropy": "surprisal", "realized": "snis"}}


def variance(setup: VarianceSetup, directory: Path) -> dict[str, Any]:
    """Variances on the evaluation side, ours and the reference's, for one update batch.

    Reported: squared standard errors from one batch. Empirical: the variance of the estimates over disjoint batches of
    the same size. Interval: 95% of 2,000 bootstrap samples of these batches.
    """
    checkpoint = train_demo(directory, **dict(setup.training), on_progress=lambda line: print(line, file=sys.stderr))
    state = load_checkpoint(checkpoint, directory / "base")
    prompts = load_prompts(PromptSource(jsonl=directory / "prompts.jsonl"))
    subject = (HFGenerator(state.model, state.tokenizer, batch_size=512), state.tokenizer, prompts)
    parameters = SamplingParameters(1.0, MAX_COMPLETION_LENGTH)
    batch = UpdateSettings(num_prompts=setup.num_prompts, group_size=setup.group_size)
    update, _ = sample_update(*subject, load_reward("exact_match"), batch, parameters)
    draws = EvaluationSettings(total_sequences=setup.sequences * setup.repeats)
    evaluation, _ = sample_evaluation(*subject, draws, parameters)
    probes = {
        name: EntropyProbe(state.model, state.optimizer, ProbeConfig(**options)) for name, options in ESTIMATORS.items()
    }
    results: dict[str, list[ProbeResult]] = {name: [] for name in probes}
    for rows in torch.arange(len(evaluation)).split(setup.sequences):
        for name, probe in probes.items():
            results[name].append(probe.run(update=update, evaluation=evaluation.select(rows)))
    return _compare(results) | {"num_sequences": setup.sequences, "repeats": setup.repeats}


def _quantities(result: ProbeResult) -> Iterator[tuple[str, float, float]]:
    """Name, value and evaluation-side standard error of what is compared."""
    predicted, realized, difference = result.predicted, result.realized, result.difference
    assert predicted is not None
    assert realized is not None
    assert difference is not None
    yield "delta_h1", predicted.value, predicted.se_evaluation
    yield "delta_h", realized.value, realized.standard_error
    yield "difference", difference.value, difference.standard_error


def _compare(results: dict[str, list[ProbeResult]]) -> dict[str, Any]:
    values: dict[str, dict[str, Tensor]] = {}
    squared: dict[str, dict[str, Tensor]] = {}
    for name, runs in results.items():
        rows = [{q: (value, error**2) for q, value, error in _quantities(run)} for run in runs]
        values[name] = {q: torch.tensor([row[q][0] for row in rows], dtype=torch.float64) for q in rows[0]}
        squared[name] = {q: torch.tensor([row[q][1] for row in rows], dtype=torch.float64) for q in rows[0]}
    if any(bool((x == 0).any()) for of in squared.values() for x in of.values()):
        raise RuntimeError("variance: a standard error is 0, so the step moves nothing; train the checkpoint longer")
    ratios = {
        "delta_h1": (("reference", "delta_h1"), ("ours", "delta_h1")),
        "delta_h": (("reference", "delta_h"), ("ours", "delta_h")),
        "paired_difference_of_delta_h": (("ours", "difference"), ("ours", "delta_h")),
    }
    found: dict[str, Any] = {"estimates": {}, "variance_ratios": {}}
    for name in results:
        for quantity, x in values[name].items():
            found["estimates"][f"{quantity} {name}"] = {
                "first": x[0].item(),
                "first_standard_error": squared[name][quantity][0].sqrt().item(),
                "mean": x.mean().item(),
                "empirical_over_reported_variance": (x.var() / squared[name][quantity].mean()).item(),
            }
    for label, ((a, quantity_a), (b, quantity_b)) in ratios.items():
        reported = squared[a][quantity_a] / squared[b][quantity_b]
        low, high = _bootstrap_interval(values[a][quantity_a], values[b][quantity_b])
        found["variance_ratios"][label] = {
            "reported": reported[0].item(),
            "reported_mean": reported.mean().item(),
            "reported_min": reported.min().item(),
            "reported_max": reported.max().item(),
            "empirical": (values[a][quantity_a].var() / values[b][quantity_b].var()).item(),
            "empirical_interval": [low, high],
        }
    ours = results["ours"][0]
    found["update_side"] = {"se_update": ours.predicted.se_update, "ess_fraction": ours.realized.ess_fraction}
    return found


def _bootstrap_interval(a: Tensor, b: Tensor) -> tuple[float, float]:
    draws = torch.randint(len(a), (2000, len(a)), generator=torch.Generator().manual_seed(0))
    ratios = a[draws].var(1) / b[draws].var(1)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    return low, high


def show(found: dict[str, Any], console: Console) -> None:
    """Print the figures as tables."""
    sizes, machine = found["setup"], found["machine"]
    console.print(
        f"Qwen2, {sizes['num_layers']} layers, {sizes['hidden_size']} wide, MLP {sizes['intermediate_size']}, "
        f"vocabulary {sizes['vocab_size']}; {sizes['num_prompts']} x {sizes['group_size']} sequences in each batch, "
        f"{sizes['prompt_tokens']} + {sizes['response_tokens']} tokens; {machine['threads']} torch thread(s), "
        f"{machine['clock']} time",
        soft_wrap=True,
    )
    for kind, label in (("lora", "LoRA r = 8 on all linear layers (target: at most 3.2)"), ("full", "full weights")):
        if kind in found:
            _show_cost(found[kind], label, console)
    if "memory" in found:
        _show_memory(found["memory"], console)
    if "variance" in found:
        _show_variance(found["variance"], console)


def _show_cost(c: dict[str, Any], label: str, console: Console) -> None:
    title = f"Whole probe / one training gradient, {label}"
    table = Table("part of the probe", "share", "training gradients", title=title, title_justify="left")
    for phase, share in c["shares"].items():
        table.add_row(phase, f"{share:.0%}", f"{share * c['ratio']:.2f}")
    table.add_section()
    spread = f"(rounds {c['ratio_min']:.2f} to {c['ratio_max']:.2f})"
    table.add_row("whole probe", f"{c['probe_seconds']:.2f} s", f"{c['ratio']:.2f} {spread}")
    table.add_row("training gradient", f"{c['training_seconds']:.2f} s", "1")
    console.print(table)
    console.print(
        f"prefix sharing {c['prefix_sharing']}; per-sample gradients: {c['per_sample_gradients']}", soft_wrap=True
    )


def _show_memory(m: dict[str, Any], console: Console) -> None:
    title = "Peak memory of a fresh process in MiB, LoRA, batch grown 8x (target: growth below 10%)"
    columns = ("update gradients per prompt", "sequences", "imports", "ready", "probe", "growth", "net of imports")
    table = Table(*columns, title=title, title_justify="left")
    for name, label in (("stored", "stored (default)"), ("second_pass", "second pass")):
        for size in m[name]["sizes"]:
            grown = size is m[name]["sizes"][1]
            growth = (f"{m[name]['growth']:+.1%}", f"{m[name]['growth_net_of_imports']:+.1%}") if grown else ("", "")
            peaks = (f"{size[stage]:.0f}" for stage in ("imports", "ready", "probe"))
            table.add_row(label, str(size["num_sequences"]), *peaks, *growth)
    console.print(table)


def _show_variance(v: dict[str, Any], console: Console) -> None:
    title = (
        f"Variance ratios on the demo checkpoint, {v['num_sequences']} evaluation sequences; empirical over "
        f"{v['repeats']} disjoint batches"
    )
    columns = ("ratio", "reported", "reported, mean (range)", "empirical (95%)")
    table = Table(*columns, title=title, title_justify="left")
    labels = {
        "delta_h1": "δH₁: surprisal / ours",
        "delta_h": "ΔH: SNIS of surprisal / ours",
        "paired_difference_of_delta_h": "ΔH - δH₁ / ΔH, ours",
    }
    for name, label in labels.items():
        r = v["variance_ratios"][name]
        low, high = r["empirical_interval"]
        reported = f"{r['reported_mean']:.3g} ({r['reported_min']:.3g} to {r['reported_max']:.3g})"
        table.add_row(label, f"{r['reported']:.3g}", reported, f"{r['empirical']:.3g} ({low:.3g} to {high:.3g})")
    console.print(table)
    table = Table("estimate", "first batch", "mean", "empirical / reported variance")
    for name, e in v["estimates"].items():
        first = f"{e['first']:+.3e} ± {e['first_standard_error']:.1e}"
        table.add_row(name, first, f"{e['mean']:+.3e}", f"{e['empirical_over_reported_variance']:.2f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument(
        "--rounds", type=int, help="interleaved rounds of the LoRA cost (default: 5; full weights always take 3)"
    )
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="wall only on an idle machine")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="parts to run (default: all)")
    parser.add_argument("--demo-dir", type=Path, default=Path("examples/tiny"), help="the demo's checkpoint")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, and a checkpoint of its own")
    parser.add_argument("--memory-worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.memory_worker:
        print(json.dumps(memory_worker(Setup(**options.memory_worker))))
        return
    setup, variance_setup = (QUICK, QUICK_VARIANCE) if options.quick else (FULL, FULL_VARIANCE)
    rounds = {"lora": options.rounds or (2 if options.quick else 5), "full": 2 if options.quick else 3}
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    machine = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "clock": options.clock,
        "versions": library_versions(),
    }
    found: dict[str, Any] = {"machine": machine, "setup": asdict(setup), "quick": options.quick}
    if "memory" in options.only:
        found["memory"] = memory(setup, options.threads)
    for kind in ("lora", "full"):
        if kind in options.only:
            found[kind] = cost(setup, lora=kind == "lora", rounds=rounds[kind], clock=clock)
    if "variance" in options.only:
        with quiet_single_thread(), tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary) / "tiny" if options.quick else options.demo_dir
            found["variance"] = variance(variance_setup, directory)
    show(found, Console())
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
