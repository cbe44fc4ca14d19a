"""Rewards that configs of these tests name."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor


def odd_characters(prompts, responses) -> list[float]:
    """The share of characters with an odd code: differs within a group even for a random policy."""
    return [sum(ord(c) % 2 for c in text) / (len(text) + 1) for text in responses]


def broken(prompts, responses) -> list[float]:
    raise KeyError("no such\nreference")


class Exits(float):
    def __float__(self) -> float:
        sys.exit(0)


def exits(completions, **columns):
    sys.exit(0)


def exits_when_read(completions, **columns):
    return [Exits(1.0) for _ in completions]


def hangs_in_a_pool(completions, **columns):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(threading.Event().wait).result()
