"""What probes of one batch cost, against one training gradient and, for the U-statistic, the straightforward algorithm.

The straightforward algorithm takes two passes over the whole batch for the two mean gradients, then two forward and
two backward passes per prompt for the diagonal and the row means. All three run in the same process, in interleaved
rounds; figures are ratios of medians of CPU time. Beside it the prediction in the optimizer's own geometry with parts,
both errors and the realized change, with and without the profile over horizons; and of a live step, from ``.grad``:
the prediction from its own batch, the realized change after it, and the prediction from a quarter as many others.

Run ``python benchmarks/one_batch.py`` (many minutes), or with ``--quick`` at sizes that only show that it works.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.analyses.ahead import StepAhead
from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.estimators.first_order import entropy_coefficients
from entropy_probe.estimators.u_statistic import cross_statistic
from entropy_probe.integrations.live import probe_actor
from entropy_probe.losses.trl import TRLLoss
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.isolation import evaluating
from entropy_probe.steps.preconditioner import frozen_preconditioner
from entropy_probe.types import Clusters, TokenCoefficients
from two_batch import FULL, QUICK, Setup, training_gradient


def surrogates(scorer: Scorer, batch: Rollouts) -> list[TokenCoefficients]:
    """Coefficients of the two sides; the scoring pass they need is not charged to the straightforward algorithm."""
    clusters = Clusters.prompts(batch.prompt_ids)
    scores = scorer.score(batch)
    towards = entropy_coefficients(scores, batch.prompt_ids, clusters, PositionSums.of(scores))
    factor = -clusters.count / batch.response_mask.sum().item()
    assert towards.entropies is not None
    x = TokenCoefficients(factor * towards.logprobs, factor * towards.entropies)
    return [x, TokenCoefficients(-clusters.count * TRLLoss(loss_type="dapo").coefficients(batch, None).logprobs, None)]


def straightforward(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Rollouts,
    scorer: Scorer,
    sides: list[TokenCoefficients],
) -> float:
    """The U-statistic the obvious way; returns it, so that the two can be compared."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    scale = frozen_preconditioner(parameters, optimizer).scale
    flat_scale = torch.cat([scale[n].reshape(-1) for n in parameters]).double()
    clusters = Clusters.prompts(batch.prompt_ids)

    def gradient(side: TokenCoefficients, rows: Tensor | None) -> Tensor:
        total = torch.zeros(len(flat_scale), dtype=torch.float64)
        for microbatch in scorer.microbatches(batch, rows, share=False):
            (value,) = scorer.surrogates(microbatch, [side])
            found = torch.autograd.grad(value, list(parameters.values()))
            total += torch.cat([g.reshape(-1) for g in found]).double()
        return total

    with evaluating(model):
        x_sum, y_sum = (gradient(side, None) for side in sides)
        rows = []
        for unit in range(clusters.count):
            members = (clusters.index == unit).nonzero()[:, 0]
            a, b = (gradient(side, members) for side in sides)
            rows.append((a @ (flat_scale * y_sum), b @ (flat_scale * x_sum), a @ (flat_scale * b)))
    return cross_statistic(*(torch.stack(column) for column in zip(*rows, strict=True))).value


def compare(setup: Setup, *, lora: bool, rounds: int) -> dict[str, float | int | bool | str]:
    """Medians of interleaved rounds, and a check that both algorithms give the same number."""
    model, optimizer = setup.policy(lora=lora)
    batch, evaluation = setup.batches(model)
    # microbatches as large as the machine has room for, as by default
    config = ProbeConfig(max_stored_gradient_gib=setup.max_stored_gradient_gib)
    scorer = Scorer(model, 1.0, setup.max_tokens_per_microbatch)
    with evaluating(model):
        scorer.prepare(batch)
        sides = surrogates(scorer, batch)
    training_gradient(model, batch, setup.max_tokens_per_microbatch)
    quiet = config.model_copy(update={"measure_noise_floor": False})
    alone = quiet.model_copy(update={"horizon": None})
    quarter = evaluation.select(torch.arange(0, len(evaluation), 4))
    ahead: list[StepAhead] = []

    def live(rollouts: Rollouts | None, held_out: Rollouts | None) -> None:
        ahead[:] = [probe_actor(model, optimizer, rollouts, alone, evaluation=held_out)]

    def training() -> None:
        gradients = training_gradient(model, batch, setup.max_tokens_per_microbatch)
        for p, gradient in zip((p for p in model.parameters() if p.requires_grad), gradients, strict=True):
            p.grad = gradient

    training()
    live(batch, None)  # a live run tries the model at its first step
    live(None, quarter)
    # a probe of its own each time: it would remember the scores of the batch
    timed: dict[str, Callable[[], Any]] = {
        "training": training,
        "exact": lambda: EntropyProbe(model, optimizer, config).cross_prompt(batch),
        "straightforward": lambda: straightforward(model, optimizer, batch, scorer, sides),
        "own": lambda: EntropyProbe(model, optimizer, alone).one_batch(batch),
        "own, horizons": lambda: EntropyProbe(model, optimizer, quiet).one_batch(batch),
        "live, held out": lambda: live(None, quarter),
        "live": lambda: live(batch, None),
        "live, realized": lambda: ahead[0].taken(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, run in timed.items():
            start = time.process_time()
            results[name] = run()
            seconds[name].append(time.process_time() - start)
    cross, expected = results["exact"], results["straightforward"]
    if abs(cross.u_cross - expected) > 1e-3 * abs(cross.bars_dot) + 1e-3 * abs(expected):
        raise RuntimeError(f"the two algorithms disagree: {cross.u_cross} and {expected}")
    middle = {name: median(values) for name, values in seconds.items()}
    return {
        "weights": "LoRA" if lora else "full",
        "prompts": setup.num_prompts,
        "group_size": setup.group_size,
        "rounds": rounds,
        "exact_over_training": middle["exact"] / middle["training"],
        "straightforward_over_training": middle["straightforward"] / middle["training"],
        "straightforward_over_exact": middle["straightforward"] / middle["exact"],
        "own_over_training": middle["own"] / middle["training"],
        "own_with_horizons_over_training": middle["own, horizons"] / middle["training"],
        "live_over_training": middle["live"] / middle["training"],
        "live_realized_over_training": middle["live, realized"] / middle["training"],
        "live_held_out_over_training": middle["live, held out"] / middle["training"],
        "gradients": cross.gradients,
    }


def main() -> None:
    """Run the comparisons asked for and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds")
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--weights", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base, sizes = (QUICK, [4]) if options.quick else (FULL, options.prompts)
    figures = [
        compare(replace(base, num_prompts=size), lora=weights == "lora", rounds=options.rounds)
        for weights in options.weights
        for size in sizes
    ]
    table = Table(title="One batch, exact, both errors: ratios of CPU time", title_justify="left")
    for column in (
        "weights",
        "B x G",
        "/ training gradient",
        "straightforward / training",
        "speed-up",
        "own geometry",
        "with horizons",
        "live",
        "realized",
        "held out, a quarter",
        "gradients",
    ):
        table.add_column(column)
    for f in figures:
        ratios = (f"{value:.2f}" for name, value in f.items() if "_over_" in name)
        table.add_row(str(f["weights"]), f"{f['prompts']} x {f['group_size']}", *ratios, str(f["gradients"]))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
