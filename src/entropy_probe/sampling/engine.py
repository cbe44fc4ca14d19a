"""What an engine that samples responses has to offer, and the engines that a config may name.

An engine sees token ids, never text, prompts' ids or rewards. Whatever it computes with, the probe scores its
responses again with the policy itself, and compares with the log-probabilities that the engine reports.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from entropy_probe.results.note import Note
from entropy_probe.results.record import Settings

Progress = Callable[[int, int], None]
"""Called with the sequences done and the sequences in all."""

MOST_SEQUENCES = 10_000_000
"""Of a batch: what is kept of more of them, tokens aside, is beyond the memory of a machine."""


class ServerSettings(Settings):
    """A server of vLLM (``vllm serve``, ``trl vllm-serve``) that has the policy.

    Attributes:
        url: where it listens, such as ``http://localhost:8000``.
        model: the name that it serves the policy under; by default the only model that it serves.
        adapter: the directory of a LoRA adapter that it is told to load by this path, and to sample with.
        api_key_env: the name of the environment variable with the key that it asks for; the key itself is in no file.
            On the command line only.
        timeout: seconds to wait for an answer, which is a whole response.
        retries: how often a request is repeated, after longer and longer waits, where the server is busy (429, 502,
            503, 504), the connection fails or the time is over.
    """

    url: str
    model: str | None = Field(default=None, min_length=1)
    adapter: Path | None = None
    api_key_env: str | None = None
    timeout: float = Field(default=600.0, gt=0, le=1e6)
    retries: int = Field(default=8, ge=0)

    @field_validator("api_key_env", mode="before")
    @classmethod
    def _name_of_a_variable(cls, value: Any) -> Any:
        if value is not None and not (isinstance(value, str) and re.fullmatch(r"[A-Z_][A-Z0-9_]*", value)):
            raise ValueError(
                "expected the name of an environment variable (capitals, digits and _), got something else; export "
                "the key in a variable such as VLLM_API_KEY and give that name"
            )
        return value

    @field_validator("url")
    @classmethod
    def _of_a_server(cls, value: str) -> str:
        expected = f"expected the address of a server such as http://localhost:8000, got {value!r}"
        try:
            parts = urlsplit(value)
            named = parts.hostname is not None and parts.port != 0
        except ValueError as error:
            raise ValueError(f"{expected}: {error}") from error
        if parts.query or parts.fragment:  # which may be a key
            raise ValueError(
                "expected the address of a server such as http://localhost:8000, got one with a query; leave it out"
            )
        if parts.scheme not in ("http", "https") or not named:
            raise ValueError(expected)
        if parts.username is not None or parts.password is not None:
            raise ValueError("expected an address without name and password, got one with them; leave them out")
        return value.rstrip("/").removesuffix("/v1")


class GenerationSettings(Settings):
    """How responses are generated.

    Attributes:
        engine: what generates them: ``hf`` calls the model here, ``vllm`` asks a ``server``.
        top_p: must be 1: the full softmax is the policy.
        top_k: must be 0 (off), for the same reason.
        batch_size: sequences generated at a time, fewer where they do not fit the memory; requests at a time, of a
            server. Which responses a seed gives does not depend on it, up to rounding.
        stop: texts that end a response, the token that completes one included; for a trainer that samples with them.
        server: the server of engine ``vllm``.
    """

    engine: str = "hf"
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = Field(default=64, gt=0)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    server: ServerSettings | None = None

    @field_validator("engine")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ENGINES:
            raise ValueError(f"expected {' or '.join(ENGINES)}, got {value!r}; sample elsewhere and set rollouts")
        return value

    @field_validator("top_p", "top_k")
    @classmethod
    def _full_softmax(cls, value: float | int, info: Any) -> float | int:
        off = cls.model_fields[info.field_name].default
        if value != off:
            raise ValueError(
                f"expected {off}, got {value}; the full softmax is the policy, leave {info.field_name} out"
            )
        return value

    @model_validator(mode="after")
    def _server_of_engine(self) -> GenerationSettings:
        if self.engine == "vllm" and self.server is None:
            raise ValueError("server: required by engine vllm, but missing; set server.url")
        if self.engine != "vllm" and self.server is not None:
            raise ValueError(f"server: expected engine vllm beside it, got {self.engine}; set engine: vllm")
        return self


@dataclass(frozen=True)
class SamplingParameters:
    """The distribution to sample: ``softmax(logits / temperature)`` over the full vocabulary, cut off at a length.

    Attributes:
        temperature: the sampling temperature, above 0.
        max_completion_length: the longest response, in tokens.
        stop: texts that end a response (:func:`~entropy_probe.sampling.responses.cut_at_stop`). Engines leave them
            alone.

    Raises:
        ValueError: if temperature or length is not positive, or a stop text is empty.
    """

    temperature: float
    max_completion_length: int
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("temperature", "max_completion_length"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not all(self.stop):
            raise ValueError(f"stop: expected texts of at least one character, got {list(self.stop)}; leave '' out")


@dataclass(frozen=True)
class Completion:
    """A prompt and a response sampled to it.

    Attributes:
        prompt_token_ids: the tokens of the prompt.
        token_ids: the response tokens, the first end-of-sequence token included and nothing after it.
        truncated: whether the response was cut off before an end-of-sequence token.
        logprobs: the engine's own log-probability of each response token in nats; ``None`` if it reports none.
        stopped: whether the response ends with the token that completed a stop text.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    truncated: bool
    logprobs: tuple[float, ...] | None = None
    stopped: bool = False


@runtime_checkable
class Engine(Protocol):
    """An engine that samples responses."""

    @property
    def context_length(self) -> int | None:
        """The most tokens that a prompt and its response may have together; ``None`` where nothing bounds them."""
        ...

    @property
    def notes(self) -> tuple[Note, ...]:
        """Everything so far that a careful reader should know, such as a smaller batch size."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: SamplingParameters,
        seeds: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Sample one response to each prompt.

        Args:
            prompts: the token ids of each prompt, without padding; repeated for several responses.
            parameters: the distribution to sample from. Nothing else may shape it: no top-k, no top-p, no penalty.
            seeds: a seed for each sequence, between 0 and 2^63 - 1. A response must depend on nothing but its
                prompt, its seed, the parameters and the policy, up to rounding: not on how the engine batches.
            progress: called with sequences done and in all.

        Returns:
            One completion per prompt, in their order.
        """
        ...


Agreed = Callable[[Tensor], Tensor]
"""For a sharded model, whose ranks all sample the same: what all go on with in place of what each has drawn."""

ENGINES: dict[str, Callable[[Any, Any, GenerationSettings, Agreed | None], Engine]] = {}
"""How each engine is made of a model, its tokenizer and the settings, by its name in them; its own module enters it."""
