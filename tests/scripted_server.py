"""A server on loopback that answers as vLLM 0.32 does, with a policy of the test and the faults that it asks for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from entropy_probe.sampling import Completion, HFGenerator, SamplingParameters

__all__ = ["NAME", "Draw", "ScriptedServer", "draws_of", "serving"]

NAME = "policy"
Reply = tuple[int, bytes]
Draw = Callable[[tuple[int, ...], SamplingParameters, int], Completion]


def draws_of(engine: HFGenerator) -> Draw:
    """What an engine draws of one prompt with one seed, each of them once."""
    lock = threading.Lock()

    @cache
    def drawn(prompt: tuple[int, ...], parameters: SamplingParameters, seed: int) -> Completion:
        with lock:
            return engine.generate([prompt], parameters, [seed])[0]

    return drawn


class ScriptedServer:
    """What the server has and does.

    Attributes:
        requests: the bodies of the completions asked for, in order.
        loaded: the bodies of the adapters that it was told to load.
        models: what it says of the models that it has.
        before: called with a request; changes what is sampled.
        after: called with a request and its answer; changes what is said.
        instead: called with the route; a reply that takes the place of the answer, if there is one.
        key: what it asks for, and gives back in its answer to anything else.
        short: bytes that are missing at the end of a reply, by the number of the request.
    """

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.requests: list[dict[str, Any]] = []
        self.loaded: list[dict[str, Any]] = []
        self.models: list[dict[str, Any]] = [{"id": NAME, "root": "x", "parent": None, "max_model_len": 256}]
        self.before: Callable[[dict[str, Any]], dict[str, Any]] = lambda request: request
        self.after: Callable[[dict[str, Any], dict[str, Any]], Any] = lambda request, answer: answer
        self.instead: Callable[[str], Reply | None] = lambda route: None
        self.key: str | None = None
        self.short: dict[int, int] = {}
        self.url = ""

    def reply(self, route: str, body: dict[str, Any]) -> Reply:
        """The status and the body of an answer."""
        if (reply := self.instead(route)) is not None:
            return reply
        if route == "/v1/models":
            return 200, json.dumps({"object": "list", "data": self.models}).encode()
        if route == "/v1/load_lora_adapter":
            self.loaded.append(body)
            self.models.append({"id": body["lora_name"], "root": body["lora_path"], "parent": NAME})
            return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully.".encode()
        assert route == "/v1/completions"
        self.requests.append(body)
        if body["model"] not in [model["id"] for model in self.models]:
            said = {"message": f"The model `{body['model']}` does not exist.", "type": "NotFoundError", "code": 404}
            return 404, json.dumps({"error": said}).encode()
        return 200, json.dumps(self.after(body, self.answer(body))).encode()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completion in vLLM's form."""
        asked = self.before(body)
        parameters = SamplingParameters(asked["temperature"], asked["max_tokens"])
        drawn = self.draw(tuple(asked["prompt"]), parameters, asked["seed"])
        tops = [{"likeliest": -0.5 / asked["temperature"]} for _ in drawn.token_ids]
        choice = {
            "index": 0,
            "text": "?",
            "logprobs": {"token_logprobs": list(drawn.logprobs or ()), "tokens": [], "top_logprobs": tops},
            "finish_reason": "length" if drawn.truncated else "stop",
            "stop_reason": None,
            "token_ids": list(drawn.token_ids),
            "prompt_token_ids": body["prompt"],
        }
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}


@contextmanager
def serving(draw: Draw) -> Iterator[ScriptedServer]:
    """A server while a test runs."""
    script = ScriptedServer(draw)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer({})

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body: dict[str, Any]) -> None:
            given = self.headers.get("Authorization")
            if script.key is not None and given != f"Bearer {script.key}":
                status, content = 401, f"Incorrect API key provided: {given}".encode()
            else:
                status, content = script.reply(self.path, body)
            missing = script.short.pop(len(script.requests), 0)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) - missing])
            self.close_connection = missing > 0

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        script.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join()
