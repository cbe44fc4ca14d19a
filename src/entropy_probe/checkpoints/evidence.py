"""Do the moments move the weights the way the weights have moved? What shapes cannot see, their direction can.

Two entries of equal shape can change places without any check of shapes noticing. But Adam moves each parameter along
``-m / sqrt(v)``, and ``m`` remembers the last steps, so a young checkpoint's accumulated movement ``W - W0`` still
correlates with its own direction and hardly with that of another parameter. ``W0`` is 0 for ``lora_B``, which starts
there, or the base model's weights.

The correlation falls with the number of steps (about 0.8 after 3, 0.6 after 10, 0.25 after 100 at a constant rate) and
is noise once a schedule has ended long ago; then the check says that it cannot tell. See ``docs/checkpoints.md``.

Parameters without an optimizer entry: accepted only if the weights show that the loss never reached them.

Adam makes a parameter's entry with its first gradient, and moves it by that step. So one that is exactly as training
began and has no entry never trained, provided that steps show in the weights at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from entropy_probe.checkpoints.formats import Weights
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer
from entropy_probe.checkpoints.weights import unchanged
from entropy_probe.results.checkpoint import MovementReport


def check_weights_never_trained(
    saved: SavedOptimizer, names: tuple[str, ...], weights: Weights, start: Weights | None
) -> None:
    """Check that full weights without an entry are as in the model that training started from."""
    lost = {names[index] for index in saved.never_trained}
    if not lost:
        return
    if start is None:
        raise _refusal(saved, ", and nothing to see by that they never trained; pass base_model")
    untouched = unchanged(weights, start)
    if lost - untouched:
        raise _refusal(saved, f", of which {min(lost - untouched)} is not as training began")
    # a step moves a norm's weight of 1 by about the learning rate, and bfloat16 has nothing between 1 and 1.0078
    read = {name: tensor.read for name, tensor in weights.tensors.items()}
    _refuse_coarse(saved, lost, read, (torch.float32, torch.float64))
    _refuse_still(saved, names, untouched)


def check_adapter_never_trained(
    saved: SavedOptimizer, names: tuple[str, ...], weights: Weights, inside: Mapping[str, str]
) -> None:
    """Check that a ``lora_A`` and ``lora_B`` both lack an entry, while ``lora_B`` is still 0, where it starts.

    ``inside`` has the parameters that start at 0, with their names in the files.
    """
    lost = {names[index] for index in saved.never_trained}
    if not lost:
        return
    read = {name: weights.tensors[key].read for name, key in inside.items() if key in weights.tensors}
    untouched = {name for name in read if not read[name]().any()}
    pairs = {name: name.replace(".lora_B.", ".lora_A.") for name in untouched & lost if ".lora_B." in name}
    explained = {name for pair in pairs.items() if lost.issuperset(pair) for name in pair}
    if lost - explained:
        name = min(lost - explained)
        raise _refusal(saved, f", of which {name} is not as training began, or is the only one of its pair")
    # away from 0 bfloat16 shows the smallest step too, float16 none below 6e-8
    _refuse_coarse(saved, set(pairs), read, (torch.float32, torch.float64, torch.bfloat16))
    _refuse_still(saved, names, untouched)


def _refusal(saved: SavedOptimizer, why: str) -> Exception:
    return saved.refusal_of(sorted(saved.never_trained), why)


def _refuse_coarse(
    saved: SavedOptimizer, lost: set[str], read: Mapping[str, Callable[[], Tensor]], fine: tuple[torch.dtype, ...]
) -> None:
    for name in sorted(lost):
        dtype = read[name]().dtype
        if dtype not in fine:
            raise _refusal(saved, f", and {name} is stored in {dtype}, where it may have trained without a change")


def _refuse_still(saved: SavedOptimizer, names: tuple[str, ...], untouched: set[str]) -> None:
    """Refuse if a parameter that did train is as training began too, as while a warm-up's rate is 0."""
    for index, name in enumerate(names):
        if name in untouched and index not in saved.never_trained and saved.state[index]["exp_avg"].any():
            raise _refusal(
                saved, f", and the weights do not show whether they trained: {name} did and is as training began"
            )


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
class _Comparison:
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

    ``movements`` say how to get ``W - W0`` by name, and only these parameters are looked at; ``reference`` what ``W0``
    is.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, name in enumerate(names):
        shape = saved.shape(index)
        if shape is not None and name in movements and math.prod(shape) >= MIN_ELEMENTS:
            by_shape.setdefault(shape, []).append(index)
    comparisons = [_correlate(saved, names, movements, indices) for indices in by_shape.values()]
    comparisons = [comparison for comparison in comparisons if comparison.names]
    own = torch.cat([comparison.own for comparison in comparisons]) if comparisons else torch.empty(0)
    others = torch.cat([comparison.others for comparison in comparisons]) if comparisons else torch.empty(0)
    exchanged = tuple(cycle for comparison in comparisons for cycle in _exchanged(comparison))
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
) -> _Comparison:
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
    return _Comparison(tuple(kept), table)


def _sample(tensor: Tensor, limit: int) -> Tensor:
    """At most ``limit`` elements, evenly spaced, the same ones for every tensor of a shape."""
    flat = tensor.reshape(-1)
    return flat[:: -(-len(flat) // limit)].double()


def _unit(values: Tensor) -> Tensor | None:
    centred = values - values.mean()
    norm = centred.norm()
    return centred / norm if math.isfinite(norm.item()) and norm > 0 else None


def _exchanged(comparison: _Comparison) -> list[tuple[str, ...]]:
    """Cycles of parameters whose entries would fit clearly better one place on."""
    count = len(comparison.names)
    if count < 2:
        return []
    others = comparison.others
    spread = 1.4826 * (others - others.median()).abs().median().item() if count >= 4 else 0.0
    chance = spread * (math.sqrt(2 * math.log(count * (count - 1) / 2)) + 1.5)
    best = comparison.table.argmax(1).tolist()
    cycles, seen = [], set()
    for start in range(count):
        path, at = [], start
        while at not in seen and at not in path:
            path.append(at)
            at = best[at]
        cycle = path[path.index(at) :] if at in path else []
        seen.update(path)
        if len(cycle) > 1:
            gain = sum(comparison.table[i, best[i]].item() - comparison.table[i, i].item() for i in cycle) / len(cycle)
            if gain > max(MIN_GAIN, chance):
                cycles.append(tuple(comparison.names[i] for i in cycle))
    return cycles
