"""What a training run is at every step, to the bit: for runs that must not differ."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from tests.tiny import train_grpo

TINY: dict[str, Any] = {
    "lora": True,
    "steps": 3,
    "per_device_train_batch_size": 12,
    "max_completion_length": 6,
}


class Witness(TrainerCallback):
    """Digests of everything that training depends on, before and after every step.

    Attributes:
        seen: a digest per part, event by event.
        logs: what the trainer logged.
    """

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []
        self.logs: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **_):
        self.seen.append(digests(model, optimizer))

    on_optimizer_step = on_step_end = on_pre_optimizer_step

    def on_log(self, args, state, control, logs, **_):
        self.logs.append(dict(logs))


def digests(model: torch.nn.Module, optimizer: Any) -> dict[str, str]:
    """Of weights, gradients, optimizer, random states, and what modules are like."""
    modules = list(model.named_modules())
    attributes = [
        (name, m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for name, m in modules
    ]
    parameters = list(model.named_parameters())
    return {
        "weights": _digest([*parameters, *model.named_buffers()]),
        "gradients": _digest((n, p.grad) for n, p in parameters),
        "optimizer": _digest(_flat(optimizer.state_dict())),
        "python": _digest([("", random.getstate())]),
        "numpy": _digest([("", np.random.get_state()[1].tobytes())]),  # noqa: NPY002
        "torch": _digest([("", torch.get_rng_state())]),
        "modules": _digest([("", attributes), ("", [(n, p.requires_grad) for n, p in parameters])]),
        "forward": _digest([("", [id(vars(m).get("forward")) == id(None) for _, m in modules])]),
    }


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key in value for pair in _flat(value[key], f"{name}.{key}")]
    if isinstance(value, list | tuple):
        return [pair for key, item in enumerate(value) for pair in _flat(item, f"{name}.{key}")]
    return [(name, value)]


def _digest(named: Any) -> str:
    content = hashlib.blake2b()
    for name, value in named:
        content.update(name.encode())
        if isinstance(value, torch.Tensor):
            content.update(f"{value.dtype}{tuple(value.shape)}".encode())
            content.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            content.update(value if isinstance(value, bytes) else repr(value).encode())
    return content.hexdigest()


def trained(directory: Path, callbacks: Sequence[Any] = (), **settings: Any) -> tuple[Witness, list[str]]:
    """A tiny run of GRPO with these callbacks: what it was at every step, and what was warned of."""
    from transformers import set_seed

    witness = Witness()
    set_seed(0)  # the trainer does so after the adapter is made
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_grpo(directory, callbacks=[*callbacks, witness], **({"save_steps": 1000} | TINY | settings))
    return witness, [str(w.message) for w in caught if "entropy-probe" in str(w.message)]


def differing(one: Witness, other: Witness) -> list[tuple[int, str]]:
    """Where two runs are not the same: the event and the part."""
    assert len(one.seen) == len(other.seen)
    pairs = enumerate(zip(one.seen, other.seen, strict=True))
    return [(event, part) for event, (a, b) in pairs for part in a if a[part] != b[part]]
