"""Do the moments move the weights the way the weights have moved? What shapes cannot see, their direction can.

Two entries of equal shape can change places without any check of shapes noticing. But Adam moves each parameter along
``-m / sqrt(v)``, and ``m`` remembers the last steps, so a young checkpoint's accumulated movement ``W - W0`` still
correlates with its own direction and hardly with that of another parameter. ``W0`` is 0 for ``lora_B``, which starts
there, or the base model's weights.

The correlation falls with the number of steps (about 0.8 after 3, 0.6 after 10, 0.25 after 100 at a constant rate) and
is noise once a schedule has ended long ago; then the check says that it cannot tell. See ``docs/checkpoints.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from entropy_probe.checkpoint_results import MovementReport
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer

__all__ = ["check_movement"]

MIN_ELEMENTS = 32
MIN_CORRELATION = 0.25
"""Below this median the weights' own direction is not recognised, so neither would be that of another parameter."""
MIN_GAIN = 0.25
"""By how much the exchanged entries must correlate better; the largest gain seen on correct checkpoints is 0.18."""
MAX_SAMPLE = 2**16
MAX_TABLE = 2**26
"""Elements looked at per tensor, and in a whole set of tensors of one shape."""
MAX_OTHERS = 2**19
"""Correlations with other parameters that medians are taken over."""


@dataclass(frozen=True)
class _Set:
    """Correlations between the movements (rows) and the Adam directions (columns) of parameters of one shape."""

    names: tuple[str, ...]
    table: Tensor

    @property
    def own(self) -> Tensor:
        return self.table.diag()

    @cached_property
    def others(self) -> Tensor:
        """Off the diagonal; of very many, evenly spaced ones."""
        n = len(self.names)
        at = torch.arange(0, n * n, 1 + n * n // MAX_OTHERS)
        return self.table.flatten()[at[at % (n + 1) != 0]]


def check_movement(
    saved: SavedOptimizer, names: Sequence[str], movements: Mapping[str, Callable[[], Tensor]], reference: str
) -> MovementReport:
    """Compare the accumulated movement of weights with the direction of the moments assigned to them.

    Within each set of parameters of one shape, ``C[i, j]`` is the correlation over elements of the movement of ``i``
    with ``-m_j / sqrt(v_j)``. Entries count as exchanged if going from each movement to the direction it fits best
    closes a cycle, and the mean correlation along the cycle exceeds that of the recorded order by ``MIN_GAIN`` and by
    what the largest of so many comparisons would reach by chance.

    Args:
        saved: the optimizer file.
        names: the parameter of each entry.
        movements: by name, how to get ``W - W0``; only these parameters are looked at.
        reference: what ``W0`` is, for the report.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, name in enumerate(names):
        shape = saved.shape(index)
        if shape is not None and name in movements and math.prod(shape) >= MIN_ELEMENTS:
            by_shape.setdefault(shape, []).append(index)
    sets = [_correlate(saved, names, movements, indices) for indices in by_shape.values()]
    sets = [found for found in sets if found.names]
    own = torch.cat([found.own for found in sets]) if sets else torch.empty(0)
    others = torch.cat([found.others for found in sets]) if sets else torch.empty(0)
    exchanged = tuple(cycle for found in sets for cycle in _exchanged(found))
    median = own.median().item() if len(own) else None
    recognised = median is not None and median >= MIN_CORRELATION
    return MovementReport(
        reference=reference,
        num_parameters=len(own),
        correlation=median,
        correlation_of_others=others.median().item() if len(others) else None,
        status="exchanged" if exchanged else "consistent" if recognised and len(others) else "inconclusive",
        exchanged=exchanged,
    )


def _correlate(
    saved: SavedOptimizer, names: Sequence[str], movements: Mapping[str, Callable[[], Tensor]], indices: list[int]
) -> _Set:
    """Parameters that did not move, or have no direction, are left out."""
    limit = max(256, min(MAX_SAMPLE, MAX_TABLE // len(indices)))
    kept, rows, columns = [], [], []
    for index in indices:
        entry = saved.state[index]
        m, v = (_sample(entry[key], limit) for key in ("exp_avg", "exp_avg_sq"))
        movement = _unit(_sample(movements[names[index]](), limit))
        direction = _unit(torch.where(v > 0, -m / v.sqrt(), 0.0))
        if movement is not None and direction is not None:
            kept.append(names[index])
            rows.append(movement)
            columns.append(direction)
    table = torch.stack(rows) @ torch.stack(columns).T if kept else torch.empty(0, 0)
    return _Set(tuple(kept), table)


def _sample(tensor: Tensor, limit: int) -> Tensor:
    """At most ``limit`` elements, evenly spaced, the same ones for every tensor of a shape."""
    flat = tensor.reshape(-1)
    return flat[:: -(-len(flat) // limit)].double()


def _unit(values: Tensor) -> Tensor | None:
    centred = values - values.mean()
    norm = centred.norm()
    return centred / norm if math.isfinite(norm.item()) and norm > 0 else None


def _exchanged(found: _Set) -> list[tuple[str, ...]]:
    """Cycles of parameters whose entries would fit clearly better one place on."""
    count = len(found.names)
    if count < 2:
        return []
    others = found.others
    spread = 1.4826 * (others - others.median()).abs().median().item() if count >= 4 else 0.0
    chance = spread * (math.sqrt(2 * math.log(count * (count - 1) / 2)) + 1.5)
    best = found.table.argmax(1).tolist()
    cycles, seen = [], set()
    for start in range(count):
        path, at = [], start
        while at not in seen and at not in path:
            path.append(at)
            at = best[at]
        cycle = path[path.index(at) :] if at in path else []
        seen.update(path)
        if len(cycle) > 1:
            gain = sum(found.table[i, best[i]].item() - found.table[i, i].item() for i in cycle) / len(cycle)
            if gain > max(MIN_GAIN, chance):
                cycles.append(tuple(found.names[i] for i in cycle))
    return cycles
