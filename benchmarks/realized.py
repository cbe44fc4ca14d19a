"""How noisy each estimator of the realized change is, on long responses of the demo's policy.

Prompts have more addends than in training, so that responses have 32 tokens or more. Every estimator sees the same
scores: the same disjoint batches before and after the same steps. Figures are ratios of variances in one run: from
reported standard errors (mean over batches), and from the spread over batches.

Also compared: baselines of the per-decision estimator. None, the position mean that the package uses, and a ridge
regression on what is known at the prefix (position, the entropy here and before, its running sum and mean),
cross-fitted in five folds on top of the position mean. The regression is kept here for the comparison only.

Run ``python benchmarks/realized.py`` (a few minutes), or with ``--quick`` at sizes that only show that it works.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts, TokenScores, load_checkpoint
from entropy_probe.analyses import measure
from entropy_probe.analyses.realized import Measurement, measure_change
from entropy_probe.demo.train import quiet_single_thread, train_demo
from entropy_probe.estimators import realized
from entropy_probe.estimators.baselines import PositionSums, position_baseline
from entropy_probe.estimators.first_order import entropy
from entropy_probe.estimators.importance import sequence_importance_weights, sequence_log_weights
from entropy_probe.estimators.realized import change, per_decision, snis
from entropy_probe.estimators.uncertainty import Sampled
from entropy_probe.parallel.batch import LocalRows
from entropy_probe.sampling import (
    EvaluationSettings,
    HFGenerator,
    Prompt,
    Reward,
    SamplingParameters,
    UpdateSettings,
    sample_evaluation,
    sample_update,
)
from entropy_probe.sampling.rewards import exact_match
from entropy_probe.types import Clusters


def brevity(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """A reward for a policy that has nothing right yet."""
    return [-float(len(response)) for response in responses]


@dataclass(frozen=True)
class Setup:
    """Sizes, and the training arguments of the checkpoint."""

    sequences: int = 1024
    repeats: int = 16
    num_prompts: int = 256
    addends: tuple[int, int] = (13, 16)
    max_completion_length: int = 64
    learning_rates: tuple[float, ...] = (3e-4, 3e-6)
    training: tuple[tuple[str, int], ...] = ()
    reward: Reward = exact_match


FULL = Setup()
QUICK = Setup(
    sequences=48,
    repeats=3,
    num_prompts=8,
    max_completion_length=40,
    learning_rates=(1e-4,),
    training=(("warm_start_steps", 20), ("steps", 2), ("save_steps", 2)),
    reward=brevity,
)
Estimator = Callable[[TokenScores, TokenScores, Clusters], Sampled]


def weighted(mode: Any, kind: Any) -> Estimator:
    """Self-normalised importance sampling with the given weights and entropies."""

    def estimate(before: TokenScores, after: TokenScores, clusters: Clusters) -> Sampled:
        weights = sequence_importance_weights(sequence_log_weights(before, after)[0], mode)
        return change(
            snis(after, weights.normalized, clusters, "token", kind), entropy(before, clusters, "token", kind)
        )

    return estimate


def exact_entropies(before: TokenScores, after: TokenScores, clusters: Clusters) -> Sampled:
    """The per-decision estimator."""
    return change(per_decision(before, after, clusters, PositionSums.of(before)), entropy(before, clusters))


Baseline = Callable[[Tensor, Tensor, Clusters, Tensor, Tensor, Tensor], Tensor]
FOLDS = 5


def no_baseline(values: Tensor, *_: Any) -> Tensor:
    return torch.zeros_like(values, dtype=torch.float64)


def with_baseline(baseline: Baseline | None) -> Estimator:
    """The per-decision estimator with another baseline; ``None`` is the regression."""

    def estimate(before: TokenScores, after: TokenScores, clusters: Clusters) -> Sampled:
        chosen = baseline or partial(regression_baseline, before.entropies)
        with mock.patch.object(realized, "position_baseline", chosen):
            return exact_entropies(before, after, clusters)

    return estimate


def regression_baseline(
    entropies: Tensor,
    values: Tensor,
    mask: Tensor,
    clusters: Clusters,
    reaching: Tensor,
    sums: Tensor,
    weights: Tensor,
    horizon: None = None,  # of the whole response
) -> Tensor:
    """What ridge regression on prefix-measurable features predicts beyond the position mean, cross-fitted."""
    h = torch.where(mask, entropies.double(), 0.0)
    position = (mask.long().cumsum(1) - 1).clamp(min=0).double()
    total = h.cumsum(1)
    previous = torch.nn.functional.pad(h, (1, 0))[:, :-1]
    x = torch.stack([position, position**2, h, h**2, total, total / (position + 1), previous, h * position], -1)
    mean = position_baseline(values, mask, clusters, reaching, sums, weights)
    residual = torch.where(mask, values.double() - mean, 0.0)
    out = mean.clone()
    for fold in range(FOLDS):
        held_out = clusters.index % FOLDS == fold
        train = mask & ~held_out[:, None]
        center, spread = x[train].mean(0), x[train].std(0) + 1e-12
        design = (x[train] - center) / spread
        gram = design.T @ design / len(design) + 1e-3 * torch.eye(x.shape[-1], dtype=torch.float64)
        slope = torch.linalg.solve(gram, design.T @ (residual[train] - residual[train].mean()) / len(design))
        out[held_out] += ((x[held_out] - center) / spread) @ slope + residual[train].mean()
    return torch.where(mask, out, 0.0)


ESTIMATORS: dict[str, Estimator] = {
    "per_decision": exact_entropies,
    "snis, exact entropies": weighted("snis", "rao_blackwell"),
    "snis, surprisal": weighted("snis", "surprisal"),
    "clip, surprisal": weighted("clip", "surprisal"),
    "psis, surprisal": weighted("psis", "surprisal"),
    "per_decision, no baseline": with_baseline(no_baseline),
    "per_decision, regression baseline": with_baseline(None),
}
REFERENCE, DIFFERENCE = "snis, surprisal", "paired difference from the prediction"


def long_prompts(setup: Setup) -> list[Prompt]:
    """Sums with many addends, answered by their running totals."""
    source = random.Random("long prompts")
    prompts = []
    for number in range(setup.num_prompts):
        digits = [source.randrange(1, 10) for _ in range(source.randint(*setup.addends))]
        totals = [sum(digits[: k + 1]) for k in range(len(digits))]
        prompts.append(Prompt(number, "+".join(map(str, digits)) + "=", ",".join(map(str, totals))))
    return prompts


def compare(setup: Setup, directory: Path) -> dict[str, Any]:
    """Variances of all estimators relative to the reference, per learning rate."""
    checkpoint = train_demo(directory, **dict(setup.training), on_progress=lambda line: print(line, file=sys.stderr))
    state = load_checkpoint(checkpoint, directory / "base")
    engine = HFGenerator(state.model, state.tokenizer, batch_size=256)
    subject = (engine, state.tokenizer, long_prompts(setup))
    parameters = SamplingParameters(1.0, setup.max_completion_length)
    # the demo's policy gets none of the long sums right: what steps is momentum
    batch = UpdateSettings(num_prompts=min(16, setup.num_prompts), group_size=8, allow_zero_advantages=True)
    update, _ = sample_update(*subject, setup.reward, batch, parameters)
    draws = EvaluationSettings(total_sequences=setup.sequences * setup.repeats)
    evaluation, _ = sample_evaluation(*subject, draws, parameters)
    found: dict[str, Any] = {
        "response_tokens": evaluation.response_lengths.double().mean().item(),
        "share_of_32_or_more": (evaluation.response_lengths >= 32).double().mean().item(),
        "num_sequences": setup.sequences,
        "repeats": setup.repeats,
        "variance": {},
    }
    for rate in setup.learning_rates:
        config = ProbeConfig(learning_rate=rate, measure_noise_floor=False)
        probe = EntropyProbe(state.model, state.optimizer, config)
        estimates: dict[str, list[tuple[float, float]]] = {name: [] for name in (*ESTIMATORS, DIFFERENCE)}
        for rows in torch.arange(len(evaluation)).split(setup.sequences):
            for name, estimate in estimate_all(probe, update, evaluation.select(rows)).items():
                estimates[name].append(estimate)
        found["variance"][f"{rate:g}"] = relative_variances(estimates)
    return found


def estimate_all(probe: EntropyProbe, update: Rollouts, evaluation: Rollouts) -> dict[str, tuple[float, float]]:
    """Value and standard error by every estimator, and of the paired difference, from the scores of one probe."""
    seen: list[tuple[TokenScores, TokenScores, Clusters]] = []

    def record(before: TokenScores, after: TokenScores, local: LocalRows, *rest: Any) -> Measurement:
        seen.append((before, after, local.clusters))
        return measure_change(before, after, local, *rest)

    with mock.patch.object(measure, "measure_change", record):
        result = probe.run(update=update, evaluation=evaluation)
    assert result.difference is not None
    (scores,) = seen
    changes = {name: estimator(*scores) for name, estimator in ESTIMATORS.items()}
    found = {name: (change.value, change.standard_error) for name, change in changes.items()}
    return found | {DIFFERENCE: (result.difference.value, result.difference.standard_error)}


def relative_variances(estimates: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Of each estimator over the reference: from reported errors and from the spread over batches."""
    table = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in estimates.items()}
    reference = table[REFERENCE]
    return {
        name: {
            "mean": values[:, 0].mean().item(),
            "standard_error": values[:, 1].square().mean().sqrt().item(),
            "reported": (values[:, 1].square().mean() / reference[:, 1].square().mean()).item(),
            "spread": (values[:, 0].var() / reference[:, 0].var()).item(),
        }
        for name, values in table.items()
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Print the figures as tables."""
    console.print(
        f"{found['repeats']} batches of {found['num_sequences']} sequences; {found['response_tokens']:.1f} tokens per "
        f"response, {found['share_of_32_or_more']:.1%} of them with 32 or more",
        soft_wrap=True,
    )
    for rate, variances in found["variance"].items():
        title = f"Learning rate {rate}: variance over that of {REFERENCE}"
        table = Table("estimator", "mean ΔH ± SE", "reported", "spread", title=title, title_justify="left")
        for name, v in variances.items():
            numbers = (f"{v['mean']:+.3e} ± {v['standard_error']:.1e}", f"{v['reported']:.3g}", f"{v['spread']:.3g}")
            table.add_row(name, *numbers)
        console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo-dir", type=Path, default=Path("examples/tiny"), help="the demo's checkpoint")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, and a checkpoint of its own")
    options = parser.parse_args(arguments)
    with quiet_single_thread(), tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "tiny" if options.quick else options.demo_dir
        found = compare(QUICK if options.quick else FULL, directory)
    show(found, Console())
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
