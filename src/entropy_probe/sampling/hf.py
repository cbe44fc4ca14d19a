"""Sampling from the full softmax of a Hugging Face model, each response from random numbers of its own.

The next token is the inverse of the cumulative distribution at a uniform number that depends on the sequence's seed
and the token's position only. A response is then the same whatever batch it is computed in, up to rounding: where the
uniform number falls within rounding of a boundary (about one token in a million in float32) it may become another,
equally valid one.

Whatever computes the logits is compared with plain calls of the model before it is used: see :class:`HFGenerator`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.parallel.shards import reshard
from entropy_probe.results.note import NOTHING_TO_DO, Note, NoteKind
from entropy_probe.sampling.decoding import FAULTS, HALF, WAYS, Decoding, ModelCall, plain_logprobs
from entropy_probe.sampling.engine import ENGINES, Agreed, Completion, Progress, SamplingParameters

_DIFFER = "log-probabilities differ from a plain call's"
_COMPARED = 512
"""Tokens of a response that are compared with a plain call, which bounds the logits that it holds."""

SMALLER_BATCHES = NoteKind(
    "smaller_batches",
    "sampling ran out of memory: the batch size was lowered to {size}",
    f"{NOTHING_TO_DO} Set generation.batch_size to save the retries.",
)
SLOWER = NoteKind(
    "slower_sampling",
    "sampling goes on {way}: {reason}",
    f"{NOTHING_TO_DO} Where sampling takes too long, give rollouts that another engine sampled.",
)


class HFGenerator:
    """Samples with a causal language model of transformers, or a PEFT model around one.

    Sequences are batched by length. Equal prompts of a batch are computed once and their cache repeated; sequences
    that have ended leave the batch once they are half of it. Where a batch does not fit the device's memory the batch
    size is halved from there on, and :attr:`notes` say so. The model is in eval mode while it samples and left as
    found, also after an error; its generation config is read for its end tokens only.

    The model's cache is used in the first of :data:`~entropy_probe.sampling.decoding.WAYS` that gives a few short
    sequences the log-probabilities of plain calls on each alone: with prompts of several lengths, repeated and dropped
    rows, once per engine. So are two sequences of each batch that holds a longer one than any before. Where no cache
    agrees, whole sequences are computed anew at every token, which :attr:`notes` say.

    Args:
        model: called as ``model(input_ids=..., attention_mask=...)``, with a cache if it takes one.
        tokenizer: its tokenizer, whose end-of-sequence token ends a response, as do those of the model's
            generation config.
        batch_size: sequences at a time.
        agreed: for a sharded model, whose ranks all sample the same: the drawn tokens that all go on with.

    Raises:
        ValueError: if the model cannot generate, no token ends a response, or the batch size is not positive.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 64, agreed: Agreed | None = None) -> None:
        if not callable(getattr(model, "generate", None)):
            raise ValueError(
                "model: expected a Hugging Face causal language model with generate, got "
                f"{type(model).__name__}; sample elsewhere and pass Rollouts"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
        self._model = model
        self._batch_size = batch_size
        self._agreed = agreed
        self._end_tokens = end_tokens(model, tokenizer)
        self._call = ModelCall(model)
        self._ways = list(WAYS)
        self._faults: list[str] = []
        self._verified: tuple[int, int] | None = None
        self._notes: list[Note] = []

    @property
    def context_length(self) -> int | None:
        """The model's own bound on positions; ``None`` where it has none, which XLNet says with a negative number."""
        bound = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return bound if isinstance(bound, int) and bound > 0 else None

    @property
    def notes(self) -> tuple[Note, ...]:
        """What has been noted so far."""
        return tuple(self._notes)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: SamplingParameters,
        seeds: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Sample one response to each prompt; see :class:`Engine`.

        Raises:
            ValueError: if the model's log-probabilities of a sequence depend on what follows, or cannot be had.
            MemoryError: if a single sequence does not fit the device's memory.
        """
        whole = [tuple(prompt) for prompt in prompts]
        limits = [parameters.max_completion_length] * len(whole)
        with _evaluating(self._model):
            if whole and self._verified is None:
                self._settle(whole, parameters)
            return self._run(_Request(whole, list(seeds), limits, parameters.temperature, self._end_tokens), progress)

    def _settle(self, prompts: list[tuple[int, ...]], parameters: SamplingParameters) -> None:
        """Find the first way to decode that agrees with plain calls on six short sequences, which then stays."""
        tokens = [token for prompt in dict.fromkeys(prompts) for token in prompt]
        room = max(map(len, prompts)) + parameters.max_completion_length
        short = min(5, min(map(len, prompts)))
        lengths = [min(short + more, max(short, room // 2)) for more in (0, 2, 7)]
        longest = min(9, room - max(lengths))
        # two of each, most of which end early, so that rows are repeated and dropped
        tried = _Request(
            prompts=[tuple((tokens * (n + k))[k : k + n]) for k, n in enumerate(lengths) for _ in range(2)],
            seeds=list(range(6)),
            limits=[max(1, longest * part // 9) for part in (2, 9, 2, 4, 2, 4)],
            temperature=1.0,
            end_tokens=[],
        )
        while self._verified is None:
            way = self._ways[0]
            self._run(tried)
            if self._ways[0] is way:
                self._verified = max(lengths) + longest, max(lengths) - min(lengths)

    def _run(self, request: _Request, progress: Progress | None = None) -> list[Completion]:
        """Sample batch by batch, the longest prompts first: where memory or positions fail they do at once.

        Equal prompts are neighbours, so that a batch holds as many of them as it can.
        """
        prompts = request.prompts
        waiting = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i], i))
        completions: dict[int, Completion] = {}
        while waiting:
            rows = waiting[: self._batch_size]
            if not self._ways[0].pads:
                rows = [i for i in rows if len(prompts[i]) == len(prompts[rows[0]])]
            drawn = self._try_batch(request.of(rows))
            if drawn is None:
                continue
            completions.update(zip(rows, drawn, strict=True))
            waiting = waiting[len(rows) :]
            if progress is not None:
                progress(len(completions), len(prompts))
        return [completions[i] for i in range(len(prompts))]

    def _try_batch(self, batch: _Request) -> list[Completion] | None:
        """The completions of a batch; ``None`` if it is to be cut and drawn again.

        Either it did not fit, and the batch size has been lowered for what follows; or the way it was decoded has been
        ruled out.
        """
        fault = "it fails on another rank"
        try:
            completions = self._sample(batch)
            agrees = (difference := self._difference(completions, batch.temperature)) is None
            fault = difference or fault
        except torch.OutOfMemoryError as error:
            if self._agreed is not None:  # the other ranks wait for this one in the middle of a pass
                error.add_note("lower generation.batch_size: with a sharded model it is not lowered by itself")
                raise
            if len(batch.prompts) == 1:
                raise MemoryError(
                    f"sampling: a single sequence of up to {len(batch.prompts[0]) + batch.limits[0]} tokens "
                    "does not fit the device's memory; lower max_completion_length, or sample on a larger device"
                ) from error
            completions, agrees = None, True
        except FAULTS as error:
            completions, agrees = None, False
            fault = f"it fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if not self._all_agree(agrees):
            self._rule_out(fault)
            return None
        if completions is None:  # outside the handler, which holds on to the failed batch
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()
            self._batch_size = len(batch.prompts) // 2
            self._note(SMALLER_BATCHES(size=self._batch_size))
        return completions

    def _note(self, note: Note) -> None:
        """In place of an earlier note of the kind."""
        self._notes = [*(n for n in self._notes if n.code != note.code), note]

    def _difference(self, completions: list[Completion], temperature: float) -> str | None:
        """How the completions' log-probabilities differ from plain calls', if beyond rounding.

        While no way is settled on, all are compared; then two of a batch that has longer sequences, or more padding,
        than those compared before: its longest sequence, and the longest response to its shortest prompt.
        """
        compared, reached = completions, (0, 0)
        if self._verified is not None:
            sizes = [(len(c.prompt_token_ids), len(c.token_ids)) for c in completions]
            longest = max(range(len(sizes)), key=lambda i: sum(sizes[i]))
            padded = min(range(len(sizes)), key=lambda i: (sizes[i][0], -sizes[i][1]))
            reached = sum(sizes[longest]), max(sizes)[0] - sizes[padded][0]
            if all(new <= old for new, old in zip(reached, self._verified, strict=True)):
                return None
            compared = [completions[i] for i in {longest, padded}]
        for completion in compared:
            gap, allowed = self._gap(completion, temperature)
            if not gap <= allowed:
                return f"{_DIFFER} by {gap:.2g} nats per token"
        if self._verified is not None:
            self._verified = max(reached[0], self._verified[0]), max(reached[1], self._verified[1])
        return None

    def _gap(self, completion: Completion, temperature: float) -> tuple[float, float]:
        """How far log-probabilities are from a plain call's, at temperature 1, and how far rounding may bring them.

        On the CPU the model's own rounding is the measure: what a plain call makes of the same tokens when the last one
        is left out, in sums of another shape. Elsewhere convolutions round to TF32. In half precision a token may go to
        other experts by rounding, so one token says little and the median counts.
        """
        prompt, response = completion.prompt_token_ids, completion.token_ids
        plain, dtype = plain_logprobs(self._call, prompt, response, temperature, _COMPARED)
        drawn = torch.tensor(completion.logprobs, dtype=torch.float64, device=plain.device)[-len(plain) :]
        half = dtype in HALF or self._call.half
        gap = temperature * float((plain.double() - drawn).abs().quantile(0.5 if half else 0.9))
        if half or plain.device.type != "cpu":
            return gap, 0.05 if half else 5e-3
        if len(plain) == 1:
            return gap, 1e-3
        shorter, _ = plain_logprobs(self._call, prompt, response[:-1], temperature, len(plain) - 1)
        rounding = temperature * float((plain[:-1] - shorter).abs().max())
        return gap, min(1e-3, max(2e-5, 20 * rounding))

    def _all_agree(self, here: bool) -> bool:
        """Rank 0's verdict, for a sharded model whose ranks must go the same way."""
        if self._agreed is None:
            return here
        return bool(self._agreed(torch.tensor([int(here)], device=self._model.device)))

    def _rule_out(self, fault: str) -> None:
        """Go on to the next way of decoding, and say why if it is a slower one; raise if there is none."""
        if len(self._ways) == 1:
            raise ValueError(
                f"model: expected a {type(self._model).__name__} whose log-probabilities depend on the tokens before "
                f"alone, got one that cannot be sampled: even without a cache, {fault}; give rollouts instead"
            )
        failed = self._ways.pop(0)
        self._faults.append(f"{failed}, {fault}")
        if str(failed) != str(self._ways[0]):
            # that a method is missing is not the reason if another one is there
            reason = next((f for f in reversed(self._faults) if _DIFFER in f), self._faults[-1])
            self._note(SLOWER(way=str(self._ways[0]), reason=reason))

    def _sample(self, batch: _Request) -> list[Completion]:
        longest, device = max(batch.limits), self._model.device
        uniforms = torch.from_numpy(np.stack([_uniforms(seed, longest) for seed in batch.seeds])).to(device)
        ends = torch.tensor(batch.end_tokens, dtype=torch.long, device=device)
        limits = torch.tensor(batch.limits, device=device)
        tokens = torch.zeros(len(batch.prompts), longest, dtype=torch.long, device=device)
        logprobs = torch.zeros(tokens.shape, dtype=torch.float64, device=device)
        lengths = torch.zeros(len(batch.prompts), dtype=torch.long, device=device)
        complete = torch.zeros_like(lengths, dtype=torch.bool)
        state = Decoding(self._call, batch.prompts, self._ways[0])
        live = torch.arange(len(batch.prompts), device=device)
        for t in range(longest):
            drawn, s = draw_tokens(state.logits, uniforms[live, t], batch.temperature)
            if self._agreed is not None:
                drawn = self._agreed(drawn)
            going = ~complete[live] & (lengths[live] < limits[live])
            rows = live[going]
            tokens[rows, t], logprobs[rows, t], lengths[rows] = drawn[going], s[going].double(), t + 1
            complete[rows] = torch.isin(drawn[going], ends)
            open_ = ~complete[live] & (lengths[live] < limits[live])
            count = int(open_.sum())
            if count == 0:
                break
            if 2 * count <= len(live):
                keep = open_.nonzero()[:, 0]
                live, drawn = live[keep], drawn[keep]
                state.select(keep)
            state.advance(drawn)
        columns = (tokens.tolist(), logprobs.tolist(), lengths.tolist(), complete.tolist())
        return [
            Completion(prompt, tuple(ids[:n]), not done, tuple(s[:n]))
            for prompt, ids, s, n, done in zip(batch.prompts, *columns, strict=True)
        ]


ENGINES["hf"] = lambda model, tokenizer, settings, agreed: HFGenerator(model, tokenizer, settings.batch_size, agreed)


@dataclass(frozen=True)
class _Request:
    """Sequences to sample: prompts, seeds, the largest length of each response, temperature and tokens that end one."""

    prompts: list[tuple[int, ...]]
    seeds: list[int]
    limits: list[int]
    temperature: float
    end_tokens: list[int]

    def of(self, rows: list[int]) -> _Request:
        """Some of the sequences."""
        return replace(
            self,
            prompts=[self.prompts[i] for i in rows],
            seeds=[self.seeds[i] for i in rows],
            limits=[self.limits[i] for i in rows],
        )


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


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """What ends a response: the tokenizer's end-of-sequence token and those of the model's generation config.

    Raises:
        ValueError: if the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: expected an eos_token, got none; set tokenizer.eos_token")
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
