"""What messages quote: values from files, and errors of libraries, in one short line."""

from __future__ import annotations

import reprlib
from typing import Any

__all__ = ["first_line", "shown"]


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2

    def repr_int(self, x: int, level: int) -> str:
        """As it is, unless it is so large that writing it down would take long or be refused."""
        return repr(x) if x.bit_length() < 500 else f"a whole number of {x.bit_length()} bits"

    def repr_instance(self, x: Any, level: int) -> str:
        """Plain values as they are, of any other only the class."""
        plain = x is None or isinstance(x, bool | float | complex)
        return repr(x) if plain else f"a value of {type(x).__name__}"


_REPR = _Repr()


def first_line(error: Exception, most: int = 200) -> str:
    """What an error of a library says first, or its class where it says nothing, for a message of one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:most]


def shown(value: Any, most: int = 60) -> str:
    """A value from a file for a message: one line of at most ``most`` characters.

    Unlike ``repr`` it takes no longer for containers that hold one another many times over, as those from a pickle can.
    """
    return _REPR.repr(value)[:most]
