"""What a record shows of itself: a section of rows, tables, charts and sentences, for console, page and figures alike.

Numbers are written here as ``-1.4e-3 ± 0.1e-3``; the page sets them as print has them, except in :class:`Verbatim`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from entropy_probe.report.numbers import format_estimate
from entropy_probe.report.tables import Tables
from entropy_probe.results.note import Note
from entropy_probe.results.probe import Estimate
from entropy_probe.results.sweep import Fitted

State = Literal["ok", "look", "bad", "plain"]
Look = Literal[
    "predicted", "realized", "fit", "measured", "cumulated", "logged", "gradient", "momentum", "life", "committed",
    "run0", "run1", "run2", "run3", "run4", "run5", "",
]  # fmt: skip
"""What a curve is of, which gives its colour; "" for one of several records, told apart by their order."""


class Verbatim(str):
    """Text of a file, a user or a model, which is shown letter by letter: what looks like a number in it stays."""

    __slots__ = ()


@dataclass(frozen=True)
class Verdict:
    """A finding: which of a fixed set, a sentence with its numbers and what to do, and how it is."""

    kind: str
    sentence: str = ""
    state: State = "plain"


@dataclass(frozen=True)
class Row:
    """A number, or a fact, and its name; without a value a heading."""

    label: str
    value: str = ""  # as written, with its error
    note: str = ""  # what belongs beside it, in a few words
    quote: str = ""  # what the row is about, if a file says it; the console shows it, cut, in place of the label
    quote_begins: bool = False  # whether a quote is cut at its end, not at its beginning
    headline: bool = False  # whether it is one of the few numbers at the head of a page
    indent: bool = False  # whether it is a part of the row above
    state: State = "plain"  # how a check came out
    meaning: str = ""  # what a check means, for the page
    advice: str = ""  # what to do about it, for the page


@dataclass(frozen=True)
class Rows:
    """Rows below each other, under a heading if there is a title."""

    rows: tuple[Row, ...]
    unit: str = ""  # of the values
    title: str = ""
    page_only: bool = False  # whether a terminal has no room for them


@dataclass(frozen=True)
class Table:
    """Rows of more than one number, each named by its first column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    mark: str = ""  # what ``marked`` says of a row, in a word
    marked: tuple[bool, ...] = ()  # of each row, if there is a mark; the others are faint
    folded: bool = False  # whether the page shows it only when asked to, and the console not at all


@dataclass(frozen=True)
class Listing:
    """A text of many lines, for the page."""

    title: str
    text: str


