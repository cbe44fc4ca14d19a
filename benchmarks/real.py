"""The demo's claims on a real policy: SmolLM2-135M-Instruct after steps 5, 10, 15 and 20 of ``make demo-real``.

For each checkpoint: tokens per second of the sampling loop against ``generate`` at the same batch size; time and peak
memory of the whole probe against one training gradient; the predicted change against the measured one at eight learning
rates; gradient, momentum and weight decay over the run, and the change from the step's own batch beside that from
evaluation rollouts; how contributions and published scores rank what fresh responses say; the errors against those of
the reference estimators, and against the number of evaluation sequences.

Run ``python benchmarks/real.py`` (about three hours on two idle cores), or for some ``--checkpoints`` and ``--parts``.
What is finished lies in ``runs/bench-real`` and is not computed again; an interrupted sweep goes on where it was. The
section of RESULTS.md is written anew from all that is there.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts, load_checkpoint
from entropy_probe.cli.demo import DEMOS, Model
from entropy_probe.cli.quiet import quiet_libraries
from entropy_probe.cli.sweep import sweep_checkpoints
from entropy_probe.cli.sweep_config import SweepConfig
from entropy_probe.demo.smollm2 import MAX_COMPLETION_LENGTH
from entropy_probe.demo.train import quiet
from entropy_probe.parallel.ranks import ALONE
from entropy_probe.report.numbers import format_estimate
from entropy_probe.report.sections.validation import FORECASTS
from entropy_probe.results.record import write_atomically
from entropy_probe.sampling import HFGenerator, PromptSource, SamplingParameters, encode_prompts, load_prompts
from entropy_probe.scoring.memory import fitting_tokens
from gpu import update_section
from scores import first_order, sampled
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

    def load(self, num_prompts: int = 8) -> tuple[Any, dict[str, Rollouts]]:
        """The checkpoint, an update batch of so many prompts, and two evaluation batches."""
        state = load_checkpoint(self.checkpoint, str(self.directory / "base"), device="cpu")
        settings = DEMOS[Model.smollm2]().settings
        settings = settings | {"update": settings["update"] | {"num_prompts": num_prompts}}
        return state, sampled(state, settings, self.output / f"rollouts-{num_prompts}", self.sequences)


def rates(subject: Subject) -> dict[str, Any]:
    """A row per learning rate, in ``nats/token``."""
    subject.load()
    rollouts = subject.output / "rollouts-8"
    config = SweepConfig.model_validate(
        {
            "checkpoint": subject.checkpoint,
            "base_model": str(subject.directory / "base"),
            "output_dir": subject.output / "sweep",
            "device": "cpu",
            "rollouts": {"update": rollouts / "update.parquet", "evaluation": rollouts / "own.parquet"},
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


def changes(subject: Subject) -> dict[str, Any]:
    """The change and its parts from the evaluation batch, and both changes from the step's own batch beside it."""
    state, batches = subject.load()
    probe = EntropyProbe(state.model, state.optimizer, ProbeConfig())
    result = probe.run(update=batches["update"], evaluation=batches["own"], pool=True)
    own, predicted, realized = result.pooled, result.predicted, result.realized
    assert own is not None
    assert predicted is not None
    values = {
        "entropy": result.entropy,
        **result.components,
        "predicted": predicted,
        "realized": realized,
        "committed": result.committed,
        "own predicted": own.own,
        "own realized": own.own_realized,
    }
    estimates = {name: x and [x.value, getattr(x, "se_evaluation", x.standard_error)] for name, x in values.items()}
    return {"estimates": estimates, "z": own.z}


