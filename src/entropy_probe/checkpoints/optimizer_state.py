"""Adam state matched to parameters: read every moment once, and rebuild the optimizer. Nothing is ever filled in."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from entropy_probe.checkpoints.errors import InvalidValueError, MappingError
from entropy_probe.checkpoints.mapping import ParameterMapping
from entropy_probe.checkpoints.optimizer_file import MOMENTS, SavedOptimizer
from entropy_probe.moments import summarize_moments
from entropy_probe.results import OptimizerStateReport

__all__ = ["build_optimizer", "summarize"]


def summarize(saved: SavedOptimizer, mapping: ParameterMapping) -> tuple[OptimizerStateReport, int]:
    """Read every moment once: coverage, step counts and the range of the Adam scale.

    The scale is ``1 / (sqrt(v / (1 - beta2^step)) + eps)`` with ``v`` the second moment (for AMSGrad its running
    maximum); it multiplies the gradient. See ``docs/theory.md``, "The step".

    Returns:
        The report, and the number of elements whose second moment is 0.

    Raises:
        CheckpointError: if a moment is not finite or a second moment is negative.
    """
    zeros = 0
    entries = []
    for index, group in saved.with_group():
        entry = saved.state[index]
        for key in entry.keys() - {"step"}:
            where = f"{saved.path}: parameter {index} ({mapping.names[index]}): {key}"
            _check_moment(where, entry[key], signed=key == "exp_avg")
        v = entry["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        zeros += v.numel() - int(torch.count_nonzero(v))
        entries.append((v.numel(), entry, group))
    report = summarize_moments(entries, mapping.how, tuple(group["lr"] for group in saved.groups))
    return report, zeros


def _check_moment(where: str, moment: Tensor, *, signed: bool) -> None:
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
) -> torch.optim.AdamW | torch.optim.Adam:
    """The optimizer the file describes, over a model's own parameters, with its moments copied in.

    Moments keep the precision of the file or of the parameter, whichever is higher.

    Raises:
        CheckpointError: if a parameter is missing or has another shape than its moments.
    """
    for index, name in enumerate(mapping.names):
        got = parameters[name].shape if name in parameters else None
        if got != saved.state[index]["exp_avg"].shape:
            shape = list(saved.state[index]["exp_avg"].shape)
            raise MappingError(f"{saved.path}: parameter {index}: expected {name} of shape {shape}, got {got}")
    kind = torch.optim.AdamW if saved.kind == "AdamW" else torch.optim.Adam
    optimizer = kind(
        [
            {key: value for key, value in group.items() if key != "param_names"}
            | {"params": [parameters[mapping.names[i]] for i in group["params"]]}
            for group in saved.groups
        ]
    )
    for index, group in saved.with_group():
        parameter = parameters[mapping.names[index]]
        on_device = group.get("fused") or group.get("capturable")
        entry = saved.state[index]
        step = torch.tensor(float(entry["step"]), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        moments: dict[str, Tensor] = {}
        for key in filter(entry.__contains__, MOMENTS):
            dtype = torch.promote_types(entry[key].dtype, parameter.dtype)
            moments[key] = torch.empty_like(parameter, dtype=dtype, requires_grad=False).copy_(entry[key])
        optimizer.state[parameter] = {"step": step, **moments}
    return optimizer
