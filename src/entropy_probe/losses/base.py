"""The seam of losses: what the loss of one optimizer step is, as coefficients of the sampled tokens.

A family of losses is a subclass of :class:`Loss` in a file of its own in this folder, named by its ``trainer``. Its
fields are the trainer's settings, with the trainer's names and defaults. See ``docs/theory.md``, "The update gradient".
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor

from entropy_probe.losses.pieces import is_one
from entropy_probe.results.note import NOTHING_TO_DO, Note, NoteKind
from entropy_probe.results.record import Settings
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenCoefficients, TokenScores

INERT = NoteKind("inert", "{what} inert: {reason} ({settings})", NOTHING_TO_DO)
GLOBAL_MEAN = NoteKind(
    "global_mean",
    "{what}: the trainer takes it over each {unit}, and the update batch does not say which those were; one over the "
    "whole step is taken, which may be 1 to 2% off",
    "Record microbatch_ids in the update batch; set num_items_in_batch where a generation serves several steps.",
)
NOT_A_NUMBER = NoteKind(
    "loss_not_a_number",
    "the trainer's own loss is not a number on this batch: {why}; here these sequences count for nothing",
    "Give the sequences that the trainer took its step on.",
)
RATIO_ONE = NoteKind(
    "ratio_one",
    "importance ratios are taken to be 1: the update batch has no old_logprobs, and {settings} do not say whether the "
    "trainer takes several steps on the same rollouts",
    "Nothing to do for the first step on fresh rollouts; for a later one record old_logprobs.",
)


class Loss(Settings, ABC):
    """The loss of one whole optimizer step, with a trainer's settings.

    Attributes:
        trainer: whose loss it is.
    """

    trainer: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Enter a family under its trainer's name."""
        name = cls.model_fields["trainer"].default
        assert name not in _TRAINERS, f"two losses are {name}'s"
        _TRAINERS[name] = cls

    @property
    def needs_reference(self) -> bool:
        """Whether it takes a reference policy's log-probabilities."""
        return False

    @property
    def needs_old(self) -> bool:
        """Whether the trainer takes several steps on the same rollouts, so that the batch must have old ones."""
        return False

    @property
    def weighs_sampler(self) -> bool:
        """Whether it weights tokens by ratios between the old policy and the sampler."""
        return False

    @property
    def models(self) -> tuple[str, ...]:
        """How lines about what is not modelled begin that the loss does model."""
        return ()

    @property
    @abstractmethod
    def per_token(self) -> bool:
        """Whether the policy term divides by the response tokens of the step, and not by its sequences."""

    @abstractmethod
    def needs_scores(self, rollouts: Rollouts) -> bool:
        """Whether the coefficients depend on the policy's own scores of this batch."""

    def check(self, rollouts: Rollouts) -> None:
        """Make sure that the batch has what the loss takes, but for the reference's log-probabilities.

        Raises:
            ValueError: if it lacks a column.
        """
        return

    def check_model(self, config: object) -> None:
        """Make sure that the loss of a model with this ``config``, if it has one, is coefficients of tokens alone.

        Raises:
            ValueError: if it has a term that is none, such as one that balances experts.
        """
        return

    @abstractmethod
    def coefficients(self, rollouts: Rollouts, scores: TokenScores | None) -> TokenCoefficients:
        """Coefficients of the log-probabilities and entropies in a surrogate that has the gradient of the loss.

        They are normalised over all sequences of the step; without some sequences, call it with the others.

        Args:
            rollouts: all sequences of the step.
            scores: of the same at the policy as it is; given where :meth:`needs_scores`.

        Returns:
            Float64, 0 off the response.

        Raises:
            ValueError: if the batch lacks what the loss takes.
        """

    def notes(self, rollouts: Rollouts, scores: TokenScores | None) -> list[Note]:
        """What a reader should know of this loss on this batch: settings without effect, what was taken instead."""
        return []


def require(rollouts: Rollouts, name: str, where: str, remedy: str) -> None:
    """Make sure that an update batch has a column of log-probabilities."""
    if getattr(rollouts, name) is None:
        raise ValueError(f"{name}: expected [N, L] on an update batch {where}, got None; {remedy}")


_TRAINERS: dict[str, type[Loss]] = {}


@cache
def _load_members() -> None:
    package = __name__.rpartition(".")[0]
    for module in iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")


def trainers() -> dict[str, type[Loss]]:
    """The families of losses by their trainers' names."""
    _load_members()
    return dict(sorted(_TRAINERS.items()))


def default_loss() -> Loss:
    """TRL's with its defaults, in which nothing counts as set: not even whose it is."""
    return trainers()["trl"].model_validate({})


def build_loss(settings: Mapping[str, Any]) -> Loss:
    """The loss with these settings, ``trainer`` among them.

    Raises:
        ValueError: for an unknown trainer, a setting that its losses do not have, or a value that does not fit.
    """
    name = settings.get("trainer")
    if name not in trainers():
        got = "none" if name is None else repr(name)
        raise ValueError(f"loss.trainer: expected one of {', '.join(trainers())}, got {got}; set the trainer's name")
    kind = trainers()[name]
    strays = sorted(set(map(str, settings)) - kind.model_fields.keys())
    if strays:
        near = difflib.get_close_matches(strays[0], kind.model_fields, n=1)
        known = f"did you mean {near[0]}?" if near else f"known are {', '.join(kind.model_fields)}"
        raise ValueError(f"loss.{strays[0]}: not a setting of {name}'s losses; {known}")
    try:
        return kind(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("loss", *first["loc"])))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] != "value_error":
            message = f"{message[0].lower()}{message[1:]}, got {first['input']!r}"
        raise ValueError(message if message.startswith("loss.") else f"{where}: {message}") from error


def inert_clip(loss: Loss, settings: Iterable[str], log_ratio: Float[Tensor, "N L"]) -> list[Note]:
    """Those of the settings of a clip range that were given, where every ratio is 1."""
    given = [name for name in settings if name in loss.model_fields_set and getattr(loss, name) is not None]
    if not given or not is_one(log_ratio):
        return []
    return [INERT(what="clip range", reason="every ratio is 1 on this step", settings=", ".join(given))]
