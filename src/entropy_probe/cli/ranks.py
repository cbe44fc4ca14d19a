"""One command in several processes: ``torchrun`` and ``accelerate launch`` start the same command on every rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from entropy_probe.cli.errors import BAD_INPUT, FAILURE

if TYPE_CHECKING:
    from entropy_probe.parallel.ranks import Ranks

__all__ = ["launched_ranks"]


@contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """The ranks that a launcher started (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``), or this process.

    An error on one rank ends all of them within seconds, and one of them says it; so does the end of a process.
    """
    from entropy_probe.parallel.ranks import ALONE, join_ranks, leave_ranks
    from entropy_probe.parallel.watch import Watch

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    ranks, store = join_ranks()
    watch = Watch(ranks.rank, ranks.size, os.environ["MASTER_ADDR"], store)
    try:
        watch.start()
        yield ranks
        ranks.gather(None)  # nobody leaves before all are done
        watch.finished()
        leave_ranks()
        # at once: torch keeps groups of a sharded model alive, and their threads may abort an exit in good order
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    except BaseException as error:
        if watch.failed(error, BAD_INPUT if isinstance(error, ValueError) else FAILURE):
            raise
        watch.say()
        sys.stdout.flush()
        os._exit(watch.exit_code)  # at once: ending in good order waits for the ranks that are gone
