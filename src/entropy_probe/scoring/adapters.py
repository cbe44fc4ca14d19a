"""A model with its adapter switched off, and on again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has an adapter of peft that can be switched off."""
    return bool(getattr(model, "peft_config", None)) and hasattr(model, "disable_adapter")


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The base model alone, for as long as this lasts."""
    with flags_kept(model), model.disable_adapter():
        yield


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Which parameters require a gradient, which switching adapters changes."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
