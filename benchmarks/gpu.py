"""What a whole probe of a 1.5B model with adapters costs on one GPU: memory, tokens per second, matrix-product rate.

A randomly initialised model of the shape of Qwen2.5-1.5B with LoRA on all linear layers samples its own batches, 64
prompts with 8 responses and as many draws with replacement, 100 new tokens each, and is probed. Reported by phase:
time, share of the device's matrix-product rate (operations of the products that were dispatched, over the rate of a
large product on the same device), and peak memory. One training gradient over the update batch is the unit of time.

Run ``python benchmarks/gpu.py`` on a machine with a CUDA device, where it writes its section of RESULTS.md, or with
``--size tiny`` anywhere, at a size that only shows that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from entropy_probe import EntropyProbe, ProbeConfig, ProbeResult, Rollouts
from entropy_probe.analyses.provenance import library_versions
from entropy_probe.demo.policy import build_tokenizer
from entropy_probe.demo.train import LORA_TARGETS
from entropy_probe.sampling import HFGenerator, SamplingParameters
from entropy_probe.sampling.responses import completed_rollouts, generate_responses, sequence_seeds
from entropy_probe.scoring.isolation import evaluating
from two_batch import training_gradient

GIB = 2**30
LIMIT_GIB = 40
SECTION = "GPU"
PRECISIONS = {"bfloat16": "bfloat16 base, float32 adapters", "autocast": "float32 under autocast", "float32": "float32"}


@dataclass(frozen=True)
class Size:
    """The model and its batches; every prompt has the same length."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    rank: int
    num_prompts: int
    group_size: int
    prompt_tokens: int
    response_tokens: int
    max_tokens_per_microbatch: int
    sampling_batch: int
    product: int

    @property
    def num_sequences(self) -> int:
        """Sequences of the update batch, and of the evaluation batch."""
        return self.num_prompts * self.group_size


SIZES = {
    "1.5b": Size(151_936, 1536, 8960, 28, 12, 2, 16, 64, 8, 128, 100, 4096, 512, 8192),
    "tiny": Size(128, 32, 64, 2, 4, 2, 4, 4, 2, 12, 6, 64, 8, 128),
}