def sizes(subject: Subject) -> dict[str, Any]:
    """A row per number of evaluation sequences, the first ones of the same batch."""
    state, batches = subject.load()
    probe, rows = EntropyProbe(state.model, state.optimizer, ProbeConfig()), []
    for part in (8, 4, 2, 1):
        evaluation = batches["own"].select(torch.arange(subject.sequences // part))
        result = probe.run(update=batches["update"], evaluation=evaluation)
        predicted, realized = result.predicted, result.realized
        rows.append({
            "sequences": len(evaluation),
            "predicted": [predicted.value, predicted.standard_error, predicted.se_evaluation],
            "realized": [realized.value, realized.standard_error],
        })  # fmt: skip
    return {"rows": rows}


def variance(subject: Subject) -> dict[str, Any]:
    """Both changes by surprisal and self-normalised weights, the reference, and as this package takes them."""
    state, batches = subject.load()
    estimates: dict[str, Any] = {}
    for name, settings in (("ours", {}), ("reference", {"entropy": "surprisal", "realized": "snis"})):
        probe = EntropyProbe(state.model, state.optimizer, ProbeConfig(horizon=None, **settings))
        result = probe.run(update=batches["update"], evaluation=batches["own"])
        predicted, realized = result.predicted, result.realized
        assert predicted is not None
        assert realized is not None
        estimates[name] = {
            "predicted": [predicted.value, predicted.se_evaluation],
            "realized": [realized.value, realized.standard_error],
        }
    return estimates


def cost(subject: Subject) -> dict[str, Any]:
    """CPU seconds and peak memory of one training gradient on the evaluation batch, and of the whole probe."""
    subject.load()  # so that neither samples
    costs = {}
    for name in ("training", "probe"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak = pool.apply(_cost_of, (subject, name))
        costs[name] = {"cpu_seconds": seconds, "peak_mib": peak}
    return costs


def _cost_of(subject: Subject, name: str) -> tuple[float, float]:
    """In a process of its own, whose peak is the task's."""
    quiet_libraries()
    state, batches = subject.load()
    start = time.process_time()
    if name == "training":
        evaluation = replace(batches["own"], advantages=torch.ones(subject.sequences))
        training_gradient(state.model, evaluation, fitting_tokens(state.model))
    else:
        probe = EntropyProbe(state.model, state.optimizer, ProbeConfig())
        probe.run(update=batches["update"], evaluation=batches["own"])
    return time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sampling(subject: Subject) -> dict[str, Any]:
    """Response tokens per CPU second of the sampling loop, and of ``generate``, on the same prompts at batch 64."""
    state, _ = subject.load()
    ids = encode_prompts(state.tokenizer, load_prompts(PromptSource(**DEMOS[Model.smollm2]().settings["prompts"]))[:64])
    start = time.process_time()
    completions = HFGenerator(state.model, state.tokenizer, batch_size=64).generate(
        ids, SamplingParameters(1.0, MAX_COMPLETION_LENGTH), list(range(64))
    )
    ours = {
        "tokens": sum(len(completion.token_ids) for completion in completions),
        "cpu_seconds": time.process_time() - start,
    }
    start, longest, pad = time.process_time(), max(map(len, ids)), state.tokenizer.pad_token_id
    padded = torch.tensor([[pad] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    with torch.inference_mode():
        texts = state.model.generate(input_ids=padded, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                                     top_p=1.0, max_new_tokens=MAX_COMPLETION_LENGTH, pad_token_id=pad)  # fmt: skip
    ends = texts[:, longest:] == state.tokenizer.eos_token_id
    # a token counts unless one before it ended the response
    tokens = int((ends.cumsum(1) - ends.int() == 0).sum())
    return {"ours": ours, "generate": {"tokens": tokens, "cpu_seconds": time.process_time() - start}}


def scores(subject: Subject, num_prompts: int = 32) -> dict[str, Any]:
    """How contributions and published scores rank what fresh evaluation rollouts say, to first order."""
    state, batches = subject.load(num_prompts)
    probe = EntropyProbe(state.model, state.optimizer, ProbeConfig())
    own, fresh = (probe.attribute(update=batches["update"], evaluation=batches[name]) for name in ("own", "fresh"))
    return first_order(state.model, own, fresh) | {"num_prompts": num_prompts}


PARTS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "sampling": sampling,
    "cost": cost,
    "rates": rates,
    "changes": changes,
    "scores": scores,
    "variance": variance,
    "sizes": sizes,
}


def figures(subject: Subject, part: str) -> dict[str, Any]:
    """What a part has found, computed if it is not there yet, with the wall time that it took."""
    file = subject.output / f"{part}.json"
    if not file.is_file():
        print(f"{time.strftime('%H:%M:%S')} step {subject.step}: {part}", file=sys.stderr)
        start = time.monotonic()
        figure = PARTS[part](subject) | {"sequences": subject.sequences}
        write_atomically(file, json.dumps(figure | {"seconds": time.monotonic() - start}, indent=1).encode())
    return json.loads(file.read_bytes())


def there_are(output: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """All figures so far, by step and part."""
    files = sorted(output.glob("checkpoint-*/*.json"), key=lambda file: int(file.parent.name.partition("-")[2]))
    figures: dict[int, dict[str, dict[str, Any]]] = {}
    for file in files:
        if file.stem in PARTS:
            step = int(file.parent.name.partition("-")[2])
            figures.setdefault(step, {})[file.stem] = json.loads(file.read_bytes())
    return figures


def section(figures: dict[int, dict[str, dict[str, Any]]]) -> str:
    """The figures as a section of RESULTS.md."""
    sequences = {part["sequences"] for parts in figures.values() for part in parts.values()}
    lines = [
        TITLE,
        "",
        "`python benchmarks/real.py` · the checkpoints of `make demo-real`; 8 prompts × 8 responses of up to 40 tokens "
        "in the update batch,",
        " or ".join(map(str, sorted(sequences))) + " sequences in the evaluation batch; errors are one standard error.",
        "Wall times are of a machine whose two cores others shared.",
        "",
    ]
    for part, title, head, rows in TABLES:
        there = {step: parts[part] for step, parts in figures.items() if part in parts}
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


PARTS_OF_STEP = ("entropy", "gradient", "momentum", "weight_decay", "predicted", "realized", "committed")
BATCHES = ("predicted", "own predicted", "realized", "own realized")


def _change_rows(names: tuple[str, ...], figure: dict[str, Any]) -> list[list[str]]:
    estimates = figure["estimates"]
    return [[format_estimate(*x) if (x := estimates.get(name)) else "" for name in names]]


def _batch_rows(figure: dict[str, Any]) -> list[list[str]]:
    (row,) = _change_rows(BATCHES, figure)
    return [[*row, f"{figure['z']:.2f}"]]


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


def _variance_rows(figure: dict[str, Any]) -> list[list[str]]:
    rows = []
    for change in ("predicted", "realized"):
        (ours, own), (reference, error) = (figure[name][change] for name in ("ours", "reference"))
        rows.append(
            [change, format_estimate(ours, own), format_estimate(reference, error), f"{(error / own) ** 2:.1f}"]
        )
    return rows


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


def _score_rows(figure: dict[str, Any]) -> list[list[str]]:
    columns = [figure["prompts"], figure["tokens"]]
    return [
        [FORECASTS.get(name, name), *("" if (x := column.get(name)) is None else f"{x:.2f}" for column in columns)]
        for name in figure["prompts"]
    ]


TABLES: list[tuple[str, str, str, Callable[[dict[str, Any]], list[list[str]]]]] = [
    (
        "rates",
        "Predicted and measured on one update batch, errors from the evaluation batch",
        "| step | learning rate | predicted δH₁ | realized ΔH | difference | ESS |",
        _rate_rows,
    ),
    (
        "changes",
        "The step, its parts, and what it and momentum after it come to; errors from the evaluation batch",
        "| step | entropy | gradient | momentum | weight decay | predicted | realized | committed |",
        partial(_change_rows, PARTS_OF_STEP),
    ),
    (
        "changes",
        "Both changes from the evaluation batch and from the 64 responses of the step, z of the two predictions",
        "| step | predicted | own batch | realized | own batch | z |",
        _batch_rows,
    ),
    (
        "scores",
        "Rank correlations with the first-order contributions from as many fresh evaluation rollouts, over up to 400 "
        "halves of 32 update prompts and over their tokens; that of the contributions is the reliability",
        "| step | forecast | halves of the prompts | tokens |",
        _score_rows,
    ),
    (
        "variance",
        "Against surprisal with self-normalised weights, errors from the evaluation batch",
        "| step | change | ours | reference | variance, reference / ours |",
        _variance_rows,
    ),
    (
        "sizes",
        "Errors against the size of the evaluation batch",
        "| step | sequences | δH₁, other update batches counted in | its error from E | realized ΔH |",
        _size_rows,
    ),
    (
        "cost",
        "Cost of the whole probe, generation excluded, over one training gradient on the evaluation batch",
        "| step | CPU time | peak memory, training gradient | peak memory, probe |",
        _cost_rows,
    ),
    (
        "sampling",
        "Response tokens per CPU second, 64 sequences at a time",
        "| step | sampling loop / generate |",
        _sampling_rows,
    ),
]


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
        for step in options.checkpoints:
            subject = Subject(options.directory, step, options.sequences, options.output / f"checkpoint-{step}")
            for part in options.parts:
                figures(subject, part)
                update_section(options.results, section(there_are(options.output)))


if __name__ == "__main__":
    main()
