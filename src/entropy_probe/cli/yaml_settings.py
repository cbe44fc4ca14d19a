"""YAML as people mean it: ``8e-7`` is a number, a key appears once, and dotted overrides replace single values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES, MOST_VALUES, DEEPEST = 1_000_000, 100_000, 50
"""Of a file of settings: beyond these it is something else, which takes minutes or more to read."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core types. PyYAML's own 1.1 types read ``8e-7`` as text and ``no`` as false."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key.value}'", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_FLOAT = re.compile(rf"({_NUMBER}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""


_SHOWN = 100

_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Raises:
        ValueError: if the file is missing, unreadable, not YAML, not a mapping, or repeats a key.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a YAML file, found {'a directory' if path.is_dir() else 'no such file'}")
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(
                f"{path}: expected a YAML file of at most {MOST_BYTES} bytes, got {size}; put texts into the "
                "file of prompts"
            )
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text: {error}") from error
    settings = _parse(text, str(path))
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected `key: value` settings, got {type(settings).__name__}")
    return settings


def apply_overrides(settings: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Settings with dotted ``key=value`` replacements, the values read as YAML; the argument is left as it was.

    A section that is missing or null is made, so ``update.group_size=4`` works on a file without ``update``.

    Raises:
        ValueError: if an override is not ``key=value``, its value is not YAML, or its key goes through a number
            or text.
    """
    result = _copy(settings)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise ValueError(f"{override}: expected an override key=value, such as probe.learning_rate=1e-5")
        section = result
        for i, part in enumerate(parts[:-1]):
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                raise ValueError(f"{override}: {'.'.join(parts[: i + 1])} holds {section!r}, which has no keys inside")
        section[parts[-1]] = _parse(text, override)
    return result


def dump_yaml(settings: dict[str, Any]) -> str:
    """Settings as YAML text that :func:`load_yaml` reads back unchanged."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parse(text: str, where: str) -> Any:
    try:
        settings = yaml.load(text, _Loader)
    except (KeyError, ValueError, RecursionError) as error:  # of a tag that the value does not fit, or of its depth
        said = " ".join(str(error).split())
        raise ValueError(f"{where:.{_SHOWN}}: not valid YAML: {type(error).__name__}: {said:.{_SHOWN}}") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{where}{line}: not valid YAML: {error.problem:.{_SHOWN}}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    _check_extent(settings, where)
    return settings


def _check_extent(settings: Any, where: str) -> None:
    """Refuse what aliases unfold to without end, or nearly."""
    left, values = [(settings, 0)], 0
    while left:
        value, depth = left.pop()
        values += 1
        if values > MOST_VALUES or depth > DEEPEST:
            raise ValueError(
                f"{where:.{_SHOWN}}: expected at most {MOST_VALUES} values, {DEEPEST} deep, aliases "
                "included, got more; leave some out"
            )
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
        left += [(item, depth + 1) for item in inner]


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value
