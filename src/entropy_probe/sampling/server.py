"""Sampling by a server of vLLM over HTTP: token ids in, token ids and their log-probabilities out.

Every setting of a request is stated, so that none is left to the server's defaults, and whatever a server can be seen
to do otherwise is an error: another model's answer, a seed without effect, log-probabilities before the temperature,
responses that end where the policy's do not. What an answer does not show, other weights or logits that were changed,
moves the surprisal of the tokens or the log-probabilities, and every batch is checked for that against the policy.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from entropy_probe.results.note import Note
from entropy_probe.sampling.engine import (
    ENGINES,
    Agreed,
    Completion,
    GenerationSettings,
    Progress,
    SamplingParameters,
    ServerSettings,
)
from entropy_probe.sampling.hf import end_tokens

BUSY = (
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
UNKNOWN = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
BACKOFF, LONGEST_WAIT = 0.5, 30.0
"""Seconds before a request is repeated: doubled each time, up to the longest."""
FIRST_RETRIES = 3
"""Of the first request, which tells whether there is a server at all."""
CONNECT = 10.0
"""Seconds to wait for a connection."""
TRIED = 4
"""Sequences whose seeds are tried, and the tokens of each: equal by chance where the policy leaves no choice."""
TRIED_TOKENS = 32
BY_CHANCE = 1e-6
"""Responses to other seeds that are equal with less than this probability are equal because of the server."""
ROUNDING = 1e-4
"""By which a log-probability may be above 0, or two of them differ that are the same, in nats."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

T = TypeVar("T", bound=BaseModel)


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class _Model(_Answer):
    id: str
    parent: str | None = None
    max_model_len: int | None = None


class _Models(_Answer):
    data: Annotated[list[_Model], Field(min_length=1)]


class _Logprobs(_Answer):
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(_Answer):
    prompt_token_ids: list[int]
    token_ids: Annotated[list[int], Field(min_length=1)]
    logprobs: _Logprobs
    finish_reason: Literal["stop", "length"]


class _Completions(_Answer):
    model: str
    choices: Annotated[list[_Choice], Field(min_length=1, max_length=1)]


@dataclass(frozen=True)
class _Served:
    """The policy on the server: its name there, and the most tokens of a sequence."""

    name: str
    context_length: int | None


