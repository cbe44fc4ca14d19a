"""Flat buffers of DeepSpeed's ZeRO, by slices that are given and by the order of the parameters."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch

from entropy_probe.checkpoints.zero import Buffers, by_mappings

SHAPES = {"a": (3,), "b": (2, 2), "c": (5,)}


def slices(order: tuple[str, ...], size: int, ranks: int) -> list[dict[str, tuple[int, int]]]:
    """What each rank has of parameters that lie one after the other: how many elements, and from where on."""
    own, at = [{} for _ in range(ranks)], 0
    for name in order:
        for rank in range(ranks):
            low, high = max(at, rank * size), min(at + prod(SHAPES[name]), (rank + 1) * size)
            if low < high:
                own[rank][name] = high - low, low - rank * size
        at += prod(SHAPES[name])
    return own


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "a", "b")], ids=["given", "round robin"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_buffers_are_in_the_order_of_the_parameters(order, ranks):
    size = -(-12 // ranks)
    flat = torch.cat([torch.arange(12.0) + 1, torch.zeros(size * ranks - 12)]).split(size)
    masters = [*flat[:-1], flat[-1][: 12 - size * (ranks - 1)]]  # which are not filled up
    own = Buffers({"exp_avg": list(flat)}, masters, {}, slices(order, size, ranks)).in_order(SHAPES)
    for key in ("exp_avg", "master"):
        whole = by_mappings(Path("states.pt"), own, key, SHAPES)
        joined = torch.cat([x.read().flatten() for x in whole.values()])
        assert [x.read().shape for x in whole.values()] == list(map(torch.Size, SHAPES.values()))
        assert torch.equal(joined, torch.arange(12.0) + 1)
