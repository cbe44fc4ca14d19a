"""What of the trainer's step is not in the numbers, where something that is at hand shows it.

Each is one line for :attr:`entropy_probe.results.probe.Diagnostics.not_modelled`; ``docs/theory.md``, "What is not
modelled". What a checkpoint's log shows is found by :mod:`entropy_probe.checkpoints.trainer_log`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from entropy_probe.config import StepDtype
from entropy_probe.parallel.shards import count
from entropy_probe.results.note import Note, NoteKind
from entropy_probe.steps.precision import MIN_SHARE, NARROW, exact_share, fits, step_dtypes, trained

MASTER_WEIGHTS = NoteKind(
    "master_weights",
    "the trained weights are numbers of {kind}, and the optimizer's state is wider, as where a trainer adds its steps "
    "to a float32 copy of the weights: the step is not rounded; without such a copy {share:.1%} of the elements that "
    "move would stay where they are",
    "Set probe.step_dtype to the weights' precision if the trainer keeps no such copy.",
)
PRECISION_UNKNOWN = NoteKind(
    "precision_unknown",
    "the weights are numbers of {kind}, and the optimizer has no state that tells whether training keeps them in it: "
    "the step is not rounded; if it were, {share:.1%} of the elements that move would stay where they are",
    "Set probe.step_dtype to what the trainer keeps its weights in.",
)


def of_model(model: nn.Module) -> list[str]:
    """Dropout."""
    dropout = dict(_dropout(model))
    if not dropout:
        return []
    return [
        f"dropout of up to {max(dropout.values()):g} in {len(dropout)} modules ({next(iter(dropout))} first): "
        "training draws its masks unless it switches them off, the probe differentiates without"
    ]


def _dropout(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Modules that drop something in training, with the largest rate of each."""
    for name, module in model.named_modules():
        rates = [v for k, v in vars(module).items() if "drop" in k and isinstance(v, float)]
        if isinstance(module, nn.modules.dropout._DropoutNd):  # the common base of torch's dropout layers
            rates.append(module.p)
        if max(rates, default=0.0) > 0:
            yield name, max(rates)


def unrounded(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    delta: Mapping[str, Tensor],
    setting: StepDtype,
) -> tuple[list[str], list[Note]]:
    """What to say of a step that is not rounded, where something suggests that it is in training.

    Returns:
        What is not modelled, and notes on what is not known.
    """
    if step_dtypes(parameters, optimizer, "auto"):
        return of_rounding(parameters, optimizer, delta), []
    if setting != "auto" or any(p.dtype in NARROW for p in parameters.values()):
        return [], []
    told = trained(parameters, optimizer)
    lost = _lost(told or parameters, delta)
    return [], [] if lost is None else [(MASTER_WEIGHTS if told else PRECISION_UNKNOWN)(kind=lost[0], share=lost[1])]


def of_rounding(
    parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, delta: Mapping[str, Tensor]
) -> list[str]:
    """The rounding of the step to the precision that the trainer keeps its weights in.

    Weights that have been trained and still fit a narrow type, each of them, are kept in it: after a single step in
    float32 they would not.
    """
    lost = _lost(trained(parameters, optimizer), delta)
    if lost is None:
        return []
    kind, share = lost
    return [
        f"the rounding of the step to {kind}, which the trained weights are exact in: {share:.1%} "
        f"of the elements that move here stay where they are in a trainer that keeps its weights in {kind}"
    ]


def _lost(parameters: Mapping[str, Parameter], delta: Mapping[str, Tensor]) -> tuple[str, float] | None:
    """The 16-bit type that most weights are exact in, if any, and the share of what moves that it undoes."""
    for dtype in NARROW:
        if not parameters or exact_share(parameters, dtype) < MIN_SHARE:
            continue
        narrow = {name: p for name, p in parameters.items() if fits(p, dtype)}
        moving = sum(count(delta[name] != 0) for name in narrow)
        gone = sum(count(_vanishes(p.detach(), delta[name], dtype)) for name, p in narrow.items())
        return str(dtype).removeprefix("torch."), gone / max(1, moving)
    return None


def _vanishes(values: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    return (delta != 0) & ((values + delta).to(dtype) == values.to(dtype))


def of_frozen_geometry(
    parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, norm: float, max_norm: float | None
) -> list[str]:
    """Momentum, weight decay and clipping, where the optimizer and a gradient of this norm have any."""
    states = [optimizer.state.get(p, {}) for p in parameters.values()]
    momentum = ("exp_avg", "momentum_buffer")
    parts = {
        "momentum": any(isinstance(state.get(key), Tensor) for state in states for key in momentum),
        "weight decay": any(group.get("weight_decay", 0) for group in optimizer.param_groups),
        "clipping": max_norm is not None and norm > max_norm,
    }
    left_out = [name for name, there in parts.items() if there]
    return [f"{', '.join(left_out)} (frozen geometry)"] if left_out else []
