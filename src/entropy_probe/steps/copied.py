"""The step of an optimizer without a closed form here, taken by its own code on a copy of everything it holds.

What makes a copy trustworthy is checked, not assumed from a name: all that the class keeps must be in its ``state``,
its ``param_groups`` or plain attributes, since that is what is copied; two copies given the same gradient must end at
the same bits; and the step must move something. Formulas: ``docs/theory.md``, "Other optimizers".
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_probe.results.note import NoteKind
from entropy_probe.steps.adamw import Gradient, check_adam, is_adam

STEP_ON_COPIES = NoteKind(
    "step_on_copies",
    "{optimizer}: its own code takes the step on copies, so the prediction has no components, and se_update is a "
    "jackknife over {blocks} blocks of update prompts (too large for steps that are not smooth in the gradient, such "
    "as signs or Muon's)",
    "Use more update prompts for a sharper error; the prediction is exact.",
)
_REFUSED_LIBRARIES = {
    "bitsandbytes": "its kernels keep quantised state that a copy does not reproduce",
    "torchao": "its state is made of tensor subclasses that a copy does not reproduce",
    "schedulefree": "its parameters are not those of the policy that is evaluated",
    "deepspeed": "it keeps the parameters it steps elsewhere",
    "apex": "its kernels are outside torch",
}
_PLAIN = (bool, int, float, str, type(None))
_REMEDY = "probe with the optimizers of torch.optim, unwrapped"


def optimizer_name(optimizer: object) -> str:
    """Module and name of an optimizer's class, without torch's submodules: ``torch.optim.SGD``."""
    kind = type(optimizer)
    public = getattr(torch.optim, kind.__name__, None) is kind
    return f"torch.optim.{kind.__name__}" if public else f"{kind.__module__}.{kind.__qualname__}"


def check_optimizer(optimizer: object) -> None:
    """Refuse an optimizer whose next step cannot be reproduced, with its name and the reason.

    ``torch.optim.Adam`` and ``AdamW`` have a closed form. Any other class is stepped on a copy, and must keep
    everything it uses where a copy finds it.

    Raises:
        ValueError: if the optimizer is not supported, maximises, or has no finite learning rate.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer: expected a torch.optim.Optimizer, got {optimizer_name(optimizer)}; {_REMEDY}")
    if is_adam(optimizer):
        check_adam(optimizer)
        return
    reason = _why_not_copied(optimizer)
    if reason is not None:
        raise ValueError(f"optimizer: {optimizer_name(optimizer)} is not supported: {reason}; {_REMEDY}")
    for index, group in enumerate(optimizer.param_groups):
        if group.get("maximize"):
            raise ValueError(f"optimizer group {index}: expected maximize=False, got True; the loss is minimised")
        lr = group.get("lr")
        if not (isinstance(lr, float | int | Tensor) and 0 <= float(lr) < float("inf")):
            raise ValueError(f"optimizer group {index}: expected a finite learning rate >= 0, got {lr!r:.60}")


def _why_not_copied(optimizer: torch.optim.Optimizer) -> str | None:
    kind = type(optimizer)
    for base in kind.__mro__:
        library = base.__module__.partition(".")[0]
        if library in _REFUSED_LIBRARIES:
            return _REFUSED_LIBRARIES[library]
    if isinstance(optimizer, torch.optim.SparseAdam):
        return "it takes sparse gradients only"
    drawing = [key for group in optimizer.param_groups for key, on in group.items() if "stochastic" in key and on]
    drawing += [name for name, on in _own_attributes(optimizer).items() if "stochastic" in name and on]
    if drawing:
        return f"it rounds stochastically ({drawing[0]}), and its draws are not known"
    if any("train_mode" in group for group in optimizer.param_groups):
        return _REFUSED_LIBRARIES["schedulefree"]
    if inspect.signature(kind.step).parameters.get("closure", inspect.Parameter).default is inspect.Parameter.empty:
        return "its step needs a closure that evaluates the loss again"
    patched = vars(optimizer).get("step")
    if patched is not None and not getattr(patched, "_wrapped_by_lr_sched", False):
        return "its step() was replaced on the instance"
    hidden = [name for name, value in _own_attributes(optimizer).items() if not _is_plain(value)]
    if hidden:
        return f"it keeps {', '.join(sorted(hidden)[:3])} outside of its state and parameter groups"
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    special = {type(x).__name__ for x in tensors if type(x) not in (Tensor, Parameter)}
    if special:
        return f"its state holds tensors of class {min(special)}, whose copy may not be what it seems"
    return None


