"""The command line on one of several ranks, with a fault injected: ``launch.py FAULT RANK ARGUMENTS...``.

``kill:PHASE`` ends rank RANK by SIGKILL as it enters that phase of the probe (or ``sample``), ``raise:PHASE`` raises a
``RuntimeError`` there, ``refuse:PHASE`` a ``ValueError``; ``none`` does nothing.
"""

import os
import signal
import sys
from contextlib import contextmanager

from entropy_probe import provenance
from entropy_probe.cli import main
from entropy_probe.sampling import evaluation, hf

fault, rank, *arguments = sys.argv[1:]
how, _, where = fault.partition(":")


def strike() -> None:
    if os.environ.get("RANK", "0") != rank:
        return
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {"raise": RuntimeError, "refuse": ValueError}[how](f"struck in {where}")


original_phase, original_generate = provenance.Clock.phase, hf.HFGenerator.generate
generated = []


@contextmanager
def phase(self, name):
    with original_phase(self, name) as progress:
        if name == where:
            strike()
        yield progress


def generate(self, *args, **kwargs):
    found = original_generate(self, *args, **kwargs)
    generated.append(len(found))
    if where == "second shard" and len(generated) == 3:  # after the update batch and the first shard
        strike()
    return found


provenance.Clock.phase = phase
hf.HFGenerator.generate = generate
if where == "second shard":
    evaluation.SHARD_SEQUENCES = 12
sys.argv = ["entropy-probe", *arguments]
main()
