"""Teacher forcing: scores of given responses, and surrogates to differentiate, in microbatches bounded by tokens.

The attention mask is always passed. How sequences are laid out for the model is the business of
:mod:`entropy_probe.scoring.packing`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from entropy_probe.scoring.logits import OutputHead, head_scores, head_slopes, head_surrogate, logit_scores
from entropy_probe.scoring.packing import (
    Microbatch,
    bounded_groups,
    pack,
    pack_shared,
    padded,
    shared_prompts,
    two_of_one_prompt,
)
from entropy_probe.shards import is_sharded, reshard
from entropy_probe.types import Rollouts, TokenCoefficients, TokenScores

__all__ = ["Progress", "Scorer"]

Progress = Callable[[int, int], None]
"""Called with sequences done and sequences in all."""

T = TypeVar("T")


def _plain_head(model: nn.Module) -> tuple[nn.Module, nn.Linear] | str:
    """The trunk and output layer of a Hugging Face causal language model, or why they cannot be separated."""
    if is_sharded(model):
        return "a sharded model gathers its parameters when it is called as a whole"
    get_base_model = getattr(model, "get_base_model", None)
    inner = get_base_model() if callable(get_base_model) else model
    get_head = getattr(inner, "get_output_embeddings", None)
    if not callable(get_head):
        return "the module has no get_output_embeddings()"
    head, trunk = get_head(), getattr(inner, "base_model", None)
    if type(head) is not nn.Linear:
        return f"the output layer is a {type(head).__name__}, not a plain Linear"
    if not isinstance(trunk, nn.Module) or trunk is inner:
        return "the model has no separate trunk"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "prompt-learning adapters change the model's inputs"
    return trunk, head


class Scorer:
    """Scores and differentiates responses under the parameters that the model holds at the time of the call.

    Args:
        model: called as ``model(input_ids=..., attention_mask=...)``, returning an object with ``.logits``. A Hugging
            Face causal language model whose logits are a plain linear function of its last hidden state is run
            through its trunk, with the output layer applied in chunks; :meth:`prepare` checks that this is so.
        temperature: the sampling temperature, part of the policy.
        max_tokens_per_microbatch: the bound on padded tokens per forward pass; lowered where the device's memory is
            too small for it, which ``messages`` then says.
    """

    def __init__(self, model: nn.Module, temperature: float, max_tokens_per_microbatch: int) -> None:
        self.model = model
        self.temperature = temperature
        self.max_tokens = max_tokens_per_microbatch
        self.messages: tuple[str, ...] = ()
        self.device = next(model.parameters()).device
        self.sharded = is_sharded(model)
        self._split: tuple[nn.Module, nn.Linear] | None = None
        self._width: int | None = None
        context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        self._context = context if isinstance(context, int) else None
        self.head_path = "logits (not prepared)"
        self.prefix_sharing = "off (not prepared)"

    def prepare(self, *batches: Rollouts) -> None:
        """Check batches against the model and choose how to compute logits; to be called before anything else.

        The trunk-and-head path is used only if it reproduces the model's own logits on the shortest sequence, which
        catches models that change logits after the output layer (soft caps, scales). Likewise responses to one prompt
        share a row only if that reproduces two of them on their own.

        Raises:
            ValueError: if a sequence is longer than the model's context or a token is outside its vocabulary.
        """
        for batch in batches:
            self.check_fits(batch)
        self._split, self._width = None, None
        split = _plain_head(self.model)
        if isinstance(split, str):
            self.head_path = f"logits ({split})"
        else:
            self._split = split
            shortest = batches[0].shortest_first[:1]
            attempt = self._attempt(self._pack(batches[0], shortest), self._head_is_final)
            assert attempt is not None
            if attempt[0]:
                self.head_path = "chunked"
            else:
                self._split = None
                self.head_path = "logits (the model changes logits after its output layer)"
        unshared = self._why_not_shared(batches)
        self.prefix_sharing = "on" if unshared is None else f"off ({unshared})"

    def _pack(self, rollouts: Rollouts, rows: Tensor) -> Microbatch:
        return pack(rollouts, rows, self.device, self._context)

    @torch.no_grad()
    def _why_not_shared(self, batches: Sequence[Rollouts]) -> str | None:
        """Why responses to one prompt cannot share a row; ``None`` if they can, tried on two of them."""
        if self._split is None:
            return "the model's logits are computed as a whole"
        config = getattr(self.model, "config", None)
        width = getattr(config, "hidden_size", None)
        if not isinstance(width, int) or "position_ids" not in inspect.signature(self._split[0].forward).parameters:
            return "the model takes no position ids"
        layers = set(getattr(config, "layer_types", None) or ["full_attention"])
        if getattr(config, "sliding_window", None) or layers != {"full_attention"}:
            return "the model does not attend to the whole context"
        for batch in batches:
            pair = two_of_one_prompt(batch)
            if pair is None:
                continue
            try:
                together = self._hidden(pack_shared(batch, [pair], self.device, self._dtype()))
                alone = self._hidden(self._pack(batch, pair))
            except torch.OutOfMemoryError:
                return "two responses of a prompt do not fit the device's memory together"
            tolerance = 2e-2 if alone.dtype in (torch.bfloat16, torch.float16) else 1e-3
            if bool(((together - alone).abs() > tolerance * alone.abs().max()).any()):
                return "the model treats a shared prompt differently"
            self._width = width
            return None
        return "no prompt has two responses of 3 tokens"

    def _dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @torch.no_grad()
    def _head_is_final(self, batch: Microbatch) -> bool:
        """Whether the model's logits are its output layer's, also when these are scaled up to 100."""
        assert self._split is not None
        head = self._split[1]
        output = torch.nn.functional.linear(self._hidden(batch), head.weight, head.bias)
        factor = 100 / output.abs().max().clamp(min=1e-6)
        handle = head.register_forward_hook(lambda module, args, out: cast(Tensor, out) * factor)
        try:
            logits = self._model_logits(batch)
        finally:
            handle.remove()
        tolerance = 2e-2 if output.dtype in (torch.bfloat16, torch.float16) else 1e-3
        return bool(((logits - output * factor).abs() <= 100 * tolerance).all())

    def check_fits(self, rollouts: Rollouts) -> None:
        """Check a batch against the model's context and vocabulary; raises as :meth:`prepare` does."""
        config, context = getattr(self.model, "config", None), self._context
        lengths = rollouts.attention_mask.sum(1)
        if context is not None and int(lengths.max()) > context:
            raise ValueError(
                f"rollouts: expected at most {context} tokens per sequence (the model's context), got "
                f"{int(lengths.max())} at index {int(lengths.argmax())}; drop or shorten long prompts"
            )
        vocabulary = getattr(config, "vocab_size", None)
        smallest, largest = (int(x) for x in rollouts.input_ids[rollouts.attention_mask].aminmax())
        if smallest < 0:
            raise ValueError(
                f"rollouts: expected token ids of at least 0, got {smallest}; use the mask for what is ignored"
            )
        if isinstance(vocabulary, int) and largest >= vocabulary:
            raise ValueError(
                f"rollouts: expected token ids below {vocabulary} (the model's vocabulary), got {largest}; "
                "were they tokenized for another model?"
            )

    @property
    def head(self) -> nn.Linear | None:
        """The output layer, if it is applied in chunks outside the model."""
        return None if self._split is None else self._split[1]

    def _head(self) -> OutputHead:
        assert self._split is not None
        head = self._split[1]
        return OutputHead(head.weight, head.bias, self.temperature)

    def _hidden(self, batch: Microbatch) -> Tensor:
        """Final hidden states at the positions that predict response tokens, ``[T, D]``."""
        assert self._split is not None
        positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        output = self._split[0](
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **positions
        )
        return output.last_hidden_state.flatten(0, 1)[batch.source]

    def _model_logits(self, batch: Microbatch) -> Tensor:
        """The model's own logits at the positions that predict response tokens, ``[T, V]``."""
        reshard(self.model)  # whoever called it last may have left what it gathered
        try:
            output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        finally:
            reshard(self.model)
        if output.logits.shape[:2] != batch.input_ids.shape:
            raise ValueError(
                f"model: expected logits for each of {list(batch.input_ids.shape)} tokens, got "
                f"{list(output.logits.shape[:2])}; adapters that add virtual tokens are not supported"
            )
        return output.logits.flatten(0, 1)[batch.source]

    def microbatches(
        self, rollouts: Rollouts, rows: Tensor | None = None, *, share: bool = True
    ) -> Iterator[Microbatch]:
        """The batch, or some rows of it, cut into microbatches, one at a time; sequences without response are left out.

        Args:
            rollouts: the batch.
            rows: which sequences; all by default.
            share: whether responses to one prompt may share a row.
        """
        rows = torch.arange(len(rollouts)) if rows is None else rows
        rows = rows[rollouts.response_mask[rows].any(1)]
        shared = shared_prompts(rollouts, rows, self._width, self.max_tokens) if share and self._width else None
        lengths = rollouts.attention_mask.sum(1)
        if shared is None:
            for group in bounded_groups([padded(n) for n in lengths[rows].tolist()], self.max_tokens):
                yield self._pack(rollouts, rows[group])
            return
        prompt = (rollouts.response_mask.int().argmax(1) - rollouts.attention_mask.int().argmax(1)).tolist()
        tokens = [int(lengths[row].sum()) - (len(row) - 1) * prompt[int(row[0])] - len(row) for row in shared]
        for group in bounded_groups([padded(n) for n in tokens], self.max_tokens):
            yield pack_shared(rollouts, [shared[i] for i in group], self.device, self._dtype())

    def each(
        self,
        rollouts: Rollouts,
        work: Callable[[Microbatch], T],
        rows: Tensor | None = None,
        *,
        share: bool = True,
    ) -> Iterator[tuple[Microbatch, T]]:
        """Work on the batch, or some rows of it, microbatch by microbatch; on none without response tokens.

        A microbatch that does not fit the device's memory is cut again, with half its size as the bound from there
        on. Nothing but the size of microbatches changes, and they are free to choose.

        Args:
            rollouts: the batch.
            work: what to do. It must change nothing before it returns, since it may be given its rows again.
            rows: which sequences; all by default.
            share: whether responses to one prompt may share a row.

        Raises:
            MemoryError: if a single sequence does not fit.
        """
        left = torch.zeros(len(rollouts), dtype=torch.bool)
        left[slice(None) if rows is None else rows] = True
        left &= rollouts.response_mask.any(1)
        waiting = rows
        while bool(left.any()):
            for batch in self.microbatches(rollouts, waiting, share=share):
                found = self._attempt(batch, work)
                if found is None:
                    break
                left[batch.rows] = False
                yield batch, found[0]
            waiting = left.nonzero()[:, 0]

    def _attempt(self, batch: Microbatch, work: Callable[[Microbatch], T]) -> tuple[T] | None:
        """What ``work`` gives; ``None`` if the memory was too small, with the bound lowered for what follows."""
        size = batch.input_ids.numel()
        try:
            return (work(batch),)
        except torch.OutOfMemoryError as error:
            if self.sharded:  # the other ranks wait for this one in the middle of the pass
                error.add_note("lower max_tokens_per_microbatch: on a sharded model it is not lowered by itself")
                raise
            if len(batch.rows) == 1:
                raise MemoryError(
                    f"sequence {int(batch.rows[0])}: its tokens alone, {size} with padding, do not fit the device's "
                    "memory; drop or shorten it, or probe on a larger device"
                ) from error
        # outside the handler, which holds on to the failed pass
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.max_tokens = size // 2
        self.messages = (f"out of memory: max_tokens_per_microbatch was lowered to {self.max_tokens}",)
        return None

    def score_again(self, rollouts: Rollouts) -> TokenScores:
        """:meth:`score` in another layout, without shared prompts: the two differ by rounding only."""
        return self._score(rollouts, share=False)

    def score(self, rollouts: Rollouts, progress: Progress | None = None) -> TokenScores:
        """Log-probabilities and entropies of every response token, in nats, in the caller's layout, on the CPU.

        Raises:
            ValueError: if a score is not finite.
        """
        return self._score(rollouts, progress=progress)

    @torch.no_grad()
    def shortest_scores(self, rollouts: Rollouts) -> list[tuple[str, Tensor]]:
        """What the policy makes of the shortest sequence, unchecked: log-probabilities and entropies, ``[T]``."""
        shortest = rollouts.shortest_first[:1]
        s, h = self._score_microbatch(self._pack(rollouts, shortest))
        return [("logprobs", s), ("entropies", h)]

    @torch.no_grad()
    def _score(self, rollouts: Rollouts, *, share: bool = True, progress: Progress | None = None) -> TokenScores:
        wide = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        logprobs = torch.zeros(rollouts.input_ids.shape, dtype=wide)
        entropies = torch.zeros_like(logprobs)
        done = 0
        for batch, (s, h) in self.each(rollouts, self._score_microbatch, share=share):
            batch.scatter(s, logprobs)
            batch.scatter(h, entropies)
            done += len(batch.rows)
            if progress:
                progress(done, len(rollouts))
        for name, values in (("log-probabilities", logprobs), ("entropies", entropies)):
            bad = ~torch.isfinite(values).all(1)
            if bool(bad.any()):
                raise ValueError(
                    f"scores: expected finite {name}, got non-finite ones in {int(bad.sum())} sequences (first index "
                    f"{int(bad.nonzero()[0])}); look for non-finite weights, or responses the policy cannot produce"
                )
        return TokenScores(logprobs, entropies, rollouts.response_mask)

    def _score_microbatch(self, batch: Microbatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies, ``[T]`` each."""
        if self._split is None:
            return logit_scores(self._model_logits(batch), batch.targets, self.temperature)
        return head_scores(self._head(), self._hidden(batch), batch.targets)

    def token_scores(self, batch: Microbatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of a microbatch's response tokens, ``[T]`` each, in nats.

        Differentiable in forward and reverse mode, also repeatedly; in reverse mode all logits stay in memory.
        """
        if self._split is None:
            return logit_scores(self._model_logits(batch), batch.targets, self.temperature)
        head, size = self._head(), self._head().chunk_tokens()
        chunks = zip(self._hidden(batch).split(size), batch.targets.split(size), strict=True)
        logits = ((torch.nn.functional.linear(hidden, head.weight, head.bias), targets) for hidden, targets in chunks)
        s, h = zip(*(logit_scores(z, targets, self.temperature) for z, targets in logits), strict=True)
        return torch.cat(s), torch.cat(h)

    def token_slopes(self, batch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`token_scores` without a graph, and derivatives of the log-probabilities, ``[T]`` each.

        To be called inside a level of forward mode, in which the model's parameters carry the tangents.
        """
        if self._split is not None:
            return head_slopes(self._head(), self._hidden(batch), batch.targets)
        (s, slopes), (h, _) = map(unpack_dual, self.token_scores(batch))
        return s, h, torch.zeros_like(s) if slopes is None else slopes

    def surrogates(
        self,
        batch: Microbatch,
        sides: Sequence[TokenCoefficients],
        consume_head: Callable[[int, slice, Tensor, Tensor], None] | None = None,
    ) -> list[Tensor]:
        """One scalar ``sum a s + c h`` over a microbatch per set of coefficients, all on the graph of one forward pass.

        Args:
            batch: the microbatch.
            sides: coefficients for every token of the whole batch, ``[N, L]``.
            consume_head: takes the place of gradients of :attr:`head`: called with a side's number and what
                :func:`~entropy_probe.scoring.logits.head_surrogate` says of each chunk of tokens.

        Raises:
            ValueError: if a value is not finite.
        """
        terms = [(batch.gather(c.logprobs), None if c.entropies is None else batch.gather(c.entropies)) for c in sides]
        if self._split is not None:
            hidden = self._hidden(batch)
            values = [
                head_surrogate(
                    self._head(), hidden, batch.targets, a, c, partial(consume_head, k) if consume_head else None
                )
                for k, (a, c) in enumerate(terms)
            ]
        else:
            s, h = self.token_scores(batch)
            values = [torch.dot(a.to(s.dtype), s) + (0 if c is None else torch.dot(c.to(h.dtype), h)) for a, c in terms]
        if not all(bool(torch.isfinite(value)) for value in values):
            raise ValueError(
                f"rollouts: expected finite log-probabilities, got others among sequences {batch.rows.tolist()[:5]}; "
                "look for non-finite weights or advantages, or responses the policy cannot produce"
            )
        return values
