"""Whether memory and time per sequence stay the same from thousands to tens of thousands of evaluation sequences.

A tiny policy samples from a pool of 500 prompts, shard by shard into a file, and is probed on it; each size in a fresh
process. Reported are peaks of resident memory, and CPU time per sequence, as ratios to the smallest size.

Run ``python benchmarks/scale.py`` (minutes), or with ``--quick`` at sizes that only show that it works.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.demo.policy import build_model, build_tokenizer
from entropy_probe.demo.train import LORA_TARGETS
from entropy_probe.sampling import (
    EvaluationSettings,
    HFGenerator,
    Prompt,
    SamplingParameters,
    UpdateSettings,
    sample_evaluation_file,
    sample_update,
)

SIZES, QUICK = (2048, 8192, 32768), (300, 600)
MIB = 2**20


def peak_mib() -> float:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MIB


def worker(sequences: int, max_completion_length: int, max_tokens: int) -> dict[str, float]:
    """Peaks of this process after the imports, after sampling and after a probe; CPU seconds of both."""
    import pyarrow.parquet  # noqa: F401  # part of the imports, not of the work

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    base = build_model(hidden_size=64, num_layers=2, initializer_range=0.2)
    model: Any = get_peft_model(base, LoraConfig(r=8, target_modules=LORA_TARGETS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(2):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    optimizer.zero_grad()
    prompts = [Prompt(i, f"{i}+{(37 * i) % 500}=") for i in range(500)]
    engine, parameters = HFGenerator(model, tokenizer, 256), SamplingParameters(1.0, max_completion_length)
    settings = UpdateSettings(num_prompts=16, group_size=8)
    update, _ = sample_update(
        engine, tokenizer, prompts, lambda responses: [float(len(text)) for text in responses], settings, parameters
    )
    found = {"sequences": sequences, "imports": peak_mib()}
    with tempfile.TemporaryDirectory() as temporary:
        path, start = Path(temporary) / "evaluation.parquet", time.process_time()
        evaluation = EvaluationSettings(total_sequences=sequences)
        shards = Path(temporary) / "evaluation"
        sample_evaluation_file(
            engine, tokenizer, prompts, evaluation, parameters, path, shards=shards, policy="benchmark"
        )
        found |= {"sampled": peak_mib(), "sampling_seconds": time.process_time() - start}
        start = time.process_time()
        batch = Rollouts.from_parquet(path)
        found["read"] = peak_mib()
        config = ProbeConfig(max_tokens_per_microbatch=max_tokens)
        result = EntropyProbe(model, optimizer, config).run(update=update, evaluation=batch)
    tokens = batch.response_lengths.double().mean().item()
    return found | {
        "probed": peak_mib(),
        "probe_seconds": time.process_time() - start,
        "response_tokens": tokens,
        "delta_h1": result.predicted.value if result.predicted else 0.0,
    }


def main() -> None:
    """Measure as asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--max-completion-length", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=8192, help="per microbatch")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker:
        print(json.dumps(worker(options.worker, options.max_completion_length, options.max_tokens)))
        return
    found = []
    for size in QUICK if options.quick else SIZES:
        length, tokens = str(options.max_completion_length), str(options.max_tokens)
        command = [sys.executable, __file__, "--worker", str(size)]
        command += ["--max-completion-length", length, "--max-tokens", tokens]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    show(found, Console())
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def show(found: list[dict[str, float]], console: Console) -> None:
    """Print the figures as a table of ratios to the smallest size."""
    small = found[0]
    columns = ("sequences", "peak MiB", "peak / smallest", "net of imports", "sampling / sequence", "probe / sequence")
    table = Table(*columns, title=f"{small['response_tokens']:.1f} tokens per response", title_justify="left")
    for size in found:
        net = (size["probed"] - size["imports"]) / (small["probed"] - small["imports"])
        per = [
            (size[name] / size["sequences"]) / (small[name] / small["sequences"])
            for name in ("sampling_seconds", "probe_seconds")
        ]
        stages = "/".join(f"{size[name]:.0f}" for name in ("imports", "sampled", "read", "probed"))
        ratios = (f"{x:.2f}" for x in (size["probed"] / small["probed"], net, *per))
        table.add_row(f"{size['sequences']:.0f}", stages, *ratios)
    console.print(table)


if __name__ == "__main__":
    main()
