"""Has the libraries loaded; each request is examined in forked processes that are watched from inside.

Request: ``checkpoint``, ``base`` (or null), ``cwd``, ``environment``, and ``also``, further commands. Answer, for
``load`` (the function), ``json`` (``inspect --json``) and each of ``also`` (``table`` is ``inspect``): ``status`` (of
``waitpid``), ``output`` (what the process reported), ``stderr``, ``stdout``, and ``acts``: files opened for writing,
files moved, processes started, connections made.
"""

from __future__ import annotations

import builtins
import gc
import io
import json
import os
import sys
import tempfile
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


def _in_fork(request: dict[str, Any], what: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        names = {name: Path(place) / name for name in ("stdout", "stderr", "answer")}
        child = os.fork()
        if child == 0:
            _be_child(request, what, names)
        _, status = os.waitpid(child, 0)
        texts = {name: path.read_text() if path.exists() else "" for name, path in names.items()}
    answer = json.loads(texts.pop("answer") or '{"output": null, "acts": []}')
    return {"status": status, **texts, **answer}


def _be_child(request: dict[str, Any], what: str, names: dict[str, Path]) -> None:
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(names[name], os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdin = _NoInput()
    builtins.input = _NoInput().read
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
    answer = os.open(names["answer"], os.O_WRONLY | os.O_CREAT)
    base = [] if request["base"] is None else ["--base-model", request["base"]]
    acts: list[str] = []
    _watch(acts)
    if what == "load":
        output = _load(request["checkpoint"], request["base"])
    elif what == "inspect":
        output = _command("inspect", request["checkpoint"], "--json", *base)
    else:
        output = _command({"table": "inspect"}.get(what, what), request["checkpoint"], *base)
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(answer, json.dumps({"output": output, "acts": acts}).encode())
    os._exit(0)


def serve(requests: Connection) -> None:
    """Answer until None is asked."""
    sys.dont_write_bytecode = True  # a module that a fork is the first to import would be a file it writes
    gc.collect()
    gc.freeze()  # what is here is not looked through in every fork
    while (request := requests.recv()) is not None:
        answers = {"load": _in_fork(request, "load"), "json": _in_fork(request, "inspect")}
        for what in request["also"]:
            answers[what] = _in_fork(request, what)
        requests.send(answers)
