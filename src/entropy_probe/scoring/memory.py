"""How many tokens a forward and backward pass may take at once: what the model and the machine have room for."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

MOST, LEAST = 8192, 256
"""Tokens. More at once are no faster; fewer are slow, and no model that fits is as wide."""
SHARES = {"cpu": 1 / 8, "cuda": 1 / 2}
"""Of the memory, for what a pass keeps; the weights, the optimizer, and on the CPU all else, have the rest."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def fitting_tokens(model: nn.Module) -> int:
    """How many to take at once: a power of two, the same on the same machine whatever else runs there."""
    return 2 ** (max(LEAST, min(MOST, tokens_in_memory(model))).bit_length() - 1)


def tokens_in_memory(model: nn.Module) -> int:
    """How many tokens' forward passes may be kept for their backward passes at a time.

    A backward pass keeps about the inputs and the outputs of all linear layers, adapters among them: 2.4 MB per token
    of SmolLM2-135M with LoRA in float32, of which it took 2.5. The output layer's are counted in, though its logits
    are kept only where it cannot be taken apart.
    """
    parameter = next(model.parameters())
    per_token = parameter.element_size() * sum(map(_width, model.modules()))
    room = SHARES.get(parameter.device.type, SHARES["cpu"]) * _memory(parameter.device)
    return int(room / max(per_token, 1))


def _width(module: nn.Module) -> int:
    """Inputs and outputs of a layer per token, leaving out those of the layers in it."""
    matrices = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
    if isinstance(module, nn.Embedding) or not matrices:
        return 0
    if isinstance(module, nn.Linear):  # the weight of a quantised one has another shape
        return module.in_features + module.out_features
    return sum(sum(p.shape[-2:]) for p in matrices)


def _memory(device: torch.device) -> int:
    """Bytes of the device, or of the container that runs this."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else ""
    return min(machine, int(limit)) if limit.isdecimal() else machine
