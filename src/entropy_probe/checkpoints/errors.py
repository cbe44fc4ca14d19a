"""The errors of everything that reads checkpoints, by what their reader can do about them, and what they quote.

Whatever reads a file of a checkpoint raises one of these, without saying so again where it is defined. Every message is
one line: file, key, expected, got, remedy.
"""

from __future__ import annotations

import reprlib
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line: where, expected, got, remedy.

    What messages quote from files may hold any character and be of any length: characters that cannot be printed are
    escaped, and of more than 2000 characters the middle is left out.
    """

    def __init__(self, message: str) -> None:
        line = message if len(message) <= 2000 else f"{message[:1500]} … {message[-400:]}"
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


class MissingFileError(CheckpointError):
    """A file is not there: a wrong path, or a save that is not finished; wait for it or copy it again."""


class DamagedFileError(CheckpointError):
    """A file is not what was written: cut short, garbled, or changed since its hash was recorded; copy it again."""


class UnsafeFileError(CheckpointError):
    """Read the usual way, a file would run code or reach outside its directory; it was not read that way."""


class UnsupportedError(CheckpointError):
    """Intact, as far as was looked, but of a kind that is not read: another optimizer, adapter or format."""


class InvalidValueError(CheckpointError):
    """A file can be read but holds values that no usable run leaves: NaN, a negative second moment, step 0."""


class MismatchError(CheckpointError):
    """Each file can be read, but they do not belong together: weights, optimizer, base model, tokenizer, manifest."""


class MappingError(MismatchError):
    """Not exactly one assignment of optimizer entries to parameters fits, or the recorded one does not."""


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
