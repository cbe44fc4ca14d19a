"""One command in several processes: ``torchrun`` and ``accelerate launch`` start the same command on every rank."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from entropy_probe.cli.errors import BAD_INPUT, FAILURE

if TYPE_CHECKING:
    from entropy_probe.parallel.ranks import Ranks

SECONDS_TO_SPEAK = 1.0
"""What a rank that follows leaves the first to say its error."""
LOST = (
    "another rank ended without saying why (killed, perhaps for memory); give the same command again: sampling resumes "
    "where it was"
)


@contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """The ranks that a launcher started (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``), or this process.

    When a rank fails or is killed, the launcher ends the others, and their next exchange with it fails. The rank that
    fails first says why; the others end with its exit code and say nothing.
    """
    from entropy_probe.parallel.ranks import ALONE, first_to_fail, is_lost_rank, join_ranks, leave_ranks

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    ranks, store = join_ranks()
    code = 0
    try:
        yield ranks
        ranks.gather(None)  # nobody leaves before all are done
        leave_ranks()
    except BaseException as error:
        first, code = first_to_fail(store, ranks.rank, BAD_INPUT if isinstance(error, ValueError) else FAILURE)
        if first != ranks.rank:
            time.sleep(SECONDS_TO_SPEAK)  # the launcher ends all ranks when this one has ended
        elif not is_lost_rank(error):
            raise
        else:
            sys.stderr.write(f"error: {LOST}\n")
    # at once: ending in good order waits for ranks that are gone, and torch keeps the groups of a sharded model alive,
    # whose threads may abort it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
