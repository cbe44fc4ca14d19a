"""How failures look: one line on stderr and an exit code, the traceback on request."""

from __future__ import annotations

import os
import sys
import threading
from traceback import extract_tb
from types import TracebackType
from typing import Any, NoReturn

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from entropy_probe.report.text import printable
from entropy_probe.results.record import FULL, file_error

DEBUG_VARIABLE = "ENTROPY_PROBE_DEBUG"
BAD_INPUT = 2
FAILURE = 1
INTERRUPTED = 130
"""As of a process that SIGINT ended."""

# Typer carries its own click in some versions and imports it in others; this is click's UsageError in both.
_UsageError: Any = typer.BadParameter.__base__

_SHOWN = 100
"""Characters of a value that are shown."""


class ErrorsAsLines(TyperGroup):
    """A command group whose bad input ends in one line on stderr and exit code 2."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Parse and run; with ``standalone_mode`` off, errors propagate as they are."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except _UsageError as error:
            command = error.ctx.command_path if error.ctx else self.name
            _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`", error)
        except ValueError as error:
            _fail(describe(error), error)
        except OSError as error:
            if error.errno is None or isinstance(error, ConnectionError):
                raise
            _fail(file_error(error), error, FAILURE if error.filename is None or error.errno in FULL else BAD_INPUT)
        sys.exit(code or 0)

    def invoke(self, ctx: Any) -> Any:
        """Run a command, which says how it ends by returning or by an error of its own.

        An interrupt ends in one line that says what is kept, and how to go on.

        Raises:
            RuntimeError: if something that it calls asks for the process to end, as a reward's code may.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            kept = "; ".join(getattr(error, "__notes__", ())) or "nothing is kept, the same command starts afresh"
            sys.stderr.write(f"interrupted: {printable(kept)}\n")
            sys.exit(INTERRUPTED)
        except SystemExit as error:
            if isinstance(error.__context__, BrokenPipeError):  # as rich ends where nobody reads on: ... | head
                raise
            place = extract_tb(error.__traceback__)[-1]
            raise RuntimeError(
                f"expected the code that the config names to return, got sys.exit({error.code!r}) in {place.filename}, "
                f"line {place.lineno}; correct it"
            ) from error


def describe(error: BaseException) -> str:
    """An error as one line; of several validation errors the first, and how many more there are."""
    if isinstance(error, ValidationError):
        return describe_validation(error)
    notes = getattr(error, "__notes__", ())
    return " ".join("; ".join([str(error) or type(error).__name__, *notes]).split())


def describe_validation(error: ValidationError) -> str:
    """The first of pydantic's errors as ``key: problem, got value (and N more)``."""
    problems = error.errors()
    first = problems[0]
    key = ".".join(f"{part!s:.{_SHOWN}}" for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if first["type"] == "missing":
        message = "required, but missing"
    elif first["type"] not in ("value_error", "extra_forbidden"):
        message = f"{message[0].lower()}{message[1:]}, got {first['input']!r:.{_SHOWN}}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return " ".join(f"{key}: {message}{more}".removeprefix(": ").split())


def leave_threads(code: object) -> None:
    """End a process that has failed, where threads of others, such as a reward's, would keep it."""
    own = (threading.main_thread(), threading.current_thread())
    if code and any(thread not in own and not thread.daemon for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else FAILURE)


def one_line_excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """A ``sys.excepthook`` for failures that are not bad input: a short line, or the traceback on request."""
    if os.environ.get(DEBUG_VARIABLE):
        sys.__excepthook__(kind, error, traceback)
        return
    remedy = f"set {DEBUG_VARIABLE}=1 to see the traceback"
    sys.stderr.write(f"error: {kind.__name__}: {printable(describe(error))}; {remedy}\n")
    leave_threads(FAILURE)


def _fail(message: str, error: BaseException, code: int = BAD_INPUT) -> NoReturn:
    if os.environ.get(DEBUG_VARIABLE):
        sys.__excepthook__(type(error), error, error.__traceback__)
    sys.stderr.write(f"error: {printable(message)}\n")
    sys.exit(code)
