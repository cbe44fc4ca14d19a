"""What ``inspect`` costs on a checkpoint with 10,000 parameter tensors, against ``torch.load`` on its optimizer file.

Both run in one process, after the libraries are imported, in interleaved rounds with the files in the page cache;
figures are ratios of medians of CPU time. The checkpoint is made in a temporary directory.

Run ``python benchmarks/inspect_checkpoint.py`` (minutes), or with ``--quick`` at a size that only shows that it works.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from entropy_probe.checkpoints import inspect_checkpoint
from entropy_probe.checkpoints.grouping import grouping_rules
from entropy_probe.checkpoints.libraries import quiet
from entropy_probe.checkpoints.parameters import layout_of
from entropy_probe.checkpoints.record import record_checkpoint
from entropy_probe.demo.policy import build_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(directory: Path, *, lora: bool, layers: int, width: int) -> Path:
    """A checkpoint after three AdamW steps on random gradients; returns its directory."""
    model = build_model("qwen2", hidden_size=width, num_layers=layers)
    if lora:
        from peft import LoraConfig, get_peft_model

        model.save_pretrained(directory / "base")
        model.name_or_path = str(directory / "base")
        model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS))
    parameters = dict(model.named_parameters())
    decay, no_decay = grouping_rules(layout_of(model))["hf-trainer-patterns"].groups
    groups = [{"params": [parameters[n] for n in names], "weight_decay": 0.0} for names in (decay, no_decay)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _ in range(3):
        for group in groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    checkpoint = directory / "checkpoint-3"
    model.save_pretrained(checkpoint)
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    torch.save({}, checkpoint / "scheduler.pt")
    return checkpoint


def compare(*, lora: bool, layers: int, width: int, manifest: bool, rounds: int) -> dict[str, float | int | bool | str]:
    """Medians of interleaved rounds."""
    with tempfile.TemporaryDirectory() as directory, quiet():
        checkpoint = make(Path(directory), lora=lora, layers=layers, width=width)
        if manifest:
            record_checkpoint(checkpoint, written_by="a benchmark")
        seconds: dict[str, list[float]] = {"load": [], "inspect": []}
        tensors = 0
        for _ in range(rounds + 1):
            start = time.process_time()
            torch.load(checkpoint / "optimizer.pt", weights_only=True)
            seconds["load"].append(time.process_time() - start)
            start = time.process_time()
            report = inspect_checkpoint(checkpoint)
            seconds["inspect"].append(time.process_time() - start)
            if report.optimizer_state is None or report.verdict == "unusable":
                raise RuntimeError(f"the checkpoint should be usable: {report.reasons}")
            tensors = report.optimizer_state.num_parameters
        ratios = [b / a for a, b in zip(seconds["load"], seconds["inspect"], strict=True)][1:]
    return {
        "weights": "LoRA" if lora else "full",
        "width": width,
        "manifest": manifest,
        "tensors": tensors,
        "rounds": rounds,
        "inspect_over_load": median(ratios),
        "smallest": min(ratios),
        "largest": max(ratios),
    }


def main() -> None:
    """Run the comparisons and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    full, lora = (4, 3) if options.quick else (833, 715)  # layers: about 10,000 tensors to train
    figures = []
    for settings in (
        {"lora": False, "layers": full, "width": 32, "manifest": False},
        {"lora": False, "layers": full, "width": 32, "manifest": True},
        {"lora": True, "layers": lora, "width": 32, "manifest": False},
    ):
        found = compare(**settings, rounds=options.rounds)
        figures.append(found)
        print(
            f"{found['weights']:5} {found['tensors']:6} tensors, manifest {found['manifest']!s:5}: inspect / load "
            f"{found['inspect_over_load']:.2f} ({found['smallest']:.2f} to {found['largest']:.2f})"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
