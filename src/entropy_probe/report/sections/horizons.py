"""How far a changed token echoes: the change within 0, 1, 2, 4, ... tokens."""

from __future__ import annotations

from entropy_probe.report.sections.base import Axis, Block, Curve, LineChart, Point, Row, Table, reach, written
from entropy_probe.results.changes import Horizons

CAPTION = "across: how many tokens after a changed one count; whiskers: 95% intervals"


def horizon_rows(horizons: Horizons | None, exponent: int | None) -> list[Row]:
    """What is stated where it is not the whole response, and what lies beyond."""
    if horizons is None or horizons.headline is None:
        return []
    stated = horizons.stated
    rows = [Row(within(horizons.headline), written(stated.predicted, exponent), "predicted", headline=True)]
    if stated.beyond is not None:
        note = "predicted" if stated.beyond.distinguishable else "predicted, not resolved"
        rows.append(Row("beyond", written(stated.beyond, exponent), note, indent=True))
    return rows


def horizon_blocks(horizons: Horizons | None, unit: str) -> tuple[Block, ...]:
    """The profile as a picture and a table; nothing where responses have one token."""
    if horizons is None or len(horizons.points) < 3:
        return ()
    names = tuple("all" if point.horizon is None else str(point.horizon) for point in horizons.points)
    predicted = tuple(Point(float(k), p.predicted.value, p.predicted.margin) for k, p in enumerate(horizons.points))
    realized = tuple(
        Point(float(k), p.realized.value, p.realized.margin) for k, p in enumerate(horizons.points) if p.realized
    )
    curves = (
        Curve("predicted", "predicted δH₁", predicted),
        Curve("realized", "realized ΔH", realized, "points"),
    )
    x = Axis(-0.5, len(names) - 0.5, label="tokens after a changed one that count", names=names)
    y = Axis.around((0.0, *reach(curves)), f"entropy change ({unit})")
    chart = LineChart("How far a changed token echoes", curves, x, y, CAPTION, figure="horizons")
    columns = ("tokens", "predicted", "realized", "beyond, predicted")
    rows = tuple(
        (name, *("–" if x is None else written(x) for x in (p.predicted, p.realized, p.beyond)))
        for name, p in zip(names, horizons.points, strict=True)
    )
    return chart, Table("Change within a horizon", columns, rows, folded=True)


def within(horizon: int) -> str:
    """What a horizon is called."""
    return "within 1 token" if horizon == 1 else f"within {horizon} tokens"
