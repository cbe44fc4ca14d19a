"""Pickles gone through before they are opened: nothing in one may take longer to look at than its length suggests.

A few hundred bytes can describe a tuple that holds another twice, which holds another twice, and so on; to hash it, as
an unpickler does with a key, or to print it then takes for ever. And some of what torch lets a pickle call makes large
values from small ones. So the instructions are gone through first, without carrying them out.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Collection, Iterable
from typing import Any

import torch

from entropy_probe.checkpoints.errors import shown

MAX_VALUES = 1000
"""Values in one tuple, at any depth."""
MAX_NUMBER = 2**20
"""Under which a value may be kept, beyond the length of the pickle: an unpickler makes room for all below."""
MAX_INSTRUCTIONS = 2**24
"""What takes an unpickler some ten seconds; an entry of an optimizer has about a hundred."""

STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
"""The type of an element, by what torch calls the storage."""
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()}
"""By name."""
PLAIN = {
    *(f"torch {kind}Storage" for kind in STORAGES),
    *("torch.storage UntypedStorage", "torch Size", "torch device", "torch.serialization _get_layout"),
    *(f"torch._utils _rebuild_{what}" for what in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
    *("torch.nn.parameter Parameter", "collections OrderedDict"),
    *(f"torch {name}" for name in DTYPES),
}
"""What ``torch.save`` names for dense tensors and plain values."""

_MADE_OF_OTHERS = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"}
_PUT, _GET = ("BINPUT", "LONG_BINPUT", "MEMOIZE", "PUT"), ("BINGET", "LONG_BINGET", "GET")


def whole_numbers(values: Iterable[Any]) -> tuple[int, ...]:
    """Sizes or offsets of a tensor.

    Raises:
        ValueError, TypeError: if they are none.
    """
    numbers = tuple(values)
    if len(numbers) > 64 or not all(type(x) is int and 0 <= x < 2**48 for x in numbers):
        raise ValueError(f"sizes {shown(numbers)}")
    return numbers


def _effect(opcode: pickletools.OpcodeInfo) -> tuple[int, bool, bool, bool]:
    """How many values it takes, besides those since a mark or not; whether it leaves one, and one made of them."""
    before = opcode.stack_before
    marked = pickletools.markobject in before
    count = before.index(pickletools.markobject) if marked else len(before)
    return count, marked, bool(opcode.stack_after), opcode.name in _MADE_OF_OTHERS


_EFFECTS = {opcode.name: _effect(opcode) for opcode in pickletools.opcodes}


def check_pickle(data: bytes, names: Collection[str] | None = None) -> None:
    """Go through a pickle without carrying it out.

    It may name only ``names``, as module and name with a space between; anything if None, where the unpickler looks.

    Raises:
        pickle.UnpicklingError: if it names something else, or anything in the process-wide extension registry, which
            an unpickler does not ask about; if a tuple in it holds too much, or an unpickler would make room for more
            values than it can have, or would take long.
        ValueError, LookupError: if it is malformed.
    """
    stack: list[int] = []  # of each value, how many it holds that it will always hold: 1 where they can still change
    outer: list[list[int]] = []  # the stacks below each mark
    memo: dict[Any, int] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if count == MAX_INSTRUCTIONS:
            raise pickle.UnpicklingError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
        name = opcode.name
        if name in _PUT:
            index = len(memo) if argument is None else argument
            if index > len(data) + MAX_NUMBER:
                raise pickle.UnpicklingError(f"it numbers a value {index}")
            memo[index] = stack[-1]
        elif name in _GET:
            stack.append(memo[argument])
        elif name == "MARK":
            outer.append(stack)
            stack = []
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("EXT1", "EXT2", "EXT4"):
            raise pickle.UnpicklingError("it names an entry of the extension registry")
        elif name == "GLOBAL" and names is not None and argument not in names:
            raise pickle.UnpicklingError(f"it names {argument}"[:100])
        else:
            taken, marked, leaves, made_of_them = _EFFECTS[name]
            held = sum(stack) if marked else 0
            if marked:
                stack = outer.pop()
            for _ in range(taken):
                held += stack.pop()
            if held >= MAX_VALUES and made_of_them:
                raise pickle.UnpicklingError(f"it has a tuple of {MAX_VALUES} values or more")
            if leaves:
                stack.append(1 + held if made_of_them else 1)
