"""Ranks that are threads of one process, which count what they exchange; and results compared field by field."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from entropy_probe.parallel.ranks import ProcessGroup


class Exchange:
    """Where threads meet."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.slots: list[Any] = [None] * size
        self.reduced: list[int] = []
        """Elements of every tensor that was summed, in order."""


class ThreadRanks(ProcessGroup):
    """The package's own ranks over threads in place of processes."""

    def __init__(self, rank: int, exchange: Exchange) -> None:
        self.rank, self.size, self.exchange = rank, exchange.size, exchange
        self._device = torch.device("cpu")

    def gather(self, value: Any) -> list[Any]:
        self.exchange.slots[self.rank] = copy.deepcopy(value)
        self.exchange.barrier.wait()
        found = list(self.exchange.slots)
        self.exchange.barrier.wait()
        return found

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def _all_reduce(self, values: Tensor) -> None:
        if self.rank == 0:
            self.exchange.reduced.append(values.numel())
        found = self.gather(values)
        assert {x.shape for x in found} == {values.shape}
        values.copy_(torch.stack(found).sum(0))


def on_ranks(size: int, work: Callable[[ThreadRanks], Any]) -> tuple[list[Any], Exchange]:
    """What ``work`` returns on every rank; the first error ends all."""
    exchange = Exchange(size)

    def guarded(rank: int) -> Any:
        try:
            return work(ThreadRanks(rank, exchange))
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
    errors = [e for f in futures if (e := f.exception()) and not isinstance(e, threading.BrokenBarrierError)]
    if errors:
        raise errors[0]
    return [f.result() for f in futures], exchange


ROUNDING = ("noise_floor", "step_rounding", "mismatch", "rank_correlation_with_covariance")
"""Fields that are nothing but rounding, or (among equal contributions) decided by it."""


def differences(a: Any, b: Any, rel: float, scale: float = 0.0, key: str = "") -> list[str]:
    """Fields that differ by more than ``rel`` of themselves (or of ``scale``), timing, memory and rounding left out."""
    name = key.rpartition(".")[2]
    if name in ("timing", "memory", "seconds", *ROUNDING):
        return []
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        # an error near 0 beside a value is compared with the value, and the other way round
        inner = max((abs(a[k]) for k in ("value", "standard_error") if isinstance(a.get(k), float)), default=0.0)
        return [d for k in a for d in differences(a[k], b[k], rel, inner, f"{key}.{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        inner = max((abs(x) for x in a if isinstance(x, float)), default=0.0)
        return [
            d for k, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, rel, inner, f"{key}.{k}")
        ]
    if isinstance(a, float) and isinstance(b, float):
        return [] if abs(a - b) <= rel * max(abs(a), scale) else [f"{key}: {a!r} and {b!r}"]
    return [] if a == b else [f"{key}: {a!r} and {b!r}"]
