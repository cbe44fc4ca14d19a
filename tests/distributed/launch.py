"""The command line on one of several ranks, with a fault injected.

``kill:PHASE`` ends rank RANK by SIGKILL as it enters that phase of the probe (or ``sample``), ``raise:PHASE`` raises a
``RuntimeError`` there, ``refuse:PHASE`` a ``ValueError``; ``none`` does nothing.
"""

import json
import os
import signal
import socket
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import TCPStore

from entropy_probe.analyses import provenance
from entropy_probe.sampling import evaluation, hf
from tests.cli.conftest import command_line
from tests.processes import Process

__all__ = ["free_port", "on_processes", "rank_environment", "saved"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def rank_environment(size: int, store: TCPStore | None = None) -> list[dict[str, str]]:
    """What a launcher tells each of several ranks: also, as torchrun does, that it has a store for them."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if store is not None:
        common |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return [common | {"RANK": str(rank)} for rank in range(size)]


def on_processes(size: int, *arguments, fault: str = "none", rank: int = 0) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, standard output and standard error of the command line on each rank; nothing ends the others."""
    texts = [str(argument) for argument in arguments]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [Process(one_rank, fault, rank, *texts, **environment) for environment in rank_environment(size, store)]
    outputs = [process.communicate() for process in processes]
    return [p.returncode for p in processes], [out for out, _ in outputs], [err for _, err in outputs]


def saved(directory: Path) -> dict:
    """A result without what names its own directory."""
    found = json.loads((directory / "results.json").read_text())
    found["config"].pop("max_tokens_per_microbatch")
    return {key: value for key, value in found.items() if key not in ("timing", "memory")}


def one_rank(fault: str, rank: int, *arguments: str) -> None:
    """In a process of its own, which the fault may end."""
    how, _, where = fault.partition(":")

    def strike() -> None:
        if os.environ.get("RANK", "0") != str(rank):
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
    command_line(*arguments)