class Products(TorchDispatchMode):
    """Counts the floating-point operations of matrix products; float64 ones are statistics, not the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        rule = flop_registry.get(func.overloadpacket)
        if rule is not None and args[0].dtype != torch.float64:
            self.total += rule(*args, **(kwargs or {}), out_val=out)
        return out


class Device:
    """Time and peak memory, on a CUDA device or the CPU (where no memory is reported)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def now(self) -> float:
        """Seconds, once all work that was given to the device is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def take_peak(self) -> int:
        """The most bytes allocated since this was last called."""
        if not self.cuda:
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def product_rate(self, size: int, dtype: torch.dtype) -> float:
        """Operations per second of a product of random square matrices, the mean of ten after three."""
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        for _ in range(3):
            a @ b
        start = self.now()
        for _ in range(10):
            a @ b
        return 10 * 2 * size**3 / (self.now() - start)


def build(size: Size, precision: str, device: torch.device) -> tuple[nn.Module, torch.optim.AdamW]:
    """The policy on the device and an optimizer that has taken two steps."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_key_value_heads,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with torch.device(device):
        base: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        # not the usual start at B = 0, where half of the gradients vanish
        lora = LoraConfig(r=size.rank, target_modules=LORA_TARGETS, init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model: Any = get_peft_model(base, lora).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = 0.1 * p.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    for _ in range(2):
        for p in trained:
            p.grad = 1e-3 * torch.randn_like(p)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def sample(model: nn.Module, size: Size, clock: Device) -> tuple[Rollouts, Rollouts, dict[str, float]]:
    """Both batches, sampled by the model itself, and how fast that went."""
    source = torch.Generator().manual_seed(1)
    pool = torch.randint(2, size.vocab_size, (4 * size.num_prompts, size.prompt_tokens), generator=source).tolist()
    update_ids = [k for k in range(size.num_prompts) for _ in range(size.group_size)]
    drawn = torch.randint(size.num_prompts, len(pool), (size.num_sequences,), generator=source).tolist()
    engine = HFGenerator(model, build_tokenizer(), batch_size=size.sampling_batch)
    parameters = SamplingParameters(1.0, size.response_tokens)

    def responses(ids: list[int], stream: int) -> Rollouts:
        seeds = sequence_seeds(0, stream, 0, range(len(ids)))
        completions = generate_responses(engine, [pool[k] for k in ids], ids, parameters, seeds)
        return completed_rollouts(ids, completions, advantages=torch.randn(len(ids), generator=source))

    responses(update_ids[: size.group_size], 2)  # warm-up
    clock.take_peak()
    start = clock.now()
    update, evaluation = responses(update_ids, 0), responses(drawn, 1)
    seconds = clock.now() - start
    tokens = int(update.response_mask.sum() + evaluation.response_mask.sum())
    return update, evaluation, {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak": clock.take_peak()}


class Watch:
    """Takes a number, such as a peak, whenever the probe reports progress, and keeps it for the phase."""

    def __init__(self, take: Callable[[], int], combine: Callable[[int, int], int]) -> None:
        self.take, self.combine = take, combine
        self.by_phase: dict[str, int] = {}

    def __call__(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Called as :data:`entropy_probe.analyses.provenance.Phase`."""
        self.by_phase[phase] = self.combine(self.by_phase.get(phase, 0), self.take())


def measure(size: Size, precision: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """The whole benchmark."""
    clock = Device(device)
    rate = clock.product_rate(size.product, torch.float32 if precision == "float32" else torch.bfloat16)
    model, optimizer = build(size, precision, device)
    update, evaluation, sampling = sample(model, size, clock)
    config = ProbeConfig(
        max_tokens_per_microbatch=size.max_tokens_per_microbatch,
        dtype="bfloat16" if precision == "bfloat16" else "float32",
        autocast="bfloat16" if precision == "autocast" else "off",
        min_ess_fraction=0.0,
    )

    def train() -> float:
        with evaluating(model, torch.bfloat16 if precision == "autocast" else None):
            found = training_gradient(model, update, size.max_tokens_per_microbatch)
        return float(torch.cat([g.reshape(-1).double() for g in found]).norm())

    def probe(progress: Watch | None) -> ProbeResult:
        # a probe of its own each time: it would remember the scores of the evaluation batch
        return EntropyProbe(model, optimizer, config, progress=progress).run(update=update, evaluation=evaluation)

    with Products() as counted:  # also the warm-up
        expected = train()
        training_operations, counted.total = counted.total, 0
        last = 0

        def since() -> int:
            nonlocal last
            last, before = counted.total, last
            return last - before

        operations = Watch(since, int.__add__)
        result = probe(operations)
        operations("noise floor")  # the last phase, which reports no progress
    norm = result.diagnostics.gradient_norm
    if abs(norm - expected) > (1e-3 if precision == "float32" else 0.05) * expected:
        raise RuntimeError(
            f"gradient norm: {expected:g} in training, {norm:g} in the probe; they must do the same work"
        )
    training: list[float] = []
    whole: list[float] = []
    timings: list[dict[str, float]] = []
    peaks = Watch(clock.take_peak, max)
    for _ in range(rounds):
        start = clock.now()
        train()
        training.append(clock.now() - start)
        clock.take_peak()
        start = clock.now()
        result = probe(peaks)
        whole.append(clock.now() - start)
        peaks("noise floor")
        timings.append(result.timing)
    seconds = {phase: median(t[phase] for t in timings) for phase in timings[0]}
    return {
        "precision": precision,
        "rounds": rounds,
        "product_rate": rate,
        "sampling": sampling,
        "training_seconds": median(training),
        "training_share_of_rate": training_operations / median(training) / rate,
        "probe_seconds": median(whole),
        "ratio": median(whole) / median(training),
        "probe_share_of_rate": sum(operations.by_phase.values()) / median(whole) / rate,
        "scored_tokens_per_second": int(evaluation.response_mask.sum()) / seconds["score evaluation"],
        "peak": max(sampling["peak"], *peaks.by_phase.values()),
        "phases": {
            phase: {
                "share_of_time": s / median(whole),
                "share_of_rate": operations.by_phase.get(phase, 0) / s / rate,
                "peak": peaks.by_phase.get(phase, 0),
            }
            for phase, s in seconds.items()
        },
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "per_unit_gradients": result.diagnostics.per_unit_gradients,
        "prefix_sharing": result.diagnostics.prefix_sharing,
        "notes": [note.text for note in result.diagnostics.notes],
    }


def section(found: dict[str, Any]) -> str:
    """The figures as a section of RESULTS.md."""
    f, size = found["figures"], found["size"]

    def gib(x: float) -> str:
        return f"{x / GIB:.1f} GiB" if x else "not measured"

    sampled = f["sampling"]
    rest = 1 - sum(p["share_of_time"] for p in f["phases"].values())
    notes = [f"{message}." for message in f["notes"] if "out of memory" in message]
    lines = [
        f"## {SECTION}",
        "",
        f"`python benchmarks/gpu.py --size {found['name']} --precision {f['precision']}` · {found['device']}, torch "
        f"{found['versions']['torch']}, {found['date']} · Qwen2 with {f['num_parameters'] / 1e6:,.0f}M random "
        f"parameters, LoRA of rank {size['rank']} on all linear layers ({f['num_trained'] / 1e6:.2f}M); "
        f"{PRECISIONS[f['precision']]}; {size['num_prompts']} × {size['group_size']} sequences in each batch, "
        f"{size['prompt_tokens']} + at most "
        f"{size['response_tokens']} tokens; medians of {f['rounds']} rounds. Peak rate: a "
        f"{size['product']}-wide product, {f['product_rate'] / 1e12:,.3g} TFLOP/s.",
        "",
        "| quantity | value |",
        "|---|---|",
        f"| whole probe without sampling / one training gradient | {f['ratio']:.2f} |",
        f"| peak memory, sampling included (limit {LIMIT_GIB} GB) | {gib(f['peak'])} |",
        f"| tokens sampled per second, {size['sampling_batch']} at a time | {sampled['tokens_per_second']:,.0f} |",
        f"| response tokens scored per second | {f['scored_tokens_per_second']:,.0f} |",
        f"| share of the peak rate: probe, training gradient | {f['probe_share_of_rate']:.0%}, "
        f"{f['training_share_of_rate']:.0%} |",
        f"| sampling / whole probe without it | {sampled['seconds'] / f['probe_seconds']:.2f} |",
        "",
        "| phase | share of the probe's time | training gradients | share of the peak rate | peak memory |",
        "|---|---|---|---|---|",
        *(
            f"| {phase} | {p['share_of_time']:.0%} | {p['share_of_time'] * f['ratio']:.2f} | "
            f"{p['share_of_rate']:.0%} | {gib(p['peak'])} |"
            for phase, p in f["phases"].items()
        ),
        f"| rest | {rest:.0%} | {rest * f['ratio']:.2f} | | |",
        "",
        " ".join([f"Gradients by {f['per_unit_gradients']}, prefix sharing {f['prefix_sharing']}.", *notes]),
        "",
    ]
    return "\n".join(lines)


def update_section(path: Path, text: str) -> None:
    """Put a section into a Markdown file in place of the one of the same title, or at the end; others stay."""
    old = path.read_text(encoding="utf-8") if path.is_file() else "# Benchmark results\n"
    title = text.splitlines()[0]
    parts = [part.strip() for part in re.split(r"(?m)^(?=## )", old)]
    places = [k for k, part in enumerate(parts) if part.splitlines()[:1] == [title]] or [len(parts)]
    parts[places[0] : places[0] + 1] = [text.strip()]
    new = "\n\n".join(parts) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(new, encoding="utf-8")
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.5b")
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, help="whose section to write (on a GPU: RESULTS.md beside this)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cpu" and options.size != "tiny":
        parser.error("expected a CUDA device for this size, torch finds none; use --size tiny")
    size = SIZES[options.size]
    found: dict[str, Any] = {
        "name": options.size,
        "size": asdict(size),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "versions": library_versions(),
    }
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        found["figures"] = measure(size, options.precision, options.rounds, device)
    text = section(found)
    Console(soft_wrap=True, markup=False, highlight=False).print(text)
    results = options.results or (Path(__file__).with_name("RESULTS.md") if device.type == "cuda" else None)
    if results:
        update_section(results, text)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
