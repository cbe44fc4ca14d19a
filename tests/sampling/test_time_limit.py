"""A reward that hangs, in whatever way, ends within its time limit."""

from __future__ import annotations

import asyncio
import re
import signal
import threading
import time

import pytest

from entropy_probe.sampling import Prompt, score_responses
from entropy_probe.sampling.reward_calls import RewardFunction
from entropy_probe.sampling.rewards import Rewards

LONG = 60.0


def loops(responses):
    while True:
        pass


def catches_errors(responses):
    while True:
        try:
            time.sleep(LONG)
        except Exception:
            return [0.0] * len(responses)


def catches_all(responses):
    for _ in range(2):
        try:
            time.sleep(LONG)
        except:  # noqa: E722
            continue
    return [0.0] * len(responses)


def raises_another(responses):
    try:
        time.sleep(LONG)
    except BaseException as error:
        raise KeyError("other") from error


def matches(responses):
    return [float(bool(re.match(r"(a+)+$", "a" * 40 + "b"))) for _ in responses]


async def blocks(responses):
    time.sleep(LONG)


async def awaits(responses):
    await asyncio.sleep(LONG)


def waits(responses):
    threading.Event().wait()


def has_an_alarm_of_its_own(responses):
    """As Math-Verify's time limits, which leave no timer behind."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(3)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    time.sleep(LONG)


def scored(function, limit):
    rewards = Rewards((RewardFunction.of("mine", function),), (1.0,), time_limit=limit)
    return score_responses(rewards, [Prompt(0, "1"), Prompt(1, "2")], ["a", "bb"])


HANGING = [
    loops, catches_errors, catches_all, raises_another, matches, blocks, awaits, waits, has_an_alarm_of_its_own,
]  # fmt: skip


@pytest.mark.parametrize("function", HANGING, ids=lambda function: function.__name__)
def test_what_hangs_is_one_line(function, monkeypatch):
    monkeypatch.setattr("entropy_probe.sampling.time_limit.AGAIN", 0.02)
    before, threads = signal.getsignal(signal.SIGALRM), threading.active_count()
    with pytest.raises(
        ValueError, match=r"^reward mine: expected an end within 0\.03 seconds .*, got none; correct it"
    ):
        scored(function, 0.03)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert threading.active_count() <= threads + 1  # the one that cannot be ended


def test_what_ends_in_time_is_left_alone():
    def counts(responses):
        return [float(len(response)) for response in responses]

    def fails(responses):
        raise KeyError("mine")

    assert scored(counts, 60.0).tolist() == scored(counts, None).tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="raised KeyError: 'mine'"):
        scored(fails, 60.0)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_outside_the_main_thread_a_limit_is_refused():
    errors = []

    def run():
        try:
            scored(loops, 1.0)
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "expected the main thread of a Unix process for reward_time_limit" in errors[0]
