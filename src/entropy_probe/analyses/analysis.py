"""The seam of analyses: a question about a prediction, answered by a record that shows itself.

An analysis is a module of :mod:`entropy_probe.analyses.questions`, of which it takes the name; it has ``Settings``,
``Answer``, ``run`` and ``section``. Its key in a config, its file and its part of console and page follow from these.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, ValidationError

from entropy_probe.analyses.predict import Prediction
from entropy_probe.results.record import SavedRecord
from entropy_probe.results.section import Section

__all__ = ["Analysis", "analyses", "analysis_settings"]


@runtime_checkable
class Analysis(Protocol):
    """A question about a prediction."""

    Settings: type[BaseModel]
    """What is asked; frozen, unknown keys are errors."""
    Answer: type[SavedRecord]
    """The answer, which has a file of its own."""

    def run(self, prediction: Prediction, settings: Any) -> SavedRecord:
        """The answer; called while the policy may be scored and differentiated.

        Raises:
            ValueError: if the question does not fit the prediction.
        """
        ...

    def section(self, answer: Any) -> Section:
        """The answer for people."""
        ...


@cache
def analyses() -> dict[str, Analysis]:
    """All analyses by name."""
    package = import_module("entropy_probe.analyses.questions")
    members: dict[str, Any] = {
        m.name: import_module(f"{package.__name__}.{m.name}") for m in iter_modules(package.__path__)
    }
    return members


def analysis_settings(name: str, settings: dict[str, Any]) -> BaseModel:
    """The settings of an analysis.

    Raises:
        ValueError: for an unknown analysis, or settings that it refuses.
    """
    if name not in analyses():
        raise ValueError(f"analyses: expected one of {', '.join(analyses())}, got {name!r}")
    try:
        return analyses()[name].Settings(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (name, *first["loc"])))
        raise ValueError(f"analyses.{where}: {first['msg']}, got {first['input']!r}") from error
