"""Rewards that configs of these tests name."""

from __future__ import annotations


def odd_characters(prompts, responses) -> list[float]:
    """The share of characters with an odd code: differs within a group even for a random policy."""
    return [sum(ord(c) % 2 for c in text) / (len(text) + 1) for text in responses]


def broken(prompts, responses) -> list[float]:
    raise KeyError("no such\nreference")