def _own_attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Attributes that the class added to those of every torch optimizer."""
    bare = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    return {name: value for name, value in vars(optimizer).items() if name not in vars(bare) and name != "step"}


def _is_plain(value: object) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(map(_is_plain, value)))


def copied_step(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    gradient: Gradient,
    learning_rate: float | None = None,
    kept: Mapping[str, torch.dtype] | None = None,
    then: Callable[[torch.optim.Optimizer], object] | None = None,
) -> dict[str, Tensor]:
    """The parameters after the optimizer's own next step, taken on a copy of parameters, state and groups.

    All parameters step together, as an optimizer may couple them. Hooks and schedulers of the live optimizer are not
    copied and never run.

    Args:
        parameters: the parameters by name, as of :func:`entropy_probe.steps.adamw.optimizer_parameters`.
        optimizer: one that :func:`check_optimizer` accepts; it and the parameters are not touched.
        gradient: the clipped loss gradient with the same names; ``None`` where the loss does not reach.
        learning_rate: replaces the rate of every group.
        kept: the type in which training keeps a parameter, by name, where that is narrower than the parameter's here.
        then: called with the copy after its step, to take more.

    Returns:
        The stepped values by name, in the parameters' types, as new tensors.

    Raises:
        ValueError: if names differ, two copies disagree, the step moves nothing, or a value is not finite.
    """
    check_optimizer(optimizer)
    if parameters.keys() != gradient.keys():
        raise ValueError(f"gradient: expected {len(parameters)} parameter names, got {len(gradient)} that differ")
    stepped = _step_once(parameters, optimizer, gradient, learning_rate, kept or {}, then)
    for name, value in stepped.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}: expected finite values after the step, got others; lower the learning rate")
    return stepped


def check_repeatable(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    gradient: Gradient,
    stepped: Mapping[str, Tensor],
    learning_rate: float | None = None,
    kept: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Check that a second copy takes the same step, bit by bit, and that it is a step at all.

    ``stepped`` is what :func:`copied_step` returned for the other arguments.

    Raises:
        ValueError: naming the optimizer.
    """
    name = optimizer_name(optimizer)
    again = copied_step(parameters, optimizer, gradient, learning_rate, kept)
    differing = [n for n in stepped if not torch.equal(stepped[n], again[n])]
    if differing:
        raise ValueError(
            f"optimizer: {name} is not supported: two copies of it take different steps (first at {differing[0]}), so "
            f"its step is random or uses more than its state; {_REMEDY}"
        )
    still = not kept and all(torch.equal(stepped[n], p) for n, p in parameters.items())  # rounding may undo a step
    if still and any(g is not None and bool(g.any()) for g in gradient.values()):
        raise ValueError(
            f"optimizer: a copy of {name} moves no parameter although the gradient is not 0; check the learning rate, "
            f"or {_REMEDY}"
        )


def moved(parameters: Mapping[str, Tensor], stepped: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameter change ``stepped - theta`` by name, in at least float32."""
    wide = {name: torch.promote_types(p.dtype, torch.float32) for name, p in parameters.items()}
    return {name: stepped[name].to(wide[name]) - p.detach().to(wide[name]) for name, p in parameters.items()}


def _step_once(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    gradient: Gradient,
    learning_rate: float | None,
    kept: Mapping[str, torch.dtype],
    then: Callable[[torch.optim.Optimizer], object] | None,
) -> dict[str, Tensor]:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    dtypes = {id(p): kept.get(name, p.dtype) for name, p in parameters.items()}
    clones = {
        id(p): Parameter(p.detach().to(dtypes.get(id(p), p.dtype), copy=True), requires_grad=p.requires_grad)
        for p in held
    }
    # a deep copy leaves out what schedulers and hooks put on the instance
    shadow = copy.deepcopy(optimizer, memo=dict(clones))
    vars(shadow).update(_own_attributes(optimizer))
    for group in shadow.param_groups:
        if learning_rate is not None:
            group["lr"] = learning_rate
        if "capturable" in group:
            group["capturable"] = False  # a flag for graph capture; the arithmetic is the same
    for name, p in parameters.items():
        g = gradient[name]
        clones[id(p)].grad = None if g is None else g.to(dtypes[id(p)], copy=True)  # some kernels work in it
        if name not in kept:
            _widen(shadow.state.get(clones[id(p)], {}), p)
    shadow.step()
    if then is not None:
        then(shadow)
    return {name: clones[id(p)].detach().to(p.dtype) for name, p in parameters.items()}


def _widen(state: dict[str, Any], parameter: Tensor) -> None:
    """Keep 16-bit state in the parameter's type, where the step is not rounded."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
            state[key] = value.to(torch.promote_types(value.dtype, parameter.dtype))
