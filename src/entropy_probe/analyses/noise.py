"""What rounding alone does to the realized change, seen on some of the evaluation sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.analyses.realized import measure_change
from entropy_probe.config import ProbeConfig
from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.estimators.realized import Change, noise_floor, rounding_of
from entropy_probe.parallel.batch import LocalRows, add_up
from entropy_probe.parallel.ranks import Ranks
from entropy_probe.parallel.shards import sharded_as
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.isolation import parameters_at
from entropy_probe.types import Clusters, TokenScores

NOISE_SEQUENCES, NOISE_PAIRS = 24, 2
"""Enough for the size of rounding errors; more would cost time. And fewer than a Pareto tail is fitted to, which would
refuse changes that are not to be trusted by themselves, but whose size is all that is asked here."""
SHARE_OF_ROOT = 1 / 16
"""How far parameters are moved, relative to themselves, in units of the root of their precision: far enough for
everything computed from them to be rounded anew, near enough for the second order to stay below rounding."""
LAST_PLACE = 0.72
"""A unit in the last place of a number, relative to the number, in units of its type's precision, on average."""

ENOUGH_EFFECTIVE = 0.5
"""A share of effective sequences that no small move may fall below, whatever is asked of the step."""


def measured_noise_floor(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    local: LocalRows,
    before: TokenScores,
    config: ProbeConfig,
    ranks: Ranks,
) -> float:
    """Two standard deviations of what rounding does to the realized change, in its unit.

    Some sequences are scored again in another layout, with every trained parameter moved a little, and moved as much
    the other way: the two changes cancel but for rounding. Source: ``docs/theory.md``, "Rounding".

    Raises:
        ValueError: if rounding changes log-probabilities beyond what importance sampling can bridge.
    """
    chosen = torch.linspace(0, len(rollouts) - 1, min(len(rollouts), NOISE_SEQUENCES)).long()
    mine = torch.isin(chosen, local.rows).nonzero()[:, 0]
    few = LocalRows(mine, len(chosen), Clusters.sequences(len(chosen)).select(mine))
    few_rollouts = rollouts.select(chosen[mine])
    # rounding has nothing to do with who sampled the responses
    plain = replace(before, log_weights=None)
    few_before = plain.select(torch.searchsorted(local.rows, chosen[mine]))
    positions = add_up(ranks, PositionSums.of(plain))
    least = min(config.min_ess_fraction, ENOUGH_EFFECTIVE)
    uncut = config.model_copy(update={"is_mode": "snis", "on_low_ess": "refuse", "min_ess_fraction": least})

    def change_at(draw: int, sign: int) -> Change:
        with ranks.agreeing(), parameters_at(parameters, _moved(parameters, config.autocast, draw, sign)):
            again = scorer.score(few_rollouts, share=False)
        change = measure_change(few_before, again, few, positions, uncut, ranks).change
        if change is None:
            raise ValueError(
                "noise floor: expected log-probabilities that rounding leaves alone, got a change that importance "
                "sampling cannot bridge; compute in a higher precision"
            )
        return change

    spurious = [rounding_of(change_at(draw, 1), change_at(draw, -1)) for draw in range(NOISE_PAIRS)]
    weights = ranks.sum(local.by_sequence(before.weights))
    return noise_floor(spurious, (weights.sum().square() / weights.square().sum()).item())


def _moved(parameters: Mapping[str, Parameter], autocast: str, draw: int, sign: int) -> dict[str, Tensor]:
    """Every parameter moved at random by up to a small share of itself; ``sign`` -1 gives the opposite move.

    Rounding to the nearest would be equal and opposite as well, and cancel. So it is random, and another for each sign.
    """
    moved = {}
    moves, roundings = (
        {p.device: torch.Generator(p.device).manual_seed(seed) for p in parameters.values()}
        for seed in (2 * draw, 4 * draw + 2 + sign)
    )
    for name, p in parameters.items():
        own = torch.finfo(p.dtype).eps
        eps = torch.finfo(torch.bfloat16).eps if autocast == "bfloat16" else own
        move, rounding = (
            (2 * torch.rand(p.shape, generator=source[p.device], device=p.device) - 1).to(p.dtype)
            for source in (moves, roundings)
        )
        relative = sign * SHARE_OF_ROOT * eps**0.5 * move + LAST_PLACE * own / 2 * rounding
        moved[name] = p.detach() + sharded_as(relative, p) * p.detach()
    return moved
