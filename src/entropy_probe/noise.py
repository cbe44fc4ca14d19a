"""What rounding alone does to the realized change, seen on some of the evaluation sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.config import ProbeConfig
from entropy_probe.distributed import Ranks
from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.estimators.realized import noise_floor
from entropy_probe.estimators.uncertainty import Units
from entropy_probe.isolation import parameters_at
from entropy_probe.measurement import measure_change
from entropy_probe.parts import Part, add_up
from entropy_probe.scoring.forward import Scorer
from entropy_probe.shards import sharded_as
from entropy_probe.types import Rollouts, TokenScores

__all__ = ["measured_noise_floor"]

NOISE_SEQUENCES, NOISE_DRAWS = 8, 3
"""Enough for the size of rounding errors; more would cost time."""


def measured_noise_floor(
    scorer: Scorer,
    parameters: Mapping[str, Parameter],
    rollouts: Rollouts,
    part: Part,
    before: TokenScores,
    config: ProbeConfig,
    ranks: Ranks,
) -> float:
    """Two standard deviations of what rounding does to the realized change, in its unit.

    Some sequences are scored again in another layout, with every trained parameter rounded differently: moved by a
    unit in its last place with probability 1/12, which has the variance of a rounding error.

    Args:
        scorer: the policy.
        parameters: what is trained, by name.
        rollouts: the whole evaluation batch.
        part: this rank's part of it.
        before: scores of that part.
        config: the settings.
        ranks: the ranks that have the other parts.

    Raises:
        ValueError: if rounding changes log-probabilities beyond what importance sampling can bridge.
    """
    chosen = torch.linspace(0, len(rollouts) - 1, min(len(rollouts), NOISE_SEQUENCES)).long()
    mine = torch.isin(chosen, part.rows).nonzero()[:, 0]
    few = Part(mine, len(chosen), Units.sequences(len(chosen)).select(mine))
    few_rollouts = rollouts.select(chosen[mine])
    # rounding has nothing to do with who sampled the responses
    few_before = replace(before.select(torch.searchsorted(part.rows, chosen[mine])), log_weights=None)
    positions = add_up(ranks, PositionSums.of(few_before))
    plain = config.model_copy(update={"is_mode": "snis", "on_low_ess": "refuse"})
    spurious = []
    for draw in range(NOISE_DRAWS):
        with ranks.agreeing(), parameters_at(parameters, _rounded_differently(parameters, config.autocast, draw)):
            again = scorer.score_again(few_rollouts)
        change = measure_change(few_before, again, few, positions, plain, ranks).change
        if change is None:
            raise ValueError(
                "noise floor: expected log-probabilities that rounding leaves alone, got a change that importance "
                "sampling cannot bridge; compute in a higher precision"
            )
        spurious.append(change)
    return noise_floor(spurious, len(rollouts))


def _rounded_differently(parameters: Mapping[str, Parameter], autocast: str, seed: int) -> dict[str, Tensor]:
    nudged = {}
    sources = {p.device: torch.Generator(p.device).manual_seed(seed) for p in parameters.values()}
    for name, p in parameters.items():
        eps = torch.finfo(torch.bfloat16 if autocast == "bfloat16" else p.dtype).eps
        draw = torch.rand(p.shape, generator=sources[p.device], device=p.device)
        sign = (draw < 1 / 24).to(p.dtype) - (draw > 23 / 24).to(p.dtype)
        nudged[name] = p.detach() * (1 + eps * sharded_as(sign, p))
    return nudged
