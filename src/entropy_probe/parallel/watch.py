"""Processes that watch each other: when one fails or is killed, the others end within seconds and say why.

Every rank keeps a connection to rank 0. The operating system closes it when a process dies, however that happens, so
nothing has to be polled and a slow rank is never taken for a dead one.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
from typing import Any

__all__ = ["Watch"]

FAILURE = 1
GRACE_SECONDS = 3.0
"""What a process may take to end in good order once another has failed, as it does where it waits for that one and the
connection breaks; after that it is ended, whatever it does."""
JOIN_SECONDS = 120.0


class _Line:
    """One connection: objects as lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self._rest, self.finished = connection, b"", False
        self.early: list[dict[str, Any]] = []
        """Messages that came together with the first, by which the two sides met."""

    def send(self, **message: Any) -> None:
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:  # the other side is gone, which the receiving side notices
            return

    def receive(self) -> list[dict[str, Any]] | None:
        """Messages that have come; waits for some. ``None`` once the other side has closed."""
        try:
            data = self.socket.recv(65536)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


class Watch:
    """This rank's watch over the others.

    Args:
        rank: of this process.
        size: how many there are.
        host: where rank 0 can be reached.
        store: the process group's key-value store, by which ranks find rank 0.
    """

    def __init__(self, rank: int, size: int, host: str, store: Any) -> None:
        self.rank, self.size = rank, size
        self.outcome: tuple[str | None, int] | None = None
        """What another rank's end means here: what to say, if anything, and the exit code."""
        self.news = threading.Event()
        self._lock = threading.Lock()
        self._answered = threading.Event()
        self._lines = self._accept(store) if rank == 0 else {0: self._connect(host, store)}

    def start(self) -> None:
        """From now on this process ends when another fails."""
        threading.Thread(target=self._listen, daemon=True).start()

    def _accept(self, store: Any) -> dict[int, _Line]:
        listener = socket.create_server(("", 0), backlog=self.size)
        token, lines = secrets.token_hex(16), {}
        store.set("watch", json.dumps([listener.getsockname()[1], token]))
        listener.settimeout(JOIN_SECONDS)
        while len(lines) < self.size - 1:
            connection, _ = listener.accept()
            connection.settimeout(JOIN_SECONDS)
            line = _Line(connection)
            hello, *line.early = line.receive() or [{}]
            if hello.get("token") == token:
                lines[hello["rank"]] = line
                line.send(welcome=True)
            connection.settimeout(None)
        listener.close()
        return lines

    def _connect(self, host: str, store: Any) -> _Line:
        port, token = json.loads(store.get("watch"))
        line = _Line(socket.create_connection((host, port), timeout=JOIN_SECONDS))
        line.send(token=token, rank=self.rank)
        # until rank 0 has answered, what this rank says might be taken for part of its greeting
        welcome = line.receive()
        if not welcome:
            raise ConnectionError("rank 0 ended, or was not reached, while the ranks were joining")
        line.early = welcome[1:]
        line.socket.settimeout(None)
        return line

    def _listen(self) -> None:
        selector = selectors.DefaultSelector()
        for rank, line in self._lines.items():
            selector.register(line.socket, selectors.EVENT_READ, (rank, line))
            for message in line.early:
                self._take(line, message)
        while selector.get_map():
            for key, _ in selector.select():
                rank, line = key.data
                messages = line.receive()
                if messages is None:
                    selector.unregister(line.socket)
                    if not line.finished:
                        self._lost(rank)
                    continue
                for message in messages:
                    self._take(line, message)

    def _take(self, line: _Line, message: dict[str, Any]) -> None:
        if "finished" in message:
            line.finished = True
        elif "failed" in message:  # to rank 0: may the sender say why?
            with self._lock:  # whoever takes it first tells all the others, before this process can end
                first = self.outcome is None
                self.outcome = self.outcome or (None, message["failed"])
                line.finished = True
                line.send(**({"speak": True} if first else {"end": self.exit_code}))
                if first:
                    self._spread(end=message["failed"])
            if first:
                self._settled()
        elif "speak" in message:
            self._answered.set()
        elif "lost" in message:
            self._settle(_lost(message["lost"]), FAILURE)
        elif "end" in message:
            self._settle(None, message["end"])

    def _lost(self, rank: int) -> None:
        with self._lock:
            if self.rank == 0 and self.outcome is None:
                self._spread(lost=rank)
        self._settle(_lost(rank), FAILURE)

    def _spread(self, **message: Any) -> None:
        """From rank 0 to all that have not ended."""
        for line in self._lines.values():
            if not line.finished:
                line.send(**message)

    def _settle(self, text: str | None, code: int) -> None:
        """Take note of the first failure, and see to it that this process ends."""
        with self._lock:
            first = self.outcome is None
            self.outcome = self.outcome or (text, code)
        if first:
            self._settled()

    def _settled(self) -> None:
        self.news.set()
        self._answered.set()
        threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        threading.Event().wait(GRACE_SECONDS)
        self.say()
        os._exit(self.exit_code)

    @property
    def exit_code(self) -> int:
        """Of this process, once another has failed."""
        return FAILURE if self.outcome is None else self.outcome[1]

    def say(self) -> None:
        """Write why this process ends on stderr, once, if it is not said elsewhere."""
        with self._lock:
            text = None if self.outcome is None else self.outcome[0]
            if self.outcome is not None:
                self.outcome = (None, self.outcome[1])
        if text is not None:
            sys.stderr.write(f"error: {text}\n")
            sys.stderr.flush()

    def failed(self, error: BaseException, code: int) -> bool:
        """This process ends with an error; whether it is the first, which says why.

        A failure that follows from another's end, such as a broken connection, is not.
        """
        if isinstance(error, RuntimeError):
            self.news.wait(2.0)
        with self._lock:
            if self.outcome is not None:
                return False
            if self.rank == 0:
                self.outcome = (None, code)
                self._spread(end=code)
                return True
        self._lines[0].send(failed=code)
        self._answered.wait(GRACE_SECONDS)
        return self.outcome is None

    def finished(self) -> None:
        """This process ends as it should, and so do the others."""
        for line in self._lines.values():
            line.send(finished=True)


def _lost(rank: int) -> str:
    return (
        f"rank {rank} ended without saying why (killed, perhaps for memory); give the same command again: sampling "
        "goes on where it was"
    )
