"""Notes in tests."""

from collections.abc import Iterable

from entropy_probe.results.note import Note


def texts(notes: Iterable[Note]) -> list[str]:
    """What they say, in order."""
    return [note.text for note in notes]


def noted(*said: str, remedy: str = "Look again.") -> tuple[Note, ...]:
    """Notes with these texts."""
    return tuple(Note(code="test", text=text, remedy=remedy) for text in said)
