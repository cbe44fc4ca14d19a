"""What a careful reader should know about a result: a code, numbers, a text and a remedy, written in one place.

A kind of note stands beside the code that finds it; computing creates the note, and console and page show it.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

from pydantic import Field

from entropy_probe.results.record import Record

__all__ = ["NOTHING_TO_DO", "Note", "NoteKind", "note_kinds"]

NOTHING_TO_DO = "Nothing to do: the numbers are right as they are."

_KINDS: dict[str, NoteKind] = {}


class Note(Record):
    """One thing that a careful reader of a result should know.

    Attributes:
        code: which kind of thing, for scripts; it stays the same when the words change.
        text: what was found, in one line.
        remedy: what to do about it.
        numbers: the numbers of the text, by name, in the units that the text gives.
    """

    code: str
    text: str
    remedy: str
    numbers: dict[str, float] = Field(default_factory=dict)


@dataclass(frozen=True)
class NoteKind:
    """A kind of note; call it with the values of its text.

    Attributes:
        code: unique, in snake case.
        text: with the names of its values in braces, and their formats.
        remedy: what to do about it.
    """

    code: str
    text: str
    remedy: str

    def __post_init__(self) -> None:
        assert self.code not in _KINDS, f"two kinds of note are called {self.code}"
        _KINDS[self.code] = self

    def __call__(self, **values: str | int | float) -> Note:
        """The note with these values; numbers among them are kept as numbers beside the text.

        Raises:
            KeyError: if a value of the text is missing.
        """
        assert values.keys() <= self.names, f"{self.code}: {sorted(values.keys() - self.names)} are not in its text"
        numbers = {name: float(x) for name, x in values.items() if not isinstance(x, str)}
        return Note(code=self.code, text=self.text.format(**values), remedy=self.remedy, numbers=numbers)

    @property
    def names(self) -> set[str]:
        """The values that the text takes."""
        return {name for _, name, _, _ in string.Formatter().parse(self.text) if name}


def note_kinds() -> dict[str, NoteKind]:
    """Every kind of note of the modules imported so far, by code."""
    return dict(_KINDS)
