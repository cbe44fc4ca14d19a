"""What a careful reader should know about a result: a code, numbers, a text and a remedy, written in one place.

A kind of note stands beside the code that finds it; computing creates the note, and console and page show it.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import Field

from entropy_probe.results.record import Record

NOTHING_TO_DO = "Nothing to do: the numbers are right as they are."

_KINDS: dict[str, NoteKind] = {}


class Note(Record):
    """One thing that a careful reader of a result should know.

    Attributes:
        code: which kind of thing, for scripts; it stays the same when the words change.
        text: what was found, in one line.
        remedy: what to do about it.
        numbers: the numbers of the text that are finite, by name, in the units that the text gives (a percentage is a
            share of 1).
    """

    code: str
    text: str
    remedy: str
    numbers: dict[str, float] = Field(default_factory=dict)

    def about(self, subject: str) -> Note:
        """The same note, said of something: ``update: 3 of 8 prompts ...``."""
        return self.model_copy(update={"text": f"{subject}: {self.text}"})


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
        """The note with these values.

        Numbers are kept as numbers beside the text; those that stand in one of its phrases are given by themselves too.

        Raises:
            KeyError: if a value of the text is missing.
        """
        words = {name for name, x in values.items() if isinstance(x, str)}
        assert words <= self.names, f"{self.code}: {sorted(words - self.names)} are not in its text"
        numbers = {name: float(x) for name, x in values.items() if not isinstance(x, str) and math.isfinite(x)}
        return Note(code=self.code, text=self.text.format(**values), remedy=self.remedy, numbers=numbers)

    @property
    def names(self) -> set[str]:
        """The values that the text takes."""
        return {name for _, name, _, _ in string.Formatter().parse(self.text) if name}


def distinct(notes: Iterable[Note], known: Iterable[Note] = ()) -> tuple[Note, ...]:
    """Each note once, and without those that are known, by their texts: numbers may differ by rounding."""
    seen = {note.text for note in known}
    return tuple({note.text: note for note in notes if note.text not in seen}.values())


def note_kinds() -> dict[str, NoteKind]:
    """Every kind of note of the modules imported so far, by code."""
    return dict(_KINDS)
