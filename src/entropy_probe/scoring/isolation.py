"""Leaving the run as it was found: modes, random state and parameters are restored, whatever happens in between."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter

from entropy_probe.parallel.shards import local


@contextmanager
def evaluating(model: nn.Module, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Evaluation mode, gradients on, full matrix precision, and no autocast unless asked for, accelerate's included.

    Flags, buffers, attributes that a forward pass binds anew (rotary embeddings that grow, caches, weights that a hook
    computes) and random states, those of every CUDA device that holds a part of the model included, are restored on
    exit.
    """
    attributes = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    versions = [(parameter, parameter._version) for parameter in model.parameters()]
    device = next(model.parameters()).device
    devices = sorted({x.device.index for x in (*model.parameters(), *model.buffers()) if x.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(_full_precision())
        # its cache of converted weights is keyed by parameter and would outlive a change of their values
        stack.enter_context(
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False)
        )
        stack.enter_context(torch.enable_grad())
        # without what accelerate puts around the forward pass of a model it prepares: its autocast, and what undoes it
        if (inner := vars(model).get("_original_forward")) is not None:
            stack.enter_context(_attribute([model], "forward", inner))
        # bitsandbytes repacks 4-bit weights in place, for another kernel, on the first evaluation without gradients
        repacking = [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
        stack.enter_context(_attribute(repacking, "support_avx512bf16_for_cpu", False))
        # RWKV divides weights in place on the first evaluation
        dividing = [m.config for m in model.modules() if vars(m).get("layers_are_rescaled") is False]
        stack.enter_context(_attribute(dividing, "rescale_every", 0))
        try:
            model.eval()
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            changed = {id(parameter) for parameter, version in versions if parameter._version != version}
            for module, bound, held in attributes:
                module.training = bound["training"]
                # what a module says of parameters that it has changed in place stays true of them
                if changed.isdisjoint(map(id, module.parameters())):
                    _rebind(vars(module), bound)
                    _rebind(module._buffers, held)
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


@contextmanager
def _attribute(objects: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """Give an attribute of some objects another value for a while."""
    before = [(each, getattr(each, name)) for each in objects]
    try:
        for each, _ in before:
            setattr(each, name, value)
        yield
    finally:
        for each, own in before:
            setattr(each, name, own)


def _rebind(now: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Bind the same names to the same objects again."""
    for name in now.keys() - before.keys():
        del now[name]
    for name, value in before.items():
        if name not in now or now[name] is not value:
            now[name] = value


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 or bfloat16 inside products of float32 tensors, whichever of torch's two interfaces allowed it."""
    switches, matmul = _precision_switches(), "highest"
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            if switch.fp32_precision not in ("none", "ieee"):
                switch.fp32_precision = "ieee"
        matmul = torch.get_float32_matmul_precision()  # raises while only the newer switches allow TF32
        if matmul != "highest":
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if matmul != "highest":
            torch.set_float32_matmul_precision(matmul)
        for switch, value in zip(switches, before, strict=True):
            if switch.fp32_precision != value:
                switch.fp32_precision = value


def _precision_switches() -> list[Any]:
    """What holds torch's ``fp32_precision``, from 2.9 on: each has its own value or that of one before it."""
    of: Any = torch.backends
    if not hasattr(of, "fp32_precision"):
        return []
    cudnn, mkldnn = of.cudnn, of.mkldnn
    return [of, cudnn, of.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


@contextmanager
def parameters_at(parameters: Mapping[str, Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the parameters other values for a while; the original storage comes back on exit.

    Sharded parameters are gathered from memory of their own, so their values are written into it, and the original
    ones back.

    Raises:
        ValueError: if names or shapes differ.
    """
    if parameters.keys() != values.keys():
        raise ValueError(f"parameters: expected values for {len(parameters)} names, got {len(values)} that differ")
    for name, parameter in parameters.items():
        if values[name].shape != parameter.shape:
            raise ValueError(f"{name}: expected shape {tuple(parameter.shape)}, got {tuple(values[name].shape)}")
    whole = {name: parameter.data for name, parameter in parameters.items() if local(parameter) is parameter}
    shards = {name: local(parameter).clone() for name, parameter in parameters.items() if name not in whole}
    try:
        for name, parameter in parameters.items():
            if name in whole:
                parameter.data = values[name]
            else:
                local(parameter).copy_(local(values[name]))
        yield
    finally:
        for name, value in whole.items():
            parameters[name].data = value
        for name, shard in shards.items():
            local(parameters[name]).copy_(shard)


@contextmanager
def substituted(model: nn.Module, parameters: Mapping[str, Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let modules find other tensors, dual or on a graph, where they hold the parameters; these come back on exit.

    Unlike ``torch.func.functional_call`` this goes by the identity of modules and parameters, not by their names, of
    which a shared module has several: there each name would put back what it found, which is the other's tensor.
    """
    by_identity = {id(parameter): values[name] for name, parameter in parameters.items()}
    held = [
        (module._parameters, key, parameter)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if id(parameter) in by_identity
    ]
    try:
        for of_module, key, parameter in held:
            of_module[key] = by_identity[id(parameter)]  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for of_module, key, parameter in held:
            of_module[key] = parameter


def hooked_parameters(parameters: Mapping[str, Parameter]) -> list[str]:
    """Names of parameters with hooks that change their gradient in a backward pass (``register_hook``)."""
    return [name for name, parameter in parameters.items() if parameter._backward_hooks]


def differs_in_training(model: nn.Module, parameters: Mapping[str, Parameter]) -> bool:
    """Whether a backward pass gives a parameter another gradient than the derivative of the function.

    An embedding leaves the row ``padding_idx`` out, and hooks do anything.
    """
    trained = {id(parameter) for parameter in parameters.values()}
    return any(id(module.weight) in trained for module in _padded(model)) or bool(hooked_parameters(parameters))


@contextmanager
def as_a_function(model: nn.Module) -> Iterator[None]:
    """Differentiate the model as a function: a step moves what ``padding_idx`` and hooks keep from training."""
    with _attribute(_padded(model), "padding_idx", None), without_gradient_hooks(model.parameters()):
        yield


def without_gradient_hooks(parameters: Iterable[Parameter]) -> AbstractContextManager[None]:
    """Take the parameters' gradient hooks away for a while."""
    return _attribute([parameter for parameter in parameters if parameter._backward_hooks], "_backward_hooks", None)


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of modules that other threads which use the model do not see.

    Autograd's workers, which call a module again for checkpointing, are no such threads: Python did not start them.
    """
    own = threading.current_thread()

    def guarded(*args: Any, **kwargs: Any) -> Any:
        thread = threading.current_thread()
        others = thread is not own and not isinstance(thread, threading._DummyThread)
        return None if others else hook(*args, **kwargs)

    return guarded


@contextmanager
def untrained(parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Notice an optimizer's step in the block, which no code here takes on the optimizer itself.

    Raises:
        ValueError: if there was one, whatever else went wrong.
    """
    parameters = list(parameters)

    def versions() -> list[int]:
        kept = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        return [x._version for x in kept or parameters]

    before = versions()
    try:
        yield
    finally:
        if versions() != before:
            raise ValueError(
                "model: expected nobody to train it while it is probed, but its optimizer took a step meanwhile, so "
                "numbers would be of two policies; probe from the thread that trains (in a callback, say), or a copy"
            )


@contextmanager
def lookups_masked(model: nn.Module) -> Iterator[None]:
    """Let forward-mode derivatives leave out what autograd does: looking up the row ``padding_idx``."""

    def without_tangent(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        ids: Tensor = args[0] if args else kwargs["input"]
        padding = (ids == module.padding_idx)[..., None]
        return torch.where(padding, forward_ad.unpack_dual(output).primal, output)

    with ExitStack() as stack:
        for module in _padded(model):
            stack.enter_context(module.register_forward_hook(of_this_thread(without_tangent), with_kwargs=True))
        yield


def _padded(model: nn.Module) -> list[nn.Embedding]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding) and module.padding_idx is not None]
