"""Text from files, users and models on its way to a terminal or a page."""

from __future__ import annotations

from itertools import groupby

# Drawn as nothing, although Unicode counts them as printable: fillers, joiners and variation selectors. The two
# selectors that choose between an emoji and a text glyph stay as they are.
_BLANK = frozenset(map(chr, [0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0])) | frozenset(
    map(chr, [*range(0x180B, 0x1810), *range(0xFE00, 0xFE0E), *range(0xE0100, 0xE01F0)])
)
_CONTROLS = (
    "NUL", "SOH", "STX", "ETX", "EOT", "ENQ", "ACK", "BEL", "BS", "TAB", "↵", "VT", "FF", "CR", "SO", "SI", "DLE",
    "DC1", "DC2", "DC3", "DC4", "NAK", "SYN", "ETB", "CAN", "EM", "SUB", "ESC", "FS", "GS", "RS", "US",
)  # fmt: skip
_NAMES = dict(zip(map(chr, range(32)), _CONTROLS, strict=True)) | {
    "\x7f": "DEL", "\xa0": "NBSP", "\xad": "SHY", "\u200b": "ZWSP", "\u200c": "ZWNJ", "\u200d": "ZWJ",
    "\u200e": "LRM", "\u200f": "RLM", "\u202a": "LRE", "\u202b": "RLE", "\u202c": "PDF", "\u202d": "LRO",
    "\u202e": "RLO", "\u2066": "LRI", "\u2067": "RLI", "\u2068": "FSI", "\u2069": "PDI", "\ufeff": "BOM",
}  # fmt: skip


def printable(text: str) -> str:
    r"""The text with everything that a terminal would act on, or not show, written out as ``\x1b``.

    Escape sequences can move the cursor, retitle the window or hide what was printed; direction marks reorder it.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def visible_parts(text: str) -> list[str]:
    """The text for a page, with a name in place of every character that would not show or would reorder others.

    Control characters and marks of direction get their usual abbreviation (``NUL``, ``RLO``), others their code point
    (``U+E0001``). A line break or a tab stays in the text after its name, so that it still breaks the line.

    Returns:
        Plain text and names in turn, starting with plain text, which may be empty: names are at odd places.
    """
    parts = [""]
    for plain, run in groupby(text, key=_shows):
        if plain:
            parts[-1] += "".join(run)
        else:
            parts += [part for c in run for part in (_name(c), c if c in "\n\t" else "")]
    return parts


def _shows(character: str) -> bool:
    return character.isprintable() and character not in _BLANK


def _name(character: str) -> str:
    return _NAMES.get(character) or f"U+{ord(character):04X}"