@final
class ServerEngine:
    """Samples with a model that a server of vLLM has.

    The server is asked when something is to be sampled: for the models that it has, then, once, whether equal seeds
    give equal tokens and others do not, and whether log-probabilities are those after the temperature. Each sequence
    is a request of its own, with its own seed.

    Args:
        settings: where the server is and what it serves.
        end_tokens: the tokens that end a response of the policy.
        at_once: requests at a time.

    Raises:
        ValueError: if the adapter is not a directory of one, or the key is not there.
    """

    notes: tuple[Note, ...] = ()

    def __init__(self, settings: ServerSettings, end_tokens: Sequence[int], at_once: int = 64) -> None:
        self._settings, self._end_tokens, self._at_once = settings, frozenset(end_tokens), at_once
        self._adapter = None if settings.adapter is None else _adapter_name(settings.adapter)
        self._key = None if settings.api_key_env is None else _key_in(settings.api_key_env)
        self._checked: set[float] = set()

    @property
    def context_length(self) -> int | None:
        """The server's own bound (``max_model_len``)."""
        return self._served.context_length

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: SamplingParameters,
        seeds: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Sample one response to each prompt; see :class:`~entropy_probe.sampling.engine.Engine`.

        Raises:
            ValueError: if the server cannot be reached, does not serve the policy, or does otherwise than it is asked.
        """
        if prompts and parameters.temperature not in self._checked:
            _ = self._served  # once, before there are threads
            self._check_logprobs(prompts[0], parameters)
            self._check_seeds(prompts, parameters, seeds)
            self._checked.add(parameters.temperature)
        return self._sample(prompts, parameters, seeds, progress)

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: SamplingParameters,
        seeds: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Completion]:
        threads = ThreadPoolExecutor(self._at_once)
        try:
            each = zip(prompts, seeds, strict=True)
            answers = [threads.submit(self._respond, prompt, parameters, seed) for prompt, seed in each]
            for done, answer in enumerate(as_completed(answers), 1):
                answer.result()
                if progress is not None:
                    progress(done, len(prompts))
        except BaseException as error:
            # a user who interrupts does not wait for what has been asked for
            threads.shutdown(wait=isinstance(error, ValueError), cancel_futures=True)
            raise
        threads.shutdown()
        return [answer.result() for answer in answers]

    def _respond(self, prompt: Sequence[int], parameters: SamplingParameters, seed: int) -> Completion:
        choice = self._ask_for(prompt, parameters, seed)
        ids, logprobs, last = tuple(choice.token_ids), tuple(choice.logprobs.token_logprobs), choice.token_ids[-1]
        longest = parameters.max_completion_length
        early = next((token for token in ids[:-1] if token in self._end_tokens), None)
        if early is not None:
            self._refuse(f"responses to end with the policy's end token {early}, got one that goes on after it",
                         "start the server without ignore_eos")  # fmt: skip
        if last not in self._end_tokens and len(ids) < longest:
            self._refuse(
                f"responses that end with token {' or '.join(map(str, sorted(self._end_tokens)))} or after {longest} "
                f"tokens, got one that ends with token {last} after {len(ids)} ({choice.finish_reason})",
                "start the server with --generation-config vllm, and with room for the prompt and the response",
            )
        if max(logprobs, default=0.0) > ROUNDING:
            self._refuse(f"log-probabilities of at most 0, got {max(logprobs):g}", "use a server of vLLM")
        return Completion(tuple(choice.prompt_token_ids), ids, last not in self._end_tokens, logprobs)

    def _ask_for(self, prompt: Sequence[int], parameters: SamplingParameters, seed: int, top: int = 0) -> _Choice:
        """A response, with the log-probabilities of its tokens and of the ``top`` likeliest in their place."""
        name = self._served.name
        request = {
            "model": name,
            "prompt": list(prompt),
            "seed": seed,
            "temperature": parameters.temperature,
            "max_tokens": parameters.max_completion_length,
            "stop_token_ids": sorted(self._end_tokens),
            "logprobs": top,
            "return_token_ids": True,
            # whatever else shapes a distribution, off: what is left out is the server's or its model's to say
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "watermarking": False,
            "ignore_eos": False,
            "min_tokens": 0,
            "n": 1,
            "stop": [],
            "stream": False,
        }
        answer = self._parse(_Completions, self._ask("POST", "/v1/completions", request))
        if answer.model != name:
            self._refuse(f"an answer of model {name!r}, got one of {answer.model!r}", "set generation.server.model")
        return answer.choices[0]

    @cached_property
    def _served(self) -> _Served:
        """What to ask for, by the models that the server says it has; an adapter is loaded."""
        models = self._parse(_Models, self._ask("GET", "/v1/models", first=True)).data
        by_name = {model.id: model for model in models}
        bases = [model.id for model in models if model.parent is None]
        name = self._settings.model
        if name is None and self._adapter in by_name:
            name = self._adapter
        if name is None and len(bases) == 1:
            name = bases[0]
        if name is None or name not in by_name:
            asked = "one model" if name is None else f"model {name!r}"
            self._refuse(f"{asked}, got {', '.join(map(repr, by_name))}", "set generation.server.model to one of them")
        model = by_name[name]
        context = by_name.get(model.parent or "", model).max_model_len or model.max_model_len
        if self._adapter is None or self._adapter == name:
            return _Served(name, context)
        if self._adapter not in by_name:
            assert self._settings.adapter is not None
            where = str(self._settings.adapter.absolute())
            # in place of an equal one, so that a repeated request does no harm
            request = {"lora_name": self._adapter, "lora_path": where, "load_inplace": True}
            self._ask("POST", "/v1/load_lora_adapter", request, remedy=(
                f"start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, where it can read {where}"
            ))  # fmt: skip
        return _Served(self._adapter, context)

    def _check_logprobs(self, prompt: Sequence[int], parameters: SamplingParameters) -> None:
        """Refuse a server whose log-probabilities are those before the temperature."""
        if parameters.temperature == 1:
            return
        tops = []
        for temperature in (parameters.temperature, 1.0):
            one = SamplingParameters(temperature, 1)
            (top,) = self._ask_for(prompt, one, 0, top=1).logprobs.top_logprobs or [None]
            if not top:
                self._refuse("the log-probability of the likeliest token, got none", "use a server of vLLM")
            tops.append(max(top.values()))
        if abs(tops[0] - tops[1]) <= ROUNDING < -tops[0]:
            self._refuse(
                f"log-probabilities at temperature {parameters.temperature:g}, got those at 1",
                "start the server with --logprobs-mode processed_logprobs",
            )

    def _check_seeds(
        self, prompts: Sequence[Sequence[int]], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> None:
        """Refuse a server that gives other tokens to an equal seed, or equal tokens to other seeds."""
        short = replace(parameters, max_completion_length=min(TRIED_TOKENS, parameters.max_completion_length))
        rows = [len(prompts) * k // TRIED for k in range(TRIED)]
        tried = [(prompts[i], seed) for i in rows for seed in (seeds[i], seeds[i], seeds[i] ^ 1)]
        drawn = self._sample([prompt for prompt, _ in tried], short, [seed for _, seed in tried])
        once, again, other = drawn[::3], drawn[1::3], drawn[2::3]
        equal = sum(a.token_ids == b.token_ids for a, b in zip(once, again, strict=True))
        if 2 * equal < TRIED:
            self._refuse(
                f"equal tokens for an equal seed, got others for {TRIED - equal} of {TRIED} sequences",
                "use a server that takes a seed with each request, as vLLM does",
            )
        same = all(a.token_ids == b.token_ids for a, b in zip(once, other, strict=True))
        # the probability that as many draws of the policy are these
        if same and sum(sum(a.logprobs or ()) for a in dict.fromkeys(once)) < math.log(BY_CHANCE):
            self._refuse(
                "other tokens for other seeds, got the same", "use a server that takes a seed with each request"
            )

    def _ask(
        self, method: str, route: str, body: Any = None, *, first: bool = False, remedy: str = "see the server's log"
    ) -> bytes:
        """The body of an answer, of a request that is repeated where that may help."""
        from urllib3 import Retry
        from urllib3.exceptions import HTTPError, MaxRetryError

        retries = min(FIRST_RETRIES, self._settings.retries) if first else self._settings.retries
        # a server's own Retry-After may be hours
        retry = Retry(retries, redirect=False, allowed_methods=None, status_forcelist=BUSY, backoff_factor=BACKOFF,
                      backoff_max=LONGEST_WAIT, respect_retry_after_header=False)  # fmt: skip
        try:
            url = f"{self._settings.url}{route}"
            response = self._connections.request(method, url, json=body, retries=retry, redirect=False)
        except HTTPError as error:
            reason = error.reason if isinstance(error, MaxRetryError) and error.reason is not None else error
            said = self._without_key(" ".join(str(reason).split()))[:200]
            self._refuse(
                f"an answer to {route}, got none in {1 + retries} tries ({type(reason).__name__}: {said})",
                "start the server, or correct generation.server; the same command then goes on",
            )
        if response.status != HTTPStatus.OK:
            said = self._without_key(" ".join(response.data.decode(errors="replace").split()))[:300]
            if response.status in UNKNOWN:
                remedy = "set generation.server.api_key_env to the environment variable with the server's key"
            self._refuse(f"an answer to {route}, got status {response.status}: {said}", remedy)
        return response.data

    @cached_property
    def _connections(self) -> Any:
        from urllib3 import PoolManager, Timeout

        timeout = Timeout(connect=min(CONNECT, self._settings.timeout), read=self._settings.timeout)
        headers = None if self._key is None else {"Authorization": f"Bearer {self._key}"}
        return PoolManager(maxsize=self._at_once, timeout=timeout, headers=headers)

    def _parse(self, kind: type[T], body: bytes) -> T:
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            said = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
            self._refuse(
                f"an answer as vLLM gives it, got one with {f'{key}: ' if key else ''}{said}",
                "use a server of vLLM, or trl vllm-serve, that returns token ids and log-probabilities",
            )

    def _refuse(self, expected: str, remedy: str) -> NoReturn:
        message = f"generation.server {self._settings.url}: expected {expected}; {remedy}"
        raise ValueError(self._without_key(message))

    def _without_key(self, said: str) -> str:
        """A server may echo it; to be asked before anything is cut off."""
        return said if self._key is None else said.replace(self._key, "(the key)")


def _key_in(variable: str) -> str:
    """The key in an environment variable; it is never shown.

    Raises:
        ValueError: if there is none that can be sent.
    """
    key = os.environ.get(variable, "")
    if not re.fullmatch(r"[!-~]+", key):
        got = "one with spaces or other characters that no request may have" if key else "none"
        raise ValueError(
            f"generation.server.api_key_env: expected the server's key in the environment variable {variable}, got "
            f"{got}; export {variable}=..."
        )
    return key


def _adapter_name(directory: Path) -> str:
    """What an adapter is called on the server: by its content, so that a name there means this adapter."""
    digest = hashlib.sha256()
    for name in ADAPTER_FILES:
        file = directory / name
        if not file.is_file():
            raise ValueError(
                f"generation.server.adapter: expected a directory with {' and '.join(ADAPTER_FILES)}, got {directory} "
                f"without {name}; name the adapter's directory, or load the policy into the server and set "
                "generation.server.model"
            )
        digest.update(file.read_bytes())
    return f"entropy-probe-{digest.hexdigest()[:16]}"


def _of_settings(model: Any, tokenizer: Any, settings: GenerationSettings, agreed: Agreed | None) -> ServerEngine:
    server = settings.server
    assert server is not None
    if hasattr(model, "peft_config") and server.adapter is None and server.model is None:
        raise ValueError(
            "generation.server: expected the adapter that is probed, got a server alone, which would sample with the "
            "base model; set adapter to its directory, or model to the name that the server has it under"
        )
    return ServerEngine(server, end_tokens(model, tokenizer), settings.batch_size)


ENGINES["vllm"] = _of_settings
