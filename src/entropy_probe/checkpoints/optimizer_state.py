"""Adam state saved without parameter names: match it to parameters, prove the match, rebuild the optimizer.

A Hugging Face Trainer stores ``{state: {index: {step, exp_avg, exp_avg_sq}}, param_groups}``. Indices count
the trainable parameters of the weight-decay group in ``named_parameters()`` order, then those of the other group.
Which parameters decay was decided by a rule that changed between versions, so every known rule is replayed and
exactly one distinct assignment must fit all group sizes and all shapes. Nothing is ever filled in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_probe.checkpoints.errors import CheckpointError
from entropy_probe.checkpoints.optimizer_file import MOMENTS, SavedOptimizer
from entropy_probe.moments import summarize_moments
from entropy_probe.results import OptimizerStateReport

__all__ = ["ParameterMapping", "build_optimizer", "grouping_rules", "map_parameters", "summarize"]


@dataclass(frozen=True)
class ParameterMapping:
    """Which parameter each saved index belongs to.

    Attributes:
        names: parameter names, in index order.
        how: the rule that produced it and what confirmed it.
    """

    names: tuple[str, ...]
    how: str


def grouping_rules(model: nn.Module) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """The trainable parameters that decay and those that do not, in order, by each known rule of the Trainer.

    * ``hf-trainer-patterns``, today's: no decay in ``nn.LayerNorm`` and for names that match bias or norm.
    * ``hf-trainer-layer-types``, before: no decay in ``nn.LayerNorm`` and for names that contain bias.
    * ``hf-trainer-registered-norms``, before: the same, with the model's own norm class registered as one.
    """
    patterns = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
    in_layer_norm: set[str] = set()
    in_any_norm: set[str] = set()
    for prefix, module in model.named_modules():
        named_norm = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
        if module is model or not (named_norm or isinstance(module, nn.LayerNorm)):
            continue
        inside = {name for name, _ in module.named_parameters(prefix)}
        in_any_norm |= inside
        if isinstance(module, nn.LayerNorm):
            in_layer_norm |= inside
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    undecayed = {
        "hf-trainer-patterns": {n for n in names if n in in_layer_norm or patterns.search(n.lower())},
        "hf-trainer-layer-types": {n for n in names if n in in_layer_norm or "bias" in n},
        "hf-trainer-registered-norms": {n for n in names if n in in_any_norm or "bias" in n},
    }
    return {
        rule: (tuple(n for n in names if n not in no_decay), tuple(n for n in names if n in no_decay))
        for rule, no_decay in undecayed.items()
    }


def map_parameters(saved: SavedOptimizer, model: nn.Module) -> ParameterMapping:
    """Match saved indices to the model's trainable parameters by replaying the Trainer's grouping rules.

    Args:
        saved: the optimizer file, entries checked.
        model: the model or its skeleton on the meta device; only names, shapes and module types are used.

    Raises:
        CheckpointError: unless exactly one distinct assignment fits the group sizes and every shape.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    fitting: dict[tuple[str, ...], str] = {}
    tried = []
    for rule, (decay, no_decay) in grouping_rules(model).items():
        problem = _misfit(saved, decay, no_decay, shapes)
        tried.append(f"{rule} ({len(decay)} + {len(no_decay)}): {problem or 'fits'}")
        if problem is None:
            fitting.setdefault(decay + no_decay, rule)
    if len(fitting) != 1:
        got = "none does" if not fitting else f"{len(fitting)} different ones do"
        sizes = " + ".join(map(str, saved.sizes))
        raise CheckpointError(
            f"{saved.path}: expected one assignment of its {sizes} entries to the model's parameters to fit, "
            f"{got}; tried {'; '.join(tried)}; pass the model this state was trained with, unedited"
        )
    ((names, rule),) = fitting.items()
    return ParameterMapping(names, f"rule:{rule} + shapes ({len(names)} tensors)")


def _misfit(
    saved: SavedOptimizer, decay: tuple[str, ...], no_decay: tuple[str, ...], shapes: Mapping[str, torch.Size]
) -> str | None:
    """Why the groups of one rule cannot be those of the file; None when they fit."""
    sizes = (len(decay), len(no_decay))
    if saved.sizes != sizes and not (0 in sizes and saved.sizes == (sum(sizes),)):
        return "group sizes differ"
    if len(saved.groups) == 2 and saved.groups[1]["weight_decay"] != 0:
        return f"group 1 must not decay, has weight decay {saved.groups[1]['weight_decay']}"
    for index, name in enumerate(decay + no_decay):
        got = saved.state[index]["exp_avg"].shape
        if got != shapes[name]:
            return f"index {index} is {list(got)}, {name} is {list(shapes[name])}"
    return None


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
        raise CheckpointError(
            f"{where}: expected finite values, got NaN or infinity; training diverged before this save"
        )
    if low < 0 and not signed:
        raise CheckpointError(f"{where}: expected values of at least 0, got {low:.3g}; the file is damaged")


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
            raise CheckpointError(f"{saved.path}: parameter {index}: expected {name} of shape {shape}, got {got}")
    kind = torch.optim.AdamW if saved.kind == "AdamW" else torch.optim.Adam
    optimizer = kind(
        [group | {"params": [parameters[mapping.names[i]] for i in group["params"]]} for group in saved.groups]
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
