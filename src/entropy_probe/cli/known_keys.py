"""Which keys a config file may have, and which known one is near an unknown one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from entropy_probe.losses import Loss


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """The keys of a section, with the model of those that are sections themselves; a loss knows its own keys."""
    keys: dict[str, type[BaseModel] | None] = {}
    for name, field in model.model_fields.items():
        candidates = (field.annotation, *get_args(field.annotation))
        models = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]
        keys[name] = models[0] if models and not inspect.isabstract(models[0]) else None
    return keys


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, section in _sections(model).items():
        yield prefix + name
        if section is not None:
            yield from _known_keys(section, f"{prefix}{name}.")


def unknown_keys(settings: Mapping[Any, Any], model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Keys of settings that a model of them does not have, dotted, those of its sections too."""
    known = _sections(model)
    for name, value in settings.items():
        section = known.get(name)
        if name not in known:
            yield f"{prefix}{name}"
        elif section is not None and section is not Loss and isinstance(value, Mapping):
            yield from unknown_keys(value, section, f"{prefix}{name}.")


def suggestion(unknown: str, kind: type[BaseModel]) -> str:
    """The nearest known key by its last part, in the same section first, then in any."""
    section, _, name = unknown.rpartition(".")
    known = [(key.rpartition("."), key) for key in _known_keys(kind)]
    beside = {parts[2]: key for parts, key in known if parts[0] == section}
    anywhere = {parts[2]: key for parts, key in known}
    for keys in (beside, anywhere):
        nearest = difflib.get_close_matches(name, keys, n=1)
        if nearest:
            return f"did you mean {keys[nearest[0]]}?"
    return f"known here are {', '.join(beside)}"
