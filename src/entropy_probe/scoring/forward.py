"""Teacher forcing: scores of given responses, and surrogates to differentiate, in microbatches bounded by tokens.

Sequences are repacked without their padding, sorted by length, and padded on the right, so results do not depend on
the caller's padding side or order, and the model's default position ids are the true ones. The attention mask is
always passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from entropy_probe.scoring.logits import OutputHead, head_scores, head_surrogate, logit_scores
from entropy_probe.types import Rollouts, TokenCoefficients, TokenScores

__all__ = ["Microbatch", "Progress", "Scorer", "microbatch_rows"]

Progress = Callable[[int, int], None]
"""Called with sequences done and sequences in all."""


def microbatch_rows(lengths: Tensor, max_tokens: int, rows: Tensor | None = None) -> list[Tensor]:
    """Group sequences of similar length so that each group padded to its longest holds at most ``max_tokens``.

    A sequence longer than the bound gets a group of its own.

    Args:
        lengths: tokens of every sequence, ``[N]``.
        max_tokens: the bound.
        rows: which sequences to group; all by default.
    """
    rows = torch.arange(len(lengths)) if rows is None else rows
    order = rows[torch.argsort(lengths[rows], descending=True, stable=True)].tolist()
    groups: list[list[int]] = []
    for row in order:
        if groups and (len(groups[-1]) + 1) * int(lengths[groups[-1][0]]) <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [torch.tensor(group) for group in groups]


@dataclass(frozen=True, eq=False)
class Microbatch:
    """Some sequences of a batch, repacked with padding on the right.

    Attributes:
        rows: their indices in the caller's batch, ``[n]``.
        input_ids: ``[n, l]``.
        attention_mask: ``[n, l]``.
        predicts: true at positions whose next token is a response token, ``[n, l - 1]``.
        targets: those next tokens, row by row, ``[T]``.
        response_mask: the caller's response mask of these rows, ``[n, L]``, on the CPU.
    """

    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    predicts: Tensor
    targets: Tensor
    response_mask: Tensor

    @classmethod
    def pack(cls, rollouts: Rollouts, rows: Tensor, device: torch.device) -> Microbatch:
        """Repack the given rows and move them to ``device``."""
        attention = rollouts.attention_mask[rows]
        lengths = attention.sum(1)
        column = torch.arange(int(lengths.max()))
        source = (attention.int().argmax(1)[:, None] + column).clamp(max=attention.shape[1] - 1)
        real = column < lengths[:, None]
        ids = torch.where(real, rollouts.input_ids[rows].gather(1, source), 0)
        response = rollouts.response_mask[rows].gather(1, source) & real
        predicts = response[:, 1:]
        return cls(
            rows=rows,
            input_ids=ids.to(device),
            attention_mask=real.long().to(device),
            predicts=predicts.to(device),
            targets=ids[:, 1:][predicts].to(device),
            response_mask=rollouts.response_mask[rows],
        )

    def gather(self, values: Tensor) -> Tensor:
        """Per-token values ``[N, L]`` of the caller's batch at these response tokens, flat ``[T]``."""
        return values[self.rows][self.response_mask].to(self.targets.device)

    def scatter(self, flat: Tensor, out: Tensor) -> None:
        """Write flat values ``[T]`` back to their places in ``out`` ``[N, L]``."""
        block = torch.zeros(self.response_mask.shape, dtype=out.dtype)
        block[self.response_mask] = flat.to("cpu", out.dtype)
        out[self.rows] = block


