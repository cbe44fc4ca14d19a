"""A time limit on code that is not ours, whatever it waits for: in Python, in a system call or in a regular expression.

A signal interrupts it. It is sent by a timer, which needs no thread of Python to run, and by a thread, which a timer of
that code's own does not take the place of.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

AGAIN = 1.0
"""Seconds after which code that caught the interruption is interrupted again."""


class _TimeIsUp(BaseException):
    """Not an ``Exception``, which that code may catch."""


@contextmanager
def time_limit(seconds: float | None, what: str) -> Iterator[None]:
    """Interrupt what is done within the context after a time; ``what`` it is is for the message.

    Threads that it started go on; they end with the process if they are daemons.

    Raises:
        ValueError: if it takes longer, even if it returned in the end; or there are no signals here to interrupt it by.
    """
    if seconds is None:
        yield
        return
    main = threading.main_thread()
    if not hasattr(signal, "setitimer") or threading.current_thread() is not main or main.ident is None:
        raise ValueError(
            f"{what}: expected the main thread of a Unix process for reward_time_limit, got another; leave it out"
        )
    to = main.ident
    interrupted: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        interrupted.append(number)
        raise _TimeIsUp

    done = threading.Event()

    def insist() -> None:
        wait = seconds
        while not done.wait(wait):
            signal.pthread_kill(to, signal.SIGALRM)
            wait = AGAIN

    before = signal.signal(signal.SIGALRM, interrupt)
    thread = threading.Thread(target=insist, daemon=True)
    try:
        thread.start()
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
        yield
    except BaseException:
        if not interrupted:
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        done.set()
        thread.join()
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
    if interrupted:
        raise ValueError(
            f"{what}: expected an end within {seconds:g} seconds (reward_time_limit), got none; correct it, or raise "
            "the limit"
        )
