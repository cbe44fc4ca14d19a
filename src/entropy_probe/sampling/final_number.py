"""The number that a text ends with."""

from __future__ import annotations

import re
from decimal import Decimal

# an optional sign (not the hyphen of 10-5) and $, and a number whose thousands may be set off by commas
_NUMBER = re.compile(r"(?<![\d.])(?:(?<!\w)-)?(?:\$\s*-?)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def final_number(text: str) -> Decimal | None:
    """The first number after the last ``####``, or the last one in a text without ``####``; None if there is none."""
    _, marker, tail = text.rpartition("####")
    numbers = list(_NUMBER.finditer(tail.replace("−", "-")))
    if not numbers:
        return None
    match = numbers[0] if marker else numbers[-1]
    value = Decimal(match[1].replace(",", ""))
    return -value if "-" in match[0] else value