def _plain_head(model: nn.Module) -> tuple[nn.Module, nn.Linear] | str:
    """The trunk and output layer of a Hugging Face causal language model, or why they cannot be separated."""
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
        max_tokens_per_microbatch: the bound on padded tokens per forward pass.
    """

    def __init__(self, model: nn.Module, temperature: float, max_tokens_per_microbatch: int) -> None:
        self.model = model
        self.temperature = temperature
        self.max_tokens = max_tokens_per_microbatch
        self.device = next(model.parameters()).device
        self._split: tuple[nn.Module, nn.Linear] | None = None
        self.head_path = "logits (not prepared)"

    def prepare(self, rollouts: Rollouts) -> None:
        """Check the batch against the model and choose how to compute logits.

        The trunk-and-head path is used only if it reproduces the model's own logits on the shortest sequence, which
        catches models that change logits after the output layer (soft caps, scales).

        Raises:
            ValueError: if a sequence is longer than the model's context or a token is outside its vocabulary.
        """
        self._check_fits(rollouts)
        split = _plain_head(self.model)
        if isinstance(split, str):
            self._split, self.head_path = None, f"logits ({split})"
            return
        row = rollouts.attention_mask.sum(1).argmin()[None]
        batch = Microbatch.pack(rollouts, row, self.device)
        self._split = split
        if self._head_is_final(batch):
            self.head_path = "chunked"
        else:
            self._split, self.head_path = None, "logits (the model changes logits after its output layer)"

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

    def _check_fits(self, rollouts: Rollouts) -> None:
        config = getattr(self.model, "config", None)
        context = getattr(config, "max_position_embeddings", None)
        lengths = rollouts.attention_mask.sum(1)
        if isinstance(context, int) and int(lengths.max()) > context:
            raise ValueError(
                f"rollouts: expected at most {context} tokens per sequence (the model's context), got "
                f"{int(lengths.max())} at index {int(lengths.argmax())}; drop or shorten long prompts"
            )
        vocabulary = getattr(config, "vocab_size", None)
        largest = int(rollouts.input_ids[rollouts.attention_mask].max())
        if isinstance(vocabulary, int) and largest >= vocabulary:
            raise ValueError(
                f"rollouts: expected token ids below {vocabulary} (the model's vocabulary), got {largest}; "
                "were they tokenized for another model?"
            )

    def _head(self) -> OutputHead:
        assert self._split is not None
        head = self._split[1]
        return OutputHead(head.weight, head.bias, self.temperature)

    def _hidden(self, batch: Microbatch) -> Tensor:
        """Final hidden states at the positions that predict response tokens, ``[T, D]``."""
        assert self._split is not None
        output = self._split[0](input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return output.last_hidden_state[:, :-1][batch.predicts]

    def _model_logits(self, batch: Microbatch) -> Tensor:
        """The model's own logits at the positions that predict response tokens, ``[T, V]``."""
        output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        return output.logits[:, :-1][batch.predicts]

    def microbatches(self, rollouts: Rollouts, rows: Tensor | None = None) -> Iterator[Microbatch]:
        """The batch, or some rows of it, cut into microbatches, one at a time."""
        lengths = rollouts.attention_mask.sum(1)
        for group in microbatch_rows(lengths, self.max_tokens, rows):
            yield Microbatch.pack(rollouts, group, self.device)

    @torch.no_grad()
    def score(self, rollouts: Rollouts, progress: Progress | None = None) -> TokenScores:
        """Log-probabilities and entropies of every response token, in nats, in the caller's layout, on the CPU.

        Raises:
            ValueError: if a score is not finite.
        """
        wide = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        logprobs = torch.zeros(rollouts.input_ids.shape, dtype=wide)
        entropies = torch.zeros_like(logprobs)
        done = 0
        for batch in self.microbatches(rollouts):
            if self._split is None:
                s, h = logit_scores(self._model_logits(batch), batch.targets, self.temperature)
            else:
                s, h = head_scores(self._head(), self._hidden(batch), batch.targets)
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

    def surrogates(self, batch: Microbatch, sides: Sequence[TokenCoefficients]) -> list[Tensor]:
        """One scalar ``sum a s + c h`` over a microbatch per set of coefficients, all on the graph of one forward pass.

        Args:
            batch: the microbatch.
            sides: coefficients for every token of the whole batch, ``[N, L]``.
        """
        terms = [(batch.gather(c.logprobs), None if c.entropies is None else batch.gather(c.entropies)) for c in sides]
        if self._split is not None:
            hidden = self._hidden(batch)
            return [head_surrogate(self._head(), hidden, batch.targets, a, c) for a, c in terms]
        s, h = logit_scores(self._model_logits(batch), batch.targets, self.temperature)
        return [torch.dot(a.to(s.dtype), s) + (0 if c is None else torch.dot(c.to(h.dtype), h)) for a, c in terms]
