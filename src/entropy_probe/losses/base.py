"""The seam of losses: what the loss of one optimizer step is, as coefficients of the sampled tokens.

A loss is a frozen dataclass whose fields are its settings, in a file of its own in this folder, registered under the
trainer's name for it. See ``docs/theory.md``, "The update gradient".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, TypeVar, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenCoefficients, TokenScores

__all__ = ["Loss", "build_loss", "loss_types", "register"]


@runtime_checkable
class Loss(Protocol):
    """The loss of one whole optimizer step."""

    needs_scores: bool
    """Whether the coefficients depend on the policy's own log-probabilities."""
    models: tuple[str, ...]
    """How lines about what is not modelled begin that the loss does model."""
    per_token: bool
    """Whether the loss divides by the response tokens of the step, and not by its sequences."""

    def weights(self, rollouts: Rollouts) -> Float[Tensor, "N L"]:
        """The weight of every response token, 0 elsewhere, float64; normalised over all sequences of the step."""
        ...

    def coefficients(self, rollouts: Rollouts, scores: TokenScores | None) -> TokenCoefficients:
        """Coefficients of the log-probabilities and entropies in a surrogate that has the gradient of the loss.

        Args:
            rollouts: all sequences of the step.
            scores: of the same at the policy as it is; given where :attr:`needs_scores`.

        Raises:
            ValueError: if the batch lacks what the loss takes.
        """
        ...


_REGISTERED: dict[str, Callable[..., Any]] = {}
L = TypeVar("L", bound=type)


def register(name: str, **settings: Any) -> Callable[[L], L]:
    """Register a loss under a name, with some of its settings fixed."""

    def decorate(kind: L) -> L:
        assert name not in _REGISTERED, f"two losses are called {name}"
        _REGISTERED[name] = lambda **more: kind(**settings, **more)
        _SETTINGS[name] = {field.name: field for field in fields(kind) if field.name not in settings and field.init}
        return kind

    return decorate


_SETTINGS: dict[str, dict[str, Field[Any]]] = {}
"""The settings of each loss."""


@cache
def _load_members() -> None:
    package = __name__.rpartition(".")[0]
    for module in iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")


def loss_types() -> tuple[str, ...]:
    """The names of all losses."""
    _load_members()
    return tuple(sorted(_REGISTERED))


def build_loss(loss_type: str, settings: Mapping[str, Any], max_completion_length: int | None = None) -> Loss:
    """The loss of that name.

    Args:
        loss_type: the trainer's name of the loss.
        settings: its own settings.
        max_completion_length: the trainer's generation limit in tokens, for losses that divide by it.

    Raises:
        ValueError: for an unknown loss, or settings that it does not have or lacks.
    """
    if loss_type not in loss_types():
        raise ValueError(f"loss_type: expected one of {', '.join(loss_types())}, got {loss_type!r}")
    known = dict(_SETTINGS[loss_type])
    given = dict(settings)
    if known.pop("max_completion_length", None) is not None:
        given["max_completion_length"] = max_completion_length
    strays = sorted(set(settings) - set(known))
    missing = sorted(name for name, field in known.items() if field.default is MISSING and name not in given)
    if strays or missing:
        what = f"got {strays[0]}; leave it out" if strays else f"got no {missing[0]}; set it"
        raise ValueError(f"loss_settings: expected {', '.join(known) or 'none'} for loss_type {loss_type}, {what}")
    for name, value in settings.items():
        if isinstance(value, str) != (known[name].type == "str"):
            kind = "a name" if known[name].type == "str" else "a number"
            raise ValueError(f"loss_settings.{name}: expected {kind}, got {value!r}")
    return _REGISTERED[loss_type](**given)
