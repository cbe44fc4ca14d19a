"""Which Python functions a config may have imported: it is data, perhaps from somebody else."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

OWN = ("entropy_probe.sampling.rewards", "entropy_probe.sampling.generated")
"""This package's modules of rewards. Its others are no less dangerous to call than the standard library's."""
_PACKAGE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def allowed_file() -> Path:
    """Where the user lists packages that configs may name functions of: one a line, ``#`` begins a comment."""
    home = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".config") / "entropy-probe" / "allowed"


def check_code(named: Iterable[tuple[str, str]], config: str) -> None:
    """Check that every function which a config names is defined in an allowed package. Nothing else is imported.

    Args:
        named: keys of the config, each with the ``package.module:function`` that it names.
        config: the file, for messages.

    Raises:
        ValueError: if one is not, or cannot be imported; says what would be imported and from which file.
    """
    from entropy_probe.sampling.foreign import import_function, split_path

    named = list(named)
    allowed = (*OWN, *_allowed_packages()) if named else ()
    for key, path in named:
        module, _ = split_path(path, key)
        place = f"{path} would be imported from {_file_of(module)}"
        if _within(module, allowed):
            home = _defined_in(import_function(path, key))
            if _within(home, allowed):
                continue
            module, place = home, f"{path} is a function of {home or 'Python itself'}"
        package = module.partition(".")[0]
        raise ValueError(
            f"{config}: {key}: expected code that you allow, {place}, and importing runs it; pass --allow-code if you "
            f"trust this config, or allow the package for good with a line {package!r} in {allowed_file()}"
        )


def forget_current_directory() -> None:
    """Take the current directory from the import path, where ``python -m`` and an empty ``PYTHONPATH`` entry put it.

    A config that names code would otherwise run what lies beside it. It stays where ``PYTHONPATH`` names it, or an
    installed package lies in it.
    """
    asked = {os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    here, stdlib = os.getcwd(), sysconfig.get_path("stdlib")
    end = sys.path.index(stdlib) if stdlib in sys.path else len(sys.path)
    given = [entry for entry in sys.path[:end] if here in asked or os.path.abspath(entry) != here]
    sys.path[:] = given + [entry for entry in sys.path[end:] if entry]


def _allowed_packages() -> list[str]:
    file = allowed_file()
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected names of packages, one a line, cannot read it: {error}") from error
    packages = [package for line in lines if (package := line.partition("#")[0].strip())]
    wrong = next((package for package in packages if not _PACKAGE.fullmatch(package)), None)
    if wrong is not None:
        raise ValueError(f"{file}: expected names of packages, one a line, got {wrong!r:.60}; correct it")
    return packages


def _within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _defined_in(function: Callable[..., Any]) -> str:
    """The module of a function, or of the class of an object that can be called; empty if it is built in."""
    while isinstance(function, functools.partial):
        function = function.func
    plain = inspect.unwrap(function)
    owner = plain if inspect.isroutine(plain) or inspect.isclass(plain) else type(plain)
    return getattr(owner, "__module__", None) or ""


def _file_of(module: str) -> str:
    """The file of a module, or the folder of a package, found without importing anything."""
    names = module.split(".")
    spec: ModuleSpec | None = None
    for depth in range(len(names)):
        places = None if spec is None else spec.submodule_search_locations
        if depth and places is None:
            return "nowhere (there is no such module on the import path)"
        name = ".".join(names[: depth + 1])
        finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
        spec = next((spec for find in finders if find is not None and (spec := find(name, places))), None)
        if spec is None:
            return "nowhere (there is no such module on the import path)"
    assert spec is not None
    if spec.has_location:
        return str(spec.origin)
    return next(iter(spec.submodule_search_locations or ()), "Python itself")
