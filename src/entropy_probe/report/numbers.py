"""Numbers for people: a value and its error with the same digits."""

from __future__ import annotations

import re
from decimal import Decimal

PLAIN_EXPONENTS = range(-2, 5)
MAX_DIGITS = 7
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SHARED_EXPONENT = re.compile(r"(-?[\d.]+)e([-+]?\d+) ± ([\d.]+)e\2(?!\d)")
_EXPONENT = re.compile(r"(?<=[\d)])e([-+]?\d+)")
_MINUS = re.compile(r"(?<![\w.])-(?=\d)")


def format_number(value: float, digits: int = 3) -> str:
    """One number to a few significant digits; scientific notation below 0.01 and from 100000."""
    if value == 0:
        return "0"
    rounded = Decimal(f"{value:.{digits - 1}e}")
    return _write(rounded, rounded.adjusted())


def format_estimate(value: float, standard_error: float, exponent: int | None = None) -> str:
    """``value ± standard error``: the error to two significant digits, the value to the same decimal place.

    Both share one power of ten, so that ``-1.43e-3 ± 0.12e-3`` can be read at a glance. Where the error is below
    1e-6 of the value, each gets its own digits: more decimals of the value would be rounding, not information.

    Args:
        value: the estimate.
        standard_error: its error, same unit.
        exponent: the power of ten of a column, used unless the number is less than a hundredth of it.
    """
    if standard_error == 0:
        return f"{format_number(value, 4)} ± 0"
    if abs(value) > standard_error * 10 ** (MAX_DIGITS - 1):
        return f"{format_number(value, MAX_DIGITS)} ± {format_number(standard_error, 2)}"
    error = Decimal(f"{standard_error:.1e}")
    rounded = Decimal(value).quantize(error)
    rounded = rounded if rounded else abs(rounded)
    own = max(rounded.adjusted(), error.adjusted()) if rounded else error.adjusted()
    if exponent is None or not exponent - 2 <= own <= exponent:
        exponent = own
    return f"{_write(rounded, exponent)} ± {_write(error, exponent)}"


def format_in(value: float, exponent: int | None) -> str:
    """One number of a column with a common power of ten; without one, as :func:`format_number` has it."""
    if exponent is None or exponent in PLAIN_EXPONENTS:
        return format_number(value)
    return f"{value / 10.0**exponent:.2f}e{exponent}"


def common_exponent(*numbers: float) -> int | None:
    """The power of ten that the largest of the numbers is written with; None when all are 0."""
    largest = max((abs(number) for number in numbers), default=0.0)
    return Decimal(f"{largest:.2e}").adjusted() if largest else None


def format_percent(fraction: float, decimals: int = 1) -> str:
    """A share as a percentage; 100% only where it is exactly that."""
    percent = 100 * fraction
    return f"{percent:.0f}%" if percent in (0, 100) else f"{min(percent, 100 - 10.0**-decimals):.{decimals}f}%"


def signed(number: str) -> str:
    """A formatted number with room for a minus sign, so that digits line up."""
    return number if number.startswith("-") else f" {number}"


def typeset(number: str) -> str:
    """Formatted numbers, also within a sentence, as print has them: ``-1.4e-3 ± 0.1e-3`` is ``(−1.4 ± 0.1)×10⁻³``."""
    shared = _SHARED_EXPONENT.sub(r"(\1 ± \3)e\2", number)
    powers = _EXPONENT.sub(lambda match: "×10" + str(int(match[1])).translate(_SUPERSCRIPTS), shared)
    return _MINUS.sub("−", powers)


def _write(number: Decimal, exponent: int) -> str:
    if exponent in PLAIN_EXPONENTS or not number.is_finite():
        return f"{number:f}"
    return f"{number.scaleb(-exponent):f}e{exponent}"
