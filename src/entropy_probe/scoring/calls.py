"""How the policy is called on a microbatch: through the whole model, or its trunk with the output layer in chunks.

The attention mask is always passed. How sequences are laid out for the model is the business of
:mod:`entropy_probe.scoring.packing`, and which of the possible ways is right for it that of
:mod:`entropy_probe.scoring.layout`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from entropy_probe.parallel.shards import is_sharded, reshard
from entropy_probe.results.note import NOTHING_TO_DO, Note, NoteKind
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.logits import (
    FlatScores,
    OutputHead,
    head_scores,
    head_slopes,
    head_surrogate,
    logit_scores,
    plain_scores,
)
from entropy_probe.scoring.memory import fitting_tokens
from entropy_probe.scoring.packing import (
    Microbatch,
    bounded_groups,
    pack,
    pack_shared,
    padded,
    row_tokens,
    shared_prompts,
)
from entropy_probe.scoring.sheet import ScoreSheet
from entropy_probe.types import TokenCoefficients

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with sequences done and sequences in all."""

OUT_OF_MEMORY = NoteKind(
    "out_of_memory",
    "out of memory: max_tokens_per_microbatch was lowered to {tokens}",
    f"{NOTHING_TO_DO} Set probe.max_tokens_per_microbatch to save the retries.",
)


