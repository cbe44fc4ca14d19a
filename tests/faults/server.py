"""Has loaded a checkpoint once; then each request is examined in a forked process that is watched from inside.

Request: ``checkpoint``, ``base`` (or null), ``cwd``, ``environment``, and ``also``, further commands. Answer, for
``load`` (the function), ``json`` (``inspect --json``) and each of ``also`` (``table`` is ``inspect``): ``status`` (of
``waitpid``, the same for all), ``output`` (what was reported), ``stderr``, ``stdout``, and ``acts``: files opened for
writing, files moved, processes started, connections made.
"""

from __future__ import annotations

import builtins
import gc
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import entropy_probe.cli
import entropy_probe.cli.inspect
from entropy_probe.checkpoints import load as hf_trainer

WATCHED = (
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"),
    *("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "shutil.rmtree"),
)


class _NoInput(io.TextIOBase):
    """Standard input that ends the process when anything asks it a question."""

    def read(self, *_: Any) -> str:
        os._exit(99)

    readline = read


def _watch(acts: list[str]) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if isinstance(path, str | bytes) and writes and os.fsdecode(path) != os.devnull:
                acts.append(f"open {os.fsdecode(path)}")
        elif event in WATCHED:
            acts.append(f"{event} {arguments[0] if arguments else ''}")

    sys.addaudithook(hook)


def _load(checkpoint: str, base: str | None) -> dict[str, Any]:
    try:
        state = hf_trainer.load_checkpoint(checkpoint, base)
    except ValueError as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return {"error": kinds, "message": str(error)}
    finite = all(bool(torch.isfinite(p).all()) for p in state.model.parameters())
    return {"error": None, "report": state.report.model_dump(mode="json"), "finite": finite}


def _command(*arguments: str) -> dict[str, Any]:
    sys.argv = ["entropy-probe", *arguments]
    entropy_probe.cli.leave_threads = lambda code: None  # the answer is still to be written
    try:
        entropy_probe.cli.main()
    except SystemExit as end:
        return {"exit": end.code}
    return {"exit": 0}


def _in_fork(request: dict[str, Any]) -> dict[str, dict[str, Any]]:
    asked = ("load", "json", *request["also"])
    with tempfile.TemporaryDirectory() as place:
        child = os.fork()
        if child == 0:
            _be_child(request, asked, Path(place))
        _, status = os.waitpid(child, 0)
        return {what: {"status": status, **_answer(Path(place), what)} for what in asked}


def _answer(place: Path, what: str) -> dict[str, Any]:
    paths = {name: place / f"{what}.{name}" for name in ("stdout", "stderr", "answer")}
    texts = {name: path.read_text() if path.exists() else "" for name, path in paths.items()}
    return texts | json.loads(texts.pop("answer") or '{"output": null, "acts": []}')


def _be_child(request: dict[str, Any], asked: Iterable[str], place: Path) -> None:
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = _NoInput()
    builtins.input = _NoInput().read
    given = [request["checkpoint"], *([] if request["base"] is None else ["--base-model", request["base"]])]
    acts: list[str] = []
    _watch(acts)
    for what in asked:
        outputs = [
            os.open(place / f"{what}.{name}", os.O_WRONLY | os.O_CREAT) for name in ("stdout", "stderr", "answer")
        ]
        for descriptor in (1, 2):
            os.dup2(outputs[descriptor - 1], descriptor)
        sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
        acts.clear()
        if what == "load":
            output = _load(request["checkpoint"], request["base"])
        else:
            command = {"json": ("inspect", "--json"), "table": ("inspect",)}.get(what, (what,))
            output = _command(*command, *given)
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(outputs[2], json.dumps({"output": output, "acts": acts}).encode())
    os._exit(0)


def serve(requests: Connection, checkpoint: str, base: str) -> None:
    """Answer until None is asked; ``checkpoint`` and ``base`` are intact, and loaded so that no fork is the first."""
    sys.dont_write_bytecode = True  # a module that a fork is the first to import would be a file it writes
    _load(checkpoint, base)
    _command("inspect", checkpoint, "--base-model", base)
    gc.collect()
    gc.freeze()  # what is here is not looked through in every fork
    while (request := requests.recv()) is not None:
        requests.send(_in_fork(request))
