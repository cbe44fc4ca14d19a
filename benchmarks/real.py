"""The demo's claims on a real policy: SmolLM2-135M-Instruct after steps 5, 10, 15 and 20 of ``make demo-real``.

For each checkpoint: the predicted change against the measured one at eight learning rates; the errors against the
number of evaluation sequences; time and peak memory of the whole probe against one training gradient; tokens per
second of the sampling loop against ``generate`` at the same batch size.

Run ``python benchmarks/real.py`` (about three hours on two idle cores), or for some ``--checkpoints`` and ``--parts``.
What is finished lies in ``runs/bench-real`` and is not computed again; an interrupted sweep goes on where it was. The
section of RESULTS.md is written anew from what is there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts, load_checkpoint
from entropy_probe.cli.demo import DEMOS, Model
from entropy_probe.cli.quiet import quiet_libraries
from entropy_probe.cli.sweep import sweep_checkpoints
from entropy_probe.cli.sweep_config import SweepConfig
from entropy_probe.demo.train import quiet
from entropy_probe.parallel.ranks import ALONE
from entropy_probe.report.numbers import format_estimate
from entropy_probe.results.record import write_atomically
from gpu import update_section
from two_batch import training_gradient

RATES = (1e-5, 3e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)
TITLE = "## A real policy: SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Subject:
    """A checkpoint and where its figures go."""

    directory: Path
    step: int
    sequences: int
    output: Path

    @property
    def checkpoint(self) -> Path:
        """Its directory."""
        return self.directory / f"checkpoint-{self.step}"

    def load(self) -> tuple[Any, dict[str, Rollouts]]:
        """The checkpoint, and the batches that its sweep has sampled."""
        batches = {
            name: Rollouts.from_parquet(self.output / f"sweep/{name}.parquet") for name in ("update", "evaluation")
        }
        return load_checkpoint(self.checkpoint, str(self.directory / "base"), device="cpu"), batches


def rates(subject: Subject) -> dict[str, Any]:
    """A row per learning rate, in ``nats/token``."""
    settings = DEMOS[Model.smollm2]().settings | {"evaluation": {"total_sequences": subject.sequences}}
    config = SweepConfig.model_validate(
        settings
        | {
            "checkpoint": subject.checkpoint,
            "base_model": str(subject.directory / "base"),
            "output_dir": subject.output / "sweep",
            "device": "cpu",
            "sweep": {"learning_rates": RATES},
        }
    )
    (sweep,) = sweep_checkpoints(config, ALONE).values()
    return {"rows": [_row(point) for point in sweep.points], "linear_up_to": sweep.linear_range.learning_rate}


def _row(point: Any) -> dict[str, Any]:
    """What a point says: values with their errors, and by how many combined errors they differ."""
    both, gap = (point.predicted, point.estimate), point.difference
    return {
        "learning_rate": point.learning_rate,
        "predicted": [both[0].value, both[0].se_evaluation],
        "realized": both[1] and [both[1].value, both[1].standard_error],
        "difference": gap and [gap.value, gap.standard_error],
        "ess": point.realized and point.realized.ess_fraction,
        "status": point.status,
    }


def sizes(subject: Subject) -> dict[str, Any]:
    """A row per number of evaluation sequences, the first ones of the same batch."""
    state, batches = subject.load()
    probe, rows = EntropyProbe(state.model, state.optimizer, ProbeConfig()), []
    for part in (8, 4, 2, 1):
        evaluation = batches["evaluation"].select(torch.arange(len(batches["evaluation"]) // part))
        result = probe.run(update=batches["update"], evaluation=evaluation)
        predicted, realized = result.predicted, result.realized
        rows.append({
            "sequences": len(evaluation),
            "predicted": [predicted.value, predicted.standard_error, predicted.se_evaluation],
            "realized": [realized.value, realized.standard_error],
        })  # fmt: skip
    return {"rows": rows}


def cost(subject: Subject) -> dict[str, Any]:
    """CPU seconds and peak memory of one training gradient on the evaluation batch, and of the whole probe."""
    found = {}
    for name in ("training", "probe"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak = pool.apply(_cost_of, (subject, name))
        found[name] = {"cpu_seconds": seconds, "peak_mib": peak}
    return found


def _cost_of(subject: Subject, name: str) -> tuple[float, float]:
    """In a process of its own, whose peak is the task's."""
    quiet_libraries()
    state, batches = subject.load()
    start = time.process_time()
    if name == "training":
        evaluation = replace(batches["evaluation"], advantages=torch.ones(len(batches["evaluation"])))
        training_gradient(state.model, evaluation, ProbeConfig().max_tokens_per_microbatch)
    else:
        EntropyProbe(state.model, state.optimizer, ProbeConfig()).run(**batches)
    return time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sampling(subject: Subject) -> dict[str, Any]:
    """Response tokens per CPU second of the sampling loop, and of ``generate``, on the same prompts at batch 64."""
    from entropy_probe.demo.smollm2 import MAX_COMPLETION_LENGTH
    from entropy_probe.sampling import HFGenerator, PromptSource, SamplingParameters, encode_prompts, load_prompts

    state, _ = subject.load()
    prompts = load_prompts(PromptSource(**DEMOS[Model.smollm2]().settings["prompts"]))[:64]
    ids = encode_prompts(state.tokenizer, prompts)
    found = {}
    for name in ("ours", "generate"):
        start = time.process_time()
        if name == "ours":
            completions = HFGenerator(state.model, state.tokenizer, batch_size=64).generate(
                prompts, SamplingParameters(1.0, MAX_COMPLETION_LENGTH), list(range(64))
            )
            tokens = sum(len(completion.token_ids) for completion in completions)
        else:
            longest = max(map(len, ids))
            padded = torch.tensor([[state.tokenizer.pad_token_id] * (longest - len(row)) + row for row in ids])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
            with torch.inference_mode():
                texts = state.model.generate(input_ids=padded, attention_mask=mask, do_sample=True, temperature=1.0,
                                             top_k=0, top_p=1.0, max_new_tokens=MAX_COMPLETION_LENGTH)  # fmt: skip
            ended = (texts[:, longest:] == state.tokenizer.eos_token_id).cumsum(1)
            tokens = int(
                (ended <= 1).sum() - ((ended == 1) & (texts[:, longest:] != state.tokenizer.eos_token_id)).sum()
            )
        found[name] = {"tokens": tokens, "cpu_seconds": time.process_time() - start}
    return found


