"""Text from files and users on its way to a terminal."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    r"""The text with everything that a terminal would act on, or not show, written out as ``\x1b``.

    Escape sequences can move the cursor, retitle the window or hide what was printed; direction marks reorder it.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
