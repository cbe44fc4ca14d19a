"""Processes that import nothing: forks of one that has loaded the libraries and computed nothing.

A new interpreter spends seconds on imports before a command begins. These begin at once, and are processes all the
same: with an environment, an output and an end of their own, to be killed, waited for, or made ranks of.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Process", "run_all"]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "tests.preloaded"])


class Process:
    """``work(*arguments)`` in a process of its own; ``work`` is importable. As much of ``Popen`` as tests need."""

    def __init__(self, work: Callable[..., Any], *arguments: Any, **environment: str) -> None:
        self._place = tempfile.TemporaryDirectory()
        arguments = (work, arguments, environment, self._place.name)
        # one that a failed test leaves behind ends with this process
        self._process = FORKS.Process(target=_run, args=arguments, daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._process.kill()

    def communicate(self, timeout: float | None = 240) -> tuple[str, str]:
        """Wait for the end; what it wrote to its standard output and standard error."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "the process hangs"
        # what a process was killed before it made is empty
        paths = [Path(self._place.name) / name for name in ("stdout", "stderr")]
        stdout, stderr = (path.read_text() if path.exists() else "" for path in paths)
        self._place.cleanup()
        return stdout, stderr

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode


def run_all(*processes: Process) -> list[str]:
    """Wait for processes that must succeed; their standard output."""
    ended = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), [stderr for _, stderr in ended]
    return [stdout for stdout, _ in ended]


def _run(work: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], place: str) -> None:
    assert "transformers" in sys.modules, "tests.preloaded was not loaded where processes are forked from"
    os.environ.update(environment)
    os.fsync = lambda descriptor: None  # it may be killed, but the power stays
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(place) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    try:
        work(*arguments)
    except Exception:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.exit(1)
