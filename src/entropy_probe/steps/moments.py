"""What Adam's second moments cover, from a live optimizer or from a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from entropy_probe.parallel.shards import count, extremes
from entropy_probe.results.note import Note, NoteKind
from entropy_probe.results.probe import OptimizerStateReport

UNMOVED_ADAPTER = NoteKind(
    "adapter_unmoved",
    "every lora_B is 0, as before training, though the optimizer has taken {steps:.0f} steps along their gradients: "
    "the policy is the base model, without the adapter that was trained",
    "Load the adapter that was saved with this optimizer's state; right only if the learning rate was 0 all along.",
)


def check_moments(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Refuse a live state that no step of Adam leaves.

    Raises:
        ValueError: if a moment is no dense tensor of real numbers with the parameter's shape, beside it.
    """
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        if not isinstance(state, Mapping):
            raise ValueError(
                f"optimizer state: expected a mapping for {name}, got {type(state).__name__}; load the state again"
            )
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            moment = state.get(key, parameter)
            if not isinstance(moment, Tensor):
                got = type(moment).__name__
            elif moment.layout != torch.strided or not moment.is_floating_point():
                got = f"{moment.dtype}, {moment.layout}"
            elif moment.dtype == torch.float16 != parameter.dtype:  # squares of usual gradients are 0 in it
                got = f"{moment.dtype} beside {parameter.dtype}"
            else:
                got = f"{list(moment.shape)} on {moment.device}"
                if moment.shape == parameter.shape and moment.device == parameter.device:
                    continue
            raise ValueError(
                f"optimizer state: expected {key} of {name} as a dense tensor of real numbers, {list(parameter.shape)} "
                f"on {parameter.device}, got {got}; load the state with optimizer.load_state_dict"
            )


def unmoved_adapter(entries: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> Note | None:
    """What is odd about parameters that start at 0, with their states: several steps along gradients, and still 0.

    A first step may have had a warm-up's rate of 0.
    """
    steps = 0.0
    for weight, state in entries:
        if count(weight != 0):
            return None
        if "exp_avg" in state and count(state["exp_avg"] != 0):
            steps = max(steps, step_count(state) or 0.0)
    return UNMOVED_ADAPTER(steps=steps) if steps > 1 else None


def usable_second_moment(state: Mapping[str, Any], amsgrad: bool = False) -> Tensor | None:
    """The second moment that scales one parameter's step, if it can: present, finite, and not all zero.

    With AMSGrad that is its running maximum.
    """
    v = state.get("max_exp_avg_sq" if amsgrad else "exp_avg_sq")
    if not isinstance(v, Tensor) or count(~torch.isfinite(v)) or not count(v != 0):
        return None
    return v


def step_count(state: Mapping[str, Any]) -> float | None:
    """How many steps one parameter's moments are worth: 0 without moments, ``None`` if the state does not say.

    Raises:
        ValueError: if there are moments but the count is not positive, so that bias correction would divide by 0.
    """
    if "exp_avg_sq" not in state:
        return 0.0
    if "step" not in state:
        return None
    step = float(state["step"])
    if not step > 0 and count(state["exp_avg_sq"] != 0):
        raise ValueError(
            f"optimizer state: expected a positive step count where there are moments, got {step:g}; the state is not "
            "of one training run"
        )
    return step


def summarize_moments(
    entries: Iterable[tuple[int, Mapping[str, Any], Mapping[str, Any]]],
    mapping: str,
    learning_rates: tuple[float, ...],
) -> OptimizerStateReport:
    """Coverage, step counts and the range of the Adam scale ``1 / (sqrt(v / (1 - beta2^k)) + eps)``.

    Args:
        entries: for each parameter its number of elements, its optimizer state (empty if none), and its group.
        mapping: how state was matched to parameters.
        learning_rates: the rate of each group.
    """
    steps, scales = [], []
    elements = covered = 0
    for numel, state, group in entries:
        elements += numel
        step = step_count(state)
        steps.append(int(step or 0))
        v = usable_second_moment(state, bool(group["amsgrad"]))
        if v is None:
            continue
        covered += numel
        correction = 1 - float(group["betas"][1]) ** step if step else 1.0
        denominators = [math.sqrt(x / correction) + float(group["eps"]) for x in extremes(v)]
        scales += [1 / d for d in denominators if d > 0]
    return OptimizerStateReport(
        num_parameters=len(steps),
        num_elements=elements,
        coverage=covered / elements if elements else 0.0,
        mapping=mapping,
        steps=(min(steps, default=0), max(steps, default=0)),
        scale_min=min(scales, default=None),
        scale_max=max(scales, default=None),
        learning_rates=learning_rates,
    )