PARTS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "rates": rates,
    "sizes": sizes,
    "cost": cost,
    "sampling": sampling,
}


def figures(subject: Subject, part: str) -> dict[str, Any]:
    """What a part has found, computed if it is not there yet, with the wall time that it took."""
    file = subject.output / f"{part}.json"
    if not file.is_file():
        print(f"{time.strftime('%H:%M:%S')} step {subject.step}: {part}", file=sys.stderr)
        start = time.monotonic()
        found = PARTS[part](subject) | {"sequences": subject.sequences}
        write_atomically(file, json.dumps(found | {"seconds": time.monotonic() - start}, indent=1).encode())
    return json.loads(file.read_bytes())


def section(found: dict[int, dict[str, dict[str, Any]]], command: str) -> str:
    """The figures as a section of RESULTS.md."""
    sequences = {part["sequences"] for parts in found.values() for part in parts.values()}
    lines = [
        TITLE,
        "",
        f"`{command}` · the checkpoints of `make demo-real`; 8 prompts × 8 responses of up to 40 tokens in the update "
        "batch, " + " or ".join(map(str, sorted(sequences))) + " sequences in the evaluation batch; errors are one "
        "standard error. Wall times are of a machine whose two cores were shared.",
        "",
    ]
    for part, (title, head, rows) in TABLES.items():
        there = {step: parts[part] for step, parts in found.items() if part in parts}
        if not there:
            continue
        took = ", ".join(
            f"{timedelta(seconds=round(figure['seconds']))} at step {step}" for step, figure in there.items()
        )
        lines += [f"{title} (wall time: {took}):", "", head, "|---" * (head.count("|") - 1) + "|"]
        lines += [f"| {step} | " + " | ".join(row) + " |" for step, figure in there.items() for row in rows(figure)]
        lines.append("")
    return "\n".join(lines)


def _rate_rows(figure: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in figure["rows"]:
        values = [
            format_estimate(*row[name]) if row[name] else row["status"]
            for name in ("predicted", "realized", "difference")
        ]
        rows.append([f"{row['learning_rate']:.1e}", *values, "" if row["ess"] is None else f"{row['ess']:.1%}"])
    return rows


def _size_rows(figure: dict[str, Any]) -> list[list[str]]:
    return [
        [
            str(row["sequences"]),
            format_estimate(*row["predicted"][:2]),
            f"{row['predicted'][2]:.2e}",
            format_estimate(*row["realized"]),
        ]
        for row in figure["rows"]
    ]


def _cost_rows(figure: dict[str, Any]) -> list[list[str]]:
    training, probe = figure["training"], figure["probe"]
    return [
        [
            f"{probe['cpu_seconds'] / training['cpu_seconds']:.2f}",
            f"{training['peak_mib']:,.0f} MiB",
            f"{probe['peak_mib']:,.0f} MiB",
        ]
    ]


def _sampling_rows(figure: dict[str, Any]) -> list[list[str]]:
    speeds = [figure[name]["tokens"] / figure[name]["cpu_seconds"] for name in ("ours", "generate")]
    return [[f"{speeds[0] / speeds[1]:.2f}"]]


TABLES: dict[str, tuple[str, str, Callable[[dict[str, Any]], list[list[str]]]]] = {
    "rates": (
        "Predicted and measured on one update batch, errors from the evaluation batch",
        "| step | learning rate | predicted δH₁ | realized ΔH | difference | ESS |",
        _rate_rows,
    ),
    "sizes": (
        "Errors against the size of the evaluation batch",
        "| step | sequences | δH₁, other update batches counted in | its error from E | realized ΔH |",
        _size_rows,
    ),
    "cost": (
        "Cost of the whole probe, generation excluded, over one training gradient on the evaluation batch",
        "| step | CPU time | peak memory, training gradient | peak memory, probe |",
        _cost_rows,
    ),
    "sampling": (
        "Response tokens per CPU second, 64 sequences at a time",
        "| step | sampling loop / generate |",
        _sampling_rows,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("examples/smollm2"), help="of the trained demo")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-real"), help="where figures are kept")
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[5, 10, 15, 20])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sequences", type=int, default=192, help="of the evaluation batch")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("RESULTS.md"))
    options = parser.parse_args()
    quiet_libraries()
    with quiet(torch.get_num_threads()):
        found = {}
        for step in options.checkpoints:
            subject = Subject(options.directory, step, options.sequences, options.output / f"checkpoint-{step}")
            found[step] = {part: figures(subject, part) for part in options.parts}
            update_section(
                options.results, section(found, f"python benchmarks/real.py {' '.join(sys.argv[1:])}".strip())
            )


if __name__ == "__main__":
    main()
