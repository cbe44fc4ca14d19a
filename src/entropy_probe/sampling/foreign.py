"""Functions that a config names: imported and called so that whatever they raise becomes one line."""

from __future__ import annotations

import importlib
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("site-packages", sysconfig.get_paths()["stdlib"], str(Path(__file__).parents[1]))


def split_path(path: str, what: str) -> tuple[str, str]:
    """Module and function of ``package.module:function``, neither of which need exist."""
    module_name, _, name = path.rpartition(":")
    if module_name.endswith(".py") or "/" in module_name:
        file = Path(module_name)
        raise ValueError(
            f"{what}: expected package.module:function, got the file {path!r}; set PYTHONPATH={file.parent} and write "
            f"{file.stem}:{name}"
        )
    if not module_name or not name or module_name.startswith("."):
        raise ValueError(f"{what}: expected package.module:function, got {path!r}; name the module and the function")
    return module_name, name


def import_function(path: str, what: str) -> Callable[..., Any]:
    """The function named by ``package.module:function``; ``function`` may be dotted. ``what`` is the setting with it.

    Raises:
        ValueError: if the path is malformed, or the module or the function does not exist or raises an error.
    """
    module_name, name = split_path(path, what)
    try:
        with _torch_left_alone():
            target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{what}: cannot import {path!r} ({error}); install it or set PYTHONPATH") from error
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        raise ValueError(
            f"{what}: cannot import {path!r}: {type(error).__name__}: {error}{_place(error)}; correct the module"
        ) from error
    for part in name.split("."):
        target = getattr(target, part, None)
    if not callable(target):  # not its value, which may be anything that the process knows
        got = "None" if target is None else f"an object of type {type(target).__name__}"
        raise ValueError(f"{what}: expected a function {name!r} in module {module_name}, got {got}; correct it")
    return target


def call(what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that is not ours; ``what`` it is and how it is called is for the error message.

    Raises:
        ValueError: if it raises anything; says what and where.
    """
    try:
        with _torch_left_alone():
            return function(*args, **kwargs)
    except (Exception, SystemExit) as error:  # it may raise anything, and ``sys.exit()`` would end the run as if well
        said = f"{type(error).__name__}: {error}{_place(error)}"
        raise ValueError(f"{what}: raised {said}; correct it or what it is given") from error


@contextmanager
def _torch_left_alone() -> Iterator[None]:
    """Puts back what code of others switches for all: scripts of reward models turn gradients off when imported."""
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)


def _place(error: BaseException) -> str:
    """Where an error was raised, as `` (file.py:12)``: in the last file that is no library's, if there is one."""
    if isinstance(error, SyntaxError):
        return ""  # its message says so
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [frame for frame in frames if not any(folder in frame.filename for folder in _LIBRARIES)]
    return "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in (own or frames)[-1:])
