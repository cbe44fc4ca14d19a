"""A server that examines checkpoints in forked processes of its own."""

from __future__ import annotations

from multiprocessing import Pipe
from typing import Any

import pytest

from tests.faults.server import serve
from tests.processes import Process


@pytest.fixture(scope="session")
def examine(tmp_path_factory, runs):
    """Ask the server to load and inspect a checkpoint; see ``tests/faults/server.py`` for the answer."""
    home = str(tmp_path_factory.mktemp("home"))
    asking, answering = Pipe()
    whole = runs("lora")
    intact = (str(whole.checkpoint(3)), str(whole.directory / "base"))
    server = Process(serve, answering, *intact, HOME=home, HF_HOME=home, COLUMNS="300")
    answering.close()

    def ask(**request: Any) -> dict[str, Any]:
        asking.send(request)
        return asking.recv()

    yield ask
    asking.send(None)
    server.communicate()
    assert server.returncode == 0
