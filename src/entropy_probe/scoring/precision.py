"""The precisions a model holds its parameters in and computes with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def precisions(model: nn.Module) -> Iterator[tuple[str, torch.dtype]]:
    """Names and floating-point types of all parameters, and of the arithmetic of layers with 4-bit weights.

    The codes of 4-bit weights are not numbers, whatever type they are stored in; what counts is the type the layer
    computes in. Registered parameters are looked at and no attributes: one that is computed, as spectral norm's is,
    may change the model when it is read.
    """
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if hasattr(weight, "quant_state") and isinstance(
            computes := getattr(module, "compute_dtype", None), torch.dtype
        ):
            yield f"the arithmetic of {name}", computes
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            yield name, parameter.dtype
