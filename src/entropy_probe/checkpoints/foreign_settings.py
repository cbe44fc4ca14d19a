"""What trainers other than TRL's wrote down of their settings: verl, OpenRLHF and prime-rl, in files of their own.

verl's are composed by Hydra (``.hydra/config.yaml``), prime-rl's lie in ``configs/``, OpenRLHF's are arguments of a
command. They are found around a checkpoint, or given: YAML (W&B's ``config.yaml`` too), JSON, TOML, or the script with
the command. A trainer is an entry of :data:`DIALECTS`: by our names where its settings are.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from entropy_probe.checkpoints.dialects import DEEPSPEED, DIALECTS, Dialect, Settings, at
from entropy_probe.checkpoints.errors import InvalidValueError, MissingFileError, UnsafeFileError, UnsupportedError
from entropy_probe.checkpoints.trainer_settings import TrainerSettings, check_kinds, plain

MOST = 2**20
"""Bytes of a file of settings."""
LEVELS = 3
"""How far above a checkpoint its run's files may be."""
_WANDB = {"value", "desc"}
_PLACES = (
    *(".hydra/config.yaml", "configs/trainer.json", "configs/trainer.toml", "configs/rl.json", "configs/rl.toml"),
    *("config.yaml", "ds_config.json", "deepspeed.json", "deepspeed_config.json"),
)


def find_settings(path: Path) -> TrainerSettings | None:
    """The settings that a trainer left in a checkpoint's directory or a few levels above; None where there are none.

    Those of DeepSpeed, which knows no loss, only where no trainer's own are.
    """
    of_deepspeed = None
    above = (path.absolute(), *path.absolute().parents[:LEVELS])
    for file in (place / name for place in above for name in _PLACES):
        if file.is_file() and file.stat().st_size <= MOST and _may_be_a_trainers(file):
            settings = _read(file)
            dialect = _dialect(settings)
            if dialect is not None and dialect.name != DEEPSPEED:
                return _settings(file, dialect, settings)
            if dialect is not None and of_deepspeed is None:
                of_deepspeed = _settings(file, dialect, settings)
    return of_deepspeed


def read_settings(file: Path) -> TrainerSettings:
    """The settings in a file that was given."""
    if not file.is_file():
        raise MissingFileError(f"{file}: expected a trainer's own config, found no such file; check the path")
    if file.stat().st_size > MOST:
        raise UnsafeFileError(f"{file}: expected settings of at most {MOST:,} bytes, got {file.stat().st_size:,}")
    settings = _read(file)
    dialect = _dialect(settings)
    if dialect is None:
        raise UnsupportedError(
            f"{file}: expected the config of {', '.join(d.name for d in DIALECTS)}, got settings called "
            f"{', '.join(map(str, settings))[:120] or 'nothing'}; give loss, temperature and clipping under probe"
        )
    return _settings(file, dialect, settings)


def settings_of_deepspeed(file: Path, config: Settings) -> TrainerSettings:
    """The settings in a configuration of DeepSpeed's, of which ``file`` has a copy.

    Raises:
        CheckpointError: if one is no plain value.
    """
    return _settings(file, next(dialect for dialect in DIALECTS if dialect.name == DEEPSPEED), _nested(config))


def _may_be_a_trainers(file: Path) -> bool:
    """Whether a file has the words of a trainer's settings: what else is called ``config.yaml`` is not looked into."""
    text = file.read_bytes()
    return any(word.encode() in text for dialect in DIALECTS for mark in dialect.marks for word in mark.split(".")[-1:])


def _dialect(settings: Settings) -> Dialect | None:
    fitting = (d for d in DIALECTS if any(at(settings, mark) is not None for mark in d.marks))
    return next(fitting, None)


def _settings(file: Path, dialect: Dialect, settings: Settings) -> TrainerSettings:
    loss, others = (dict(_taken(file, settings, places)) for places in (dialect.loss, dialect.others))
    dialect.derive(settings, loss, others)
    check_kinds(file, others, others, "give it in the config")
    told = None if dialect.loss_of is None else {"trainer": dialect.loss_of, **loss}
    return TrainerSettings(file, dialect.name, others, told, other_loss=False)


def _taken(file: Path, settings: Settings, places: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Any]]:
    for name, paths in places.items():
        path = next((path for path in paths if at(settings, path, ...) is not ...), None)
        if path is not None:
            told = at(settings, path)
            value = plain(told)
            if value is ... or (isinstance(value, str) and "$" in value):
                raise InvalidValueError(
                    f"{file}: {path}: expected a plain value, got {told!r:.60}; write it out, or give it in the config"
                )
            yield name, value


def _nested(settings: Settings) -> dict[str, Any]:
    """With ``a.b`` as ``b`` in ``a``."""
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        *parents, last = str(name).split(".")
        place = nested
        for parent in parents:
            inner = place.get(parent)
            place[parent] = place = dict(inner) if isinstance(inner, Mapping) else {}
        place[last] = value
    return nested


def _read(file: Path) -> Settings:
    """A file's settings, by its ending; what is no mapping is none."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            content = json.loads(text)
        elif file.suffix == ".toml":
            content = tomllib.loads(text)
        elif file.suffix in (".yaml", ".yml"):
            content = yaml.safe_load(text)
        else:
            content = dict(_arguments(text))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InvalidValueError(
            f"{file}: expected settings that can be read, got: {reason}; correct the file"
        ) from error
    if not isinstance(content, Mapping):
        return {}
    of_wandb = {name for name, x in content.items() if isinstance(x, Mapping) and {"value"} <= x.keys() <= _WANDB}
    content = _nested({name: x["value"] if name in of_wandb else x for name, x in content.items()})
    beside = file.with_name(file.name.replace("trainer", "orchestrator"))
    if file.stem == "trainer" and beside.is_file() and beside.stat().st_size <= MOST:  # prime-rl's two halves
        return {"trainer": content, "orchestrator": _read(beside)}
    return content


def _arguments(text: str) -> Iterator[tuple[str, Any]]:
    """Of the commands in a script, ``--name value`` and ``name=value``; later ones count."""
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    for i, word in enumerate(words):
        name, equals, value = word.lstrip("-+").partition("=")
        if not re.fullmatch(r"[a-z][\w.]*", name):
            continue
        if equals:
            yield name, _value(value)
        elif word.startswith("--"):
            values = []
            for following in words[i + 1 :]:
                if not re.fullmatch(r"[-+]?[\d.][\w.+-]*|[A-Za-z$][\w./:${}-]*", following):
                    break
                values.append(_value(following))
            yield name, (True if not values else values[0] if len(values) == 1 else values)


def _value(text: str) -> Any:
    """A word of a command as YAML would have it."""
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    try:
        return json.loads(text)
    except ValueError:
        return text