@dataclass(frozen=True)
class Axis:
    """A linear axis over ``[low, high]``, or a logarithmic one over powers of ten; ``names`` are those of 0, 1, 2 …."""

    low: float
    high: float
    logarithmic: bool = False
    label: str = ""
    names: tuple[str, ...] = ()

    @classmethod
    def around(cls, values: Iterable[float], label: str = "", share: float = 0.04) -> Axis:
        """A linear axis over all values, and a share of their range to either side."""
        numbers = list(values)
        low, high = min(numbers), max(numbers)
        margin = share * (high - low or 1.0)
        return cls(low - margin, high + margin, label=label)

    def at(self, value: float) -> float:
        """Where a value lies, 0 to 1; what is beyond either end, at that end."""
        low, high = self._scale(self.low), self._scale(self.high)
        share = (self._scale(value) - low) / (high - low) if value > 0 or not self.logarithmic else 0.0
        return min(1.0, max(0.0, share))

    def ticks(self, about: int = 4) -> list[float]:
        """Round values within the axis, about so many; of every name, where there are names."""
        if self.names:
            return [float(k) for k in range(len(self.names))]
        if self.logarithmic:
            powers = range(math.ceil(self._scale(self.low) - 1e-9), math.floor(self._scale(self.high) + 1e-9) + 1)
            return [10.0**power for power in list(powers)[:: max(1, len(powers) // about)]]
        raw = (self.high - self.low) / about
        power = 10 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
        return [float(step * k) for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


@dataclass(frozen=True)
class Bar:
    """A row with its drawing."""

    row: Row
    value: float  # the length of the bar, signed
    margin: float | None = None  # how far its 95% interval reaches to either side; None draws none
    start: float = 0.0  # where the bar begins; in a waterfall, where the one before ended
    look: Literal["bar", "total", "dot"] = "bar"  # a total is a sum, a dot a point at the end of the bar
    linked: bool = False  # whether the bar before ends where this one begins
    prompt: int | None = None  # whose responses a click shows; None for no click

    @property
    def end(self) -> float:
        """Where the bar ends."""
        return self.start + self.value

    @property
    def reach(self) -> tuple[float, float, float]:
        """The values that must be on the axis."""
        margin = self.margin or 0.0
        return self.start, self.end - margin, self.end + margin


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars about a common zero line, not all zero."""

    title: str
    bars: tuple[Bar, ...]
    unit: str
    caption: str
    figure: str = ""  # the name of its files; "" for none


@dataclass(frozen=True)
class Point:
    """A point with what its 95% interval reaches to either side; hollow where it should not be used."""

    x: float
    y: float
    margin: float = 0.0
    usable: bool = True

    @property
    def ends(self) -> tuple[float, float]:
        """Of that interval."""
        return self.y - self.margin, self.y + self.margin


@dataclass(frozen=True)
class Curve:
    """Points of one kind, from left to right, as a line, by themselves, or both with their intervals as a band."""

    look: Look
    label: str  # in the legend; "" for none
    points: tuple[Point, ...]
    style: Literal["line", "points", "band"] = "line"


@dataclass(frozen=True)
class LineChart:
    """Curves over a common axis."""

    title: str
    curves: tuple[Curve, ...]
    x: Axis
    y: Axis
    caption: str
    shaded: tuple[float, float, str] | None = None  # a range of x, and its name in the legend
    figure: str = ""  # the name of its files, shared with the charts beside it; "" for none
    on_page: bool = True


@dataclass(frozen=True)
class HeatMap:
    """Numbers in a grid, coloured by sign and size; the first of the columns is that of the rows' names."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]  # None where there is nothing
    unit: str
    totals: tuple[float, ...] = ()  # of each row, in a column of their own colours; empty for none
    figure: str = ""  # the name of its files; "" for none


@dataclass(frozen=True)
class TokenViewer:
    """The responses of the tables, token by token, for the page's script; contributions are in ``unit``."""

    tables: Tables
    unit: str


Block: TypeAlias = Rows | Table | Listing | BarChart | LineChart | HeatMap | TokenViewer


@dataclass(frozen=True)
class Section:
    """All that is said of a record, or of one side of it."""

    title: str
    key: str  # its name in links within a page; unique there
    short: str = ""  # its title in the page's list of sections; "" leaves it out
    subtitle: str = ""  # what else to say in the title's line
    verdict: Verdict | None = None
    sentences: tuple[str, ...] = ()  # what else there is to say, the most important first
    summary: str = ""  # the one sentence that the head of a page repeats where the section is not the first
    cautions: tuple[str, ...] = ()  # what a reader of the numbers must know
    blocks: tuple[Block, ...] = ()
    notes: tuple[Note, ...] = ()
    not_modelled: tuple[str, ...] = ()
    page_only: bool = False  # whether a terminal has no room for it

    def without_figures(self) -> Section:
        """The same with its charts on the page alone."""
        blocks = (replace(b, figure="") if isinstance(b, BarChart | LineChart | HeatMap) else b for b in self.blocks)
        return replace(self, blocks=tuple(blocks))


def written(estimate: Estimate | Fitted, exponent: int | None = None) -> str:
    """An estimate with its error, the same digits for both; see :func:`format_estimate`."""
    return format_estimate(estimate.value, estimate.standard_error, exponent)


def bar_charts(title: str, bars: Sequence[Bar], unit: str, caption: str, figure: str = "") -> tuple[BarChart, ...]:
    """The chart of these bars; none where there is nothing but zeros."""
    drawn = any(x for bar in bars for x in bar.reach)
    return (BarChart(title, tuple(bars), unit, caption, figure),) if drawn else ()


def reach(curves: Iterable[Curve]) -> list[float]:
    """The ends of the intervals of all points, which must be on the axis."""
    return [x for curve in curves for point in curve.points for x in point.ends]


def sentence_case(text: str) -> str:
    """With a capital at its beginning."""
    return text[:1].upper() + text[1:]
