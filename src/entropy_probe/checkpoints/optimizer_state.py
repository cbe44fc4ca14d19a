"""State matched to parameters: read every tensor once, and rebuild the optimizer. Nothing is ever filled in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from entropy_probe.checkpoints.errors import InvalidValueError, MappingError
from entropy_probe.checkpoints.mapping import ParameterMapping
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer
from entropy_probe.checkpoints.parameters import Layout
from entropy_probe.parallel.shards import sharded_as
from entropy_probe.results.probe import OptimizerStateReport
from entropy_probe.steps.moments import summarize_moments


def summarize(
    saved: SavedOptimizer, mapping: ParameterMapping, layout: Layout
) -> tuple[OptimizerStateReport, int | None]:
    """Read every tensor once: coverage, step counts and, of Adam, the range of its scale, and how many of ``v`` are 0.

    The scale is ``1 / (sqrt(v / (1 - beta2^step)) + eps)`` with ``v`` the second moment (for AMSGrad its running
    maximum); it multiplies the gradient. See ``docs/theory.md``, "The step".
    """
    for index in range(saved.num_parameters):
        for key, content, tensor in saved.tensors(index):
            where = f"{saved.path}: parameter {index} ({mapping.names[index]}): {key}"
            _check_values(where, tensor, signed=content.low < 0)
    rates = tuple(group["lr"] for group in saved.groups)
    if not saved.is_adam:
        return _summary_of_another(saved, mapping, layout, rates), None
    zeros = 0
    entries = []
    for index, group in saved.with_group():
        entry = saved.state.get(index, {})
        elements = math.prod(layout.parameters[mapping.names[index]].shape)
        v = entry.get("max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
        zeros += elements - (0 if v is None else int(torch.count_nonzero(v)))
        entries.append((elements, entry, group))
    return summarize_moments(entries, mapping.how, rates), zeros


def _summary_of_another(
    saved: SavedOptimizer, mapping: ParameterMapping, layout: Layout, rates: tuple[float, ...]
) -> OptimizerStateReport:
    sizes = [math.prod(layout.parameters[name].shape) for name in mapping.names]
    covered = sum(size for i, size in enumerate(sizes) if saved.contents(i))
    steps = [int(saved.state[i]["step"]) if "step" in saved.contents(i) else 0 for i in range(len(sizes))]
    return OptimizerStateReport(
        optimizer=saved.kind.public_name,
        num_parameters=len(sizes),
        num_elements=sum(sizes),
        coverage=covered / sum(sizes),
        mapping=mapping.how,
        steps=(min(steps), max(steps)),
        scale_min=None,
        scale_max=None,
        learning_rates=rates,
    )


def _check_values(where: str, moment: Tensor, *, signed: bool) -> None:
    if moment.numel() == 0:
        return
    low, high = (x.item() for x in moment.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InvalidValueError(
            f"{where}: expected finite values, got NaN or infinity; training diverged before this save"
        )
    if low < 0 and not signed:
        raise InvalidValueError(f"{where}: expected values of at least 0, got {low:.3g}; the file is damaged")


def build_optimizer(
    saved: SavedOptimizer, mapping: ParameterMapping, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer the file describes, over a model's own parameters, with its state copied in.

    Tensors keep the precision of the file or of the parameter, whichever is higher; those of 16 bits stay as they are,
    which shows what precision training took its steps in.
    """
    for index, name in enumerate(mapping.names):
        got, shape = parameters[name].shape if name in parameters else None, saved.shape(index)
        if got is None or (shape is not None and got != shape):
            raise MappingError(f"{saved.path}: parameter {index}: expected {name} of shape {shape}, got {got}")
    optimizer = saved.kind.class_()(
        [
            {key: value for key, value in group.items() if key != "param_names"}
            | {"params": [parameters[mapping.names[i]] for i in group["params"]]}
            for group in saved.groups
        ]
    )
    optimizer.state.clear()  # some classes begin with entries of their own
    for index, group in saved.with_group():
        parameter = parameters[mapping.names[index]]
        kept = {key: _in_place(saved, index, key, group, parameter) for key in saved.contents(index)}
        if kept:
            optimizer.state[parameter] = kept
    return optimizer


def _in_place(saved: SavedOptimizer, index: int, key: str, group: Mapping[str, Any], parameter: nn.Parameter) -> Any:
    """What is kept under a key for a parameter, of the type and on the device where the optimizer looks for it."""
    content, value = saved.contents(index)[key], saved.state[index][key]
    if content.form in ("count", "number"):
        if saved.kind.plain_counts and content.form == "count":
            return int(value)
        on_device = group.get("fused") or group.get("capturable")
        return torch.tensor(float(value), dtype=torch.float32, device=parameter.device if on_device else "cpu")
    narrow = value.dtype in (torch.bfloat16, torch.float16)
    dtype = value.dtype if narrow else torch.promote_types(value.dtype, parameter.dtype)
    whole = torch.empty(value.shape, dtype=dtype, device=parameter.device).copy_(value)
    return whole if value.shape != parameter.shape else sharded_as(whole, parameter)
