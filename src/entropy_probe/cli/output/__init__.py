"""The directory that ``run``, ``validate`` and ``sweep`` write, and go on in after an interruption.

One process at a time works in it (``lock``). Every file appears whole, in this order:

1. ``inputs.json``: what is computed, by content (``inputs``); then ``config.yaml``, the resolved settings.
2. What a pilot said, in ``inputs.json``; sampled batches, each recorded there with its hash once it is there;
   ``evaluation/`` holds the shards of the evaluation batch while it is sampled.
3. The points of a sweep; the tables of an attribution; answers to questions; copies of given batches.
4. The result: ``results.json``, which ``validate`` follows by its steps (``halves/``, until it is done) and
   ``validation.json``, or ``sweep.json``. Where it is, everything above it is.
5. Figures and ``report.html``, drawn from the rest; missing ones are drawn again.

The same command resumes what is unfinished and shows what is finished. Other inputs are refused in a line that names
what differs. ``--overwrite`` deletes what these commands wrote, nothing else, and starts afresh; files with their names
that none of them wrote are never replaced. Nothing is written or deleted before the checkpoint is loaded, and after an
error nothing is left unless something was sampled or measured.
"""

from __future__ import annotations

from entropy_probe.cli.output.directory import (
    ANSWERS,
    CONFIG_FILE,
    FIGURES,
    HALVES,
    POINTS,
    Output,
    check_new,
    clear,
    is_ours,
    open_output,
    say,
    unfinished,
)
from entropy_probe.cli.output.inputs import Batch, Pilot
from entropy_probe.cli.output.lock import locked

__all__ = [
    "ANSWERS",
    "CONFIG_FILE",
    "FIGURES",
    "HALVES",
    "POINTS",
    "Batch",
    "Output",
    "Pilot",
    "check_new",
    "clear",
    "is_ours",
    "locked",
    "open_output",
    "say",
    "unfinished",
]
