"""A device that is not there: tensors that say they are elsewhere, computed on the CPU.

Torch lets a test register a device of its own (``PrivateUse1``). A tensor on it is a wrapper around one on the CPU:
every operation unwraps, computes and wraps. What a real device refuses is refused here: an operation on tensors of
both places, but for single CPU numbers in element-wise operations, CPU indices, and copies. So code that runs here
mixes no devices by mistake. It says nothing about kernels, streams or memory. The device stays registered for the rest
of the process, so this belongs into a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

__all__ = ["NAME", "elsewhere", "register"]

NAME = "elsewhere"


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Elsewhere(Tensor):
    """A tensor that claims to be on the device; ``inner`` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        out = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        out.inner = inner
        return out

    @property
    def data(self) -> Tensor:
        """As on any tensor; what it is set to is what the wrapper then holds."""
        return Elsewhere(self.inner)

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Elsewhere):
            raise RuntimeError(f"parameter.data: expected a tensor {NAME}, got one on the {value.device}")
        self.inner = value.inner

    def tolist(self) -> list:
        """As on any tensor; torch refuses it for subclasses."""
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{NAME}({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees what makes tensors out of nothing, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    _mapped(lambda x: tensors.append(x) if isinstance(x, Tensor) else None, (args, tuple(kwargs.values())))
    device, here = kwargs.get("device"), [x for x in tensors if not isinstance(x, Elsewhere)]
    there = len(here) < len(tensors)
    if there and _refused(func, args, tensors, here):
        places = ", ".join(f"{list(x.shape)} on {x.device.type}" for x in tensors)
        raise RuntimeError(f"{func}: expected all tensors on one device, got {places}")
    to_wrap = there if device is None else torch.device(device).type == NAME
    if device is None and func.overloadpacket is torch.ops.aten.copy_:
        to_wrap = isinstance(args[0], Elsewhere)
    if func.overloadpacket is torch.ops.aten._efficientzerotensor:  # a tensor without memory
        func = torch.ops.aten.zeros.default
    out = func(*_mapped(_unwrapped, args), **{key: _mapped(_unwrapped, x) for key, x in kwargs.items()})
    if not to_wrap:
        return args[0] if func.overloadpacket is torch.ops.aten.copy_ else out
    out = _mapped(lambda x: Elsewhere(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


def _refused(func: Any, args: Any, tensors: list[Tensor], here: list[Tensor]) -> bool:
    """Whether a device would refuse the tensors that are on the CPU."""
    aten, name = torch.ops.aten, func.overloadpacket
    if not here or name in (aten.copy_, aten._to_copy):
        return False
    if name in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        values = args[2:3] if name is not aten.index else ()
        return not all(isinstance(x, Elsewhere) for x in (args[0], *values))
    numbers_only = all(x.dim() == 0 for x in here)
    foreach = name.__name__.startswith("_foreach_")
    return not (numbers_only and (foreach or torch.Tag.pointwise in func.tags))


def _mapped(f: Any, x: Any) -> Any:
    """Every element of lists and tuples; operations take no other containers, and torch's own is slow."""
    return type(x)([_mapped(f, y) for y in x]) if type(x) in (list, tuple) else f(x)


def _unwrapped(x: Any) -> Any:
    if isinstance(x, Elsewhere):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) else x


def register() -> None:
    """Make the device known; before the first backward pass of the process, in which torch counts its devices."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) makes its tensor on the CPU and moves it


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Within it the registered device works."""
    with mock.patch("torch.Generator", _generator), _Mode():
        yield torch.device(NAME, 0)


def _generator(device: torch.device | str = "cpu", on_cpu: type[torch.Generator] = torch.Generator) -> torch.Generator:
    return on_cpu()
