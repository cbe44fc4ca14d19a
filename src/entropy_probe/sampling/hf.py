"""Sampling from the full softmax of a Hugging Face model, each response from random numbers of its own.

The next token is the inverse of the cumulative distribution at a uniform number that depends on the sequence's seed
and the token's position only. A response is then the same whatever batch it is computed in, up to rounding: where the
uniform number falls within rounding of a boundary (about one token in a million in float32) it may become another,
equally valid one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.sampling.generator import Completion, Progress, SamplingParameters
from entropy_probe.shards import reshard

__all__ = ["HFGenerator", "draw_tokens"]


class HFGenerator:
    """Samples with a causal language model of transformers, or a PEFT model around one.

    Sequences are batched by length. Equal prompts of a batch are computed once and their cache repeated; sequences
    that have ended leave the batch once they are half of it. Where a batch does not fit the device's memory the batch
    size is halved from there on, and :attr:`messages` says so. The model is in eval mode while it samples and left as
    found, also after an error; its generation config is read for its end tokens only.

    Args:
        model: called as ``model(input_ids=..., attention_mask=...)`` with its cache.
        tokenizer: its tokenizer, whose end-of-sequence token ends a response, as do those of the model's
            generation config.
        batch_size: sequences at a time.
        agreed: for a sharded model, whose ranks all sample the same: the drawn tokens that all go on with.

    Raises:
        ValueError: if the model cannot generate, no token ends a response, or the batch size is not positive.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int = 64,
        agreed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not callable(getattr(model, "generate", None)):
            raise ValueError(
                "model: expected a Hugging Face causal language model with generate, got "
                f"{type(model).__name__}; sample elsewhere and pass Rollouts"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: expected an eos_token, got none; set tokenizer.eos_token")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
        self._model = model
        self._batch_size = batch_size
        self._agreed = agreed
        self._end_tokens = _end_tokens(model, tokenizer)
        get_base_model = getattr(model, "get_base_model", None)
        base: Any = get_base_model() if callable(get_base_model) else model
        accepted = inspect.signature(base.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        # transformers 5.24 renamed the argument
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        self._messages: list[str] = []

    @property
    def context_length(self) -> int | None:
        """The model's own bound on positions."""
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def messages(self) -> tuple[str, ...]:
        """What has been noted so far."""
        return tuple(self._messages)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: SamplingParameters,
        seeds: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Sample one response to each prompt; see :class:`SequenceGenerator`.

        Raises:
            MemoryError: if a single sequence does not fit the device's memory.
        """
        whole = [tuple(prompt) for prompt in prompts]
        # equal prompts are neighbours, so that a batch holds as many of them as it can
        waiting = sorted(range(len(whole)), key=lambda i: (len(whole[i]), whole[i], i))
        completions: dict[int, Completion] = {}
        with _evaluating(self._model):
            while waiting:
                rows = waiting[: self._batch_size]
                found = self._try_batch([whole[i] for i in rows], parameters, [seeds[i] for i in rows])
                if found is None:
                    continue
                completions.update(zip(rows, found, strict=True))
                waiting = waiting[len(rows) :]
                if progress is not None:
                    progress(len(completions), len(whole))
        return [completions[i] for i in range(len(whole))]

    def _try_batch(
        self, prompts: list[tuple[int, ...]], parameters: SamplingParameters, seeds: list[int]
    ) -> list[Completion] | None:
        """The completions of a batch; ``None`` if it did not fit, with the batch size lowered for what follows."""
        try:
            return self._sample(prompts, parameters, seeds)
        except torch.OutOfMemoryError as error:
            if self._agreed is not None:  # the other ranks wait for this one in the middle of a pass
                error.add_note("lower generation.batch_size: with a sharded model it is not lowered by itself")
                raise
            if len(prompts) == 1:
                raise MemoryError(
                    f"sampling: a single sequence of up to {len(prompts[0]) + parameters.max_completion_length} tokens "
                    "does not fit the device's memory; lower max_completion_length, or sample on a larger device"
                ) from error
        # outside the handler, which holds on to the failed batch
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        self._batch_size = len(prompts) // 2
        line = "sampling ran out of memory: the batch size was lowered to"
        self._messages = [m for m in self._messages if not m.startswith(line)] + [f"{line} {self._batch_size}"]
        return None

    def _sample(
        self, prompts: list[tuple[int, ...]], parameters: SamplingParameters, seeds: list[int]
    ) -> list[Completion]:
        longest, device = parameters.max_completion_length, self._model.device
        uniforms = torch.from_numpy(np.stack([_uniforms(seed, longest) for seed in seeds])).to(device)
        end_tokens = torch.tensor(self._end_tokens, device=device)
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        logprobs = torch.zeros(tokens.shape, dtype=torch.float64, device=device)
        lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)
        ended = torch.zeros_like(lengths, dtype=torch.bool)
        state = self._prefill(prompts)
        live = torch.arange(len(prompts), device=device)
        for t in range(longest):
            drawn, s = draw_tokens(state.logits, uniforms[live, t], parameters.temperature)
            if self._agreed is not None:
                drawn = self._agreed(drawn)
            going = ~ended[live]
            rows = live[going]
            tokens[rows, t], logprobs[rows, t], lengths[rows] = drawn[going], s[going].double(), t + 1
            ended[rows] = torch.isin(drawn[going], end_tokens)
            open_ = ~ended[live]
            count = int(open_.sum())
            if count == 0 or t + 1 == longest:
                break
            if 2 * count <= len(live):
                keep = open_.nonzero()[:, 0]
                live, drawn = live[keep], drawn[keep]
                state.select(keep)
            self._advance(state, drawn)
        columns = (tokens.tolist(), logprobs.tolist(), lengths.tolist(), ended.tolist())
        return [
            Completion(prompt, tuple(ids[:n]), not complete, tuple(s[:n]))
            for prompt, ids, s, n, complete in zip(prompts, *columns, strict=True)
        ]

    def _prefill(self, prompts: list[tuple[int, ...]]) -> _Decoding:
        """The cache and next-token logits after each prompt; equal prompts are computed once."""
        from transformers import DynamicCache

        device = self._model.device
        distinct = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
        length = max(map(len, distinct))
        input_ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in distinct], device=device)
        lengths = torch.tensor([len(p) for p in distinct], device=device)
        mask = (torch.arange(length, device=device) >= length - lengths[:, None]).long()
        state = _Decoding(torch.empty(0), mask, DynamicCache(config=self._model.config.get_text_config()))
        self._forward(state, input_ids, (mask.cumsum(1) - 1).clamp(min=0))
        if len(distinct) < len(prompts):
            state.select(torch.tensor([distinct[p] for p in prompts], device=device))
        return state

    def _advance(self, state: _Decoding, tokens: Int[Tensor, " n"]) -> None:
        """Append a token to every sequence."""
        state.attention_mask = torch.nn.functional.pad(state.attention_mask, (0, 1), value=1)
        self._forward(state, tokens[:, None], state.attention_mask.sum(1, keepdim=True) - 1)

    def _forward(self, state: _Decoding, input_ids: Tensor, position_ids: Tensor) -> None:
        positions = {"position_ids": position_ids} if self._takes_positions else {}
        output = self._model(
            input_ids=input_ids,
            attention_mask=state.attention_mask,
            use_cache=True,
            **{self._cache_name: state.cache},
            **positions,
            **self._last_logits,
        )
        state.logits = output.logits[:, -1]


@dataclass
class _Decoding:
    """A batch on its way: next-token logits ``[n, V]``, mask of the tokens so far ``[n, l]`` and the cache."""

    logits: Tensor
    attention_mask: Tensor
    cache: Any

    def select(self, rows: Int[Tensor, " m"]) -> None:
        """Keep, drop or repeat sequences."""
        self.logits, self.attention_mask = self.logits[rows], self.attention_mask[rows]
        self.cache.batch_select_indices(rows)


def draw_tokens(
    logits: Float[Tensor, "n V"], uniforms: Float[Tensor, " n"], temperature: float
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Tokens of ``softmax(logits / temperature)`` by inversion, and their log-probabilities in nats.

    The token is the first whose cumulative probability reaches ``(1 - u) * total``, so one of probability 0 is never
    drawn. The sums are in float64. Source: Devroye, 1986, section III.2 (inversion by sequential search).

    Args:
        logits: of the next token.
        uniforms: float64 numbers in ``[0, 1)``.
        temperature: of the policy.
    """
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
    cumulative = log_p.exp().cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cumulative, (1 - uniforms[:, None]) * cumulative[:, -1:])[:, 0]
    return tokens, log_p.gather(-1, tokens[:, None])[:, 0]


def _uniforms(seed: int, count: int) -> np.ndarray:
    """The first random numbers of a sequence, float64 in ``[0, 1)``: the same on every device and in every batch."""
    return np.random.Generator(np.random.Philox(seed)).random(count)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    of_model = getattr(model.generation_config, "eos_token_id", None)
    of_model = [] if of_model is None else [of_model] if isinstance(of_model, int) else list(of_model)
    return sorted({tokenizer.eos_token_id, *of_model})


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode for a while; the flags come back on exit, and a sharded model gathers its parameters anew after it."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        reshard(model)
        for module, flag in training:
            module.training = flag