class PolicyCalls:
    """Calls of the policy, microbatch by microbatch, under the parameters that the model holds at the time.

    Args:
        model: called as ``model(input_ids=..., attention_mask=...)``, returning an object with ``.logits``.
        temperature: the sampling temperature, part of the policy.
        max_tokens_per_microbatch: the bound on padded tokens per forward pass, ``None`` for what fits; lowered where
            the device's memory is too small for it, which ``notes`` then says.
    """

    def __init__(self, model: nn.Module, temperature: float, max_tokens_per_microbatch: int | None) -> None:
        self.model = model
        self.temperature = temperature
        self.max_tokens = max_tokens_per_microbatch or fitting_tokens(model)
        self.notes: tuple[Note, ...] = ()
        self.device = next(model.parameters()).device
        self.sharded = is_sharded(model)
        self._split: tuple[nn.Module, nn.Linear] | None = None
        self._width: int | None = None
        self._alone = False
        context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        self.context = context if isinstance(context, int) and context > 0 else None
        # a cache is of no use here, and some models cannot make theirs
        inner = getattr(model, "get_base_model", lambda: model)()
        self._no_cache = {"use_cache": False} if "use_cache" in inspect.signature(inner.forward).parameters else {}

    @property
    def head(self) -> nn.Linear | None:
        """The output layer, if it is applied in chunks outside the model."""
        return None if self._split is None else self._split[1]

    @property
    def trunk(self) -> nn.Module | None:
        """What computes the output layer's inputs, if that is applied outside the model."""
        return None if self._split is None else self._split[0]

    def lay_out(
        self, split: tuple[nn.Module, nn.Linear] | None, *, alone: bool = False, width: int | None = None
    ) -> None:
        """Set how the policy is called; see :class:`~entropy_probe.scoring.layout.Layout`."""
        self._split, self._alone, self._width = split, alone, width

    @property
    def dtype(self) -> torch.dtype:
        """The type of an additive mask."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def _head(self) -> OutputHead:
        assert self._split is not None
        head = self._split[1]
        return OutputHead(head.weight, head.bias, self.temperature)

    def hidden(self, batch: Microbatch) -> Tensor:
        """Final hidden states at the positions that predict response tokens, ``[T, D]``."""
        assert self._split is not None
        positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        output = self._split[0](
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **positions
        )
        return output.last_hidden_state.flatten(0, 1)[batch.source]

    def model_logits(self, batch: Microbatch) -> Tensor:
        """The model's own logits at the positions that predict response tokens, ``[T, V]``."""
        reshard(self.model)  # whoever called it last may have left what it gathered
        try:
            output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **self._no_cache)
        finally:
            reshard(self.model)
        if output.logits.shape[:2] != batch.input_ids.shape:
            raise ValueError(
                f"model: expected logits for each of {list(batch.input_ids.shape)} tokens, got "
                f"{list(output.logits.shape[:2])}; adapters that add virtual tokens are not supported"
            )
        return output.logits.flatten(0, 1)[batch.source]

    def pack(self, rollouts: Rollouts, rows: Tensor) -> Microbatch:
        """Sequences one to a row, padded where the model may be called on several of them."""
        return pack(rollouts, rows, self.device, None if self._alone else self.context)

    def pack_shared(self, rollouts: Rollouts, groups: list[Tensor]) -> Microbatch:
        """Sequences of one prompt in a row, group by group."""
        return pack_shared(rollouts, groups, self.device, self.dtype, self.context)

    def microbatches(
        self, rollouts: Rollouts, rows: Tensor | None = None, *, share: bool = True
    ) -> Iterator[Microbatch]:
        """The batch, or some rows of it, in microbatches, one at a time; sequences without response are left out."""
        rows = torch.arange(len(rollouts)) if rows is None else rows
        rows = rows[rollouts.response_mask[rows].any(1)]
        if self._alone:
            yield from (self.pack(rollouts, row[None]) for row in rows)
            return
        shared = None
        if share and self._width:
            shared = shared_prompts(rollouts, rows, self._width, self.max_tokens, self.context)
        lengths = rollouts.attention_mask.sum(1)
        if shared is None:
            for group in bounded_groups([padded(n) for n in lengths[rows].tolist()], self.max_tokens):
                yield self.pack(rollouts, rows[group])
            return
        tokens = [row_tokens(rollouts, row) for row in shared]
        for group in bounded_groups([padded(n) for n in tokens], self.max_tokens):
            yield self.pack_shared(rollouts, [shared[i] for i in group])

    def each(
        self,
        rollouts: Rollouts,
        work: Callable[[Microbatch], T],
        rows: Tensor | None = None,
        *,
        share: bool = True,
        progress: Progress | None = None,
    ) -> Iterator[tuple[Microbatch, T]]:
        """Work on the batch, or some rows of it, microbatch by microbatch; on none without response tokens.

        A microbatch that does not fit the device's memory is cut again, with half its size as the bound from there on.
        So ``work`` must change nothing before it returns, since it may be given its rows again. ``progress`` is called
        once the caller is done with what ``work`` gave.

        Raises:
            MemoryError: if a single sequence does not fit.
        """
        left = torch.zeros(len(rollouts), dtype=torch.bool)
        left[slice(None) if rows is None else rows] = True
        left &= rollouts.response_mask.any(1)
        waiting, done = rows, 0
        while bool(left.any()):
            for batch in self.microbatches(rollouts, waiting, share=share):
                outcome = self.attempt(batch, work)
                if outcome is None:
                    break
                left[batch.rows] = False
                yield batch, outcome[0]
                done += len(batch.rows)
                if progress:
                    progress(done, len(rollouts))
            waiting = left.nonzero()[:, 0]

    def attempt(self, batch: Microbatch, work: Callable[[Microbatch], T]) -> tuple[T] | None:
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
        self.notes = (OUT_OF_MEMORY(tokens=self.max_tokens),)
        return None

    def scores(self, batch: Microbatch) -> FlatScores:
        """Scores of a microbatch's response tokens, ``[T]`` each, without a graph."""
        if self._split is None:
            return plain_scores(self.model_logits(batch), batch.targets, self.temperature)
        return head_scores(self._head(), self.hidden(batch), batch.targets)

    def token_scores(self, batch: Microbatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of a microbatch's response tokens, ``[T]`` each, in nats.

        Differentiable in forward and reverse mode, also repeatedly; in reverse mode all logits stay in memory.
        """
        if self._split is None:
            return logit_scores(self.model_logits(batch), batch.targets, self.temperature)
        head, size = self._head(), self._head().chunk_tokens()
        chunks = zip(self.hidden(batch).split(size), batch.targets.split(size), strict=True)
        logits = ((torch.nn.functional.linear(hidden, head.weight, head.bias), targets) for hidden, targets in chunks)
        s, h = zip(*(logit_scores(z, targets, self.temperature) for z, targets in logits), strict=True)
        return torch.cat(s), torch.cat(h)

    def token_slopes(self, batch: Microbatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """:meth:`token_scores` without a graph, and the derivatives of both, ``[T]`` each.

        To be called inside a level of forward mode, in which the model's parameters carry the tangents.
        """
        if self._split is not None:
            return head_slopes(self._head(), self.hidden(batch), batch.targets)
        values, slopes = zip(*map(unpack_dual, self.token_scores(batch)), strict=True)
        of_logprobs, of_entropies = (torch.zeros_like(values[0]) if x is None else x for x in slopes)
        return *values, of_logprobs, of_entropies

    def scores_and_surrogate(
        self, batch: Microbatch, of_logprobs: Tensor, of_entropies: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`scores`, and ``sum a s + c h`` to differentiate once, from one forward pass; all ``[T]``."""
        if self._split is None:
            s, h = self.token_scores(batch)
            value = torch.dot(of_logprobs.to(s.dtype), s) + torch.dot(of_entropies.to(h.dtype), h)
            return s.detach(), h.detach(), value
        hidden = self.hidden(batch)
        value = head_surrogate(self._head(), hidden, batch.targets, of_logprobs, of_entropies)
        s, h, *_ = head_scores(self._head(), hidden.detach(), batch.targets)
        return s, h, value

    def surrogates(
        self,
        batch: Microbatch,
        sides: Sequence[TokenCoefficients],
        consume_head: Callable[[int, slice, Tensor, Tensor], None] | None = None,
        sheet: ScoreSheet | None = None,
    ) -> list[Tensor]:
        """One scalar ``sum a s + c h`` over a microbatch per set of coefficients, all on the graph of one forward pass.

        Args:
            batch: the microbatch.
            sides: coefficients for every token of the whole batch, ``[N, L]``.
            consume_head: takes the place of gradients of :attr:`head`: called with a side's number and what
                :func:`~entropy_probe.scoring.logits.head_surrogate` says of each chunk of tokens.
            sheet: gets the scores of the tokens, which are computed on the way.

        Raises:
            ValueError: if a value is not finite.
        """
        terms = [(batch.gather(c.logprobs), None if c.entropies is None else batch.gather(c.entropies)) for c in sides]
        if self._split is not None:
            head, hidden, scored = self._head(), self.hidden(batch), []
            values = []
            for k, (a, c) in enumerate(terms):
                consume, scores = partial(consume_head, k) if consume_head else None, None if k else scored.append
                values.append(head_surrogate(head, hidden, batch.targets, a, c, consume, scores if sheet else None))
            if sheet:
                sheet.write(batch, FlatScores.joined(scored))
        else:
            logits = self.model_logits(batch)
            s, h = logit_scores(logits, batch.targets, self.temperature)
            values = [torch.dot(a.to(s.dtype), s) + (0 if c is None else torch.dot(c.to(h.dtype), h)) for a, c in terms]
            if sheet:
                sheet.write(batch, plain_scores(logits.detach(), batch.targets, self.temperature))
        if not all(bool(torch.isfinite(value)) for value in values):
            raise ValueError(
                f"rollouts: expected finite log-probabilities, got others among sequences {batch.rows.tolist()[:5]}; "
                "look for non-finite weights or advantages, or responses the policy cannot produce"
            )
        return values
