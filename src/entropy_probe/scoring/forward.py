"""Teacher forcing: scores of given responses, and surrogates to differentiate, in microbatches bounded by tokens."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.calls import PolicyCalls, Progress
from entropy_probe.scoring.layout import Trials
from entropy_probe.scoring.sheet import ScoreSheet
from entropy_probe.types import TokenScores


class Scorer(PolicyCalls):
    """Scores and differentiates responses under the parameters that the model holds at the time of the call.

    Args:
        model: called as ``model(input_ids=..., attention_mask=...)``, returning an object with ``.logits``. A Hugging
            Face causal language model whose logits are a plain linear function of its last hidden state is run
            through its trunk, with the output layer applied in chunks; :meth:`prepare` checks that this is so.
        temperature: the sampling temperature, part of the policy.
        max_tokens_per_microbatch: the bound on padded tokens per forward pass, ``None`` for what fits; lowered where
            the device's memory is too small for it, which ``notes`` then says.
    """

    def __init__(self, model: nn.Module, temperature: float, max_tokens_per_microbatch: int | None) -> None:
        super().__init__(model, temperature, max_tokens_per_microbatch)
        self.head_path = "logits (not prepared)"
        self.prefix_sharing = "off (not prepared)"

    def prepare(self, *batches: Rollouts) -> None:
        """Check batches against the model and choose how to call it; to be called before anything else.

        Every faster way than calling the whole model on one sequence at a time is used only if it gives the same
        scores and gradients on the longest, the shortest and the most packed rows of the batches
        (:class:`~entropy_probe.scoring.layout.Trials`).

        Raises:
            ValueError: if a sequence is longer than the model's context or a token is outside its vocabulary; or if
                the model's scores depend on later tokens or on what it was called on before.
        """
        for batch in batches:
            self.check_fits(batch)
        trials = Trials.of(self, batches, gradients=True)
        split, self.head_path, alone = trials.head()
        self.lay_out(split, alone=alone is not None)
        unshared = f"one sequence per call: {alone}" if alone else trials.why_not_shared()
        self.prefix_sharing = "on" if unshared is None else f"off ({unshared})"
        self.lay_out(split, alone=alone is not None, width=None if unshared else trials.width)

    def check_also(self, rollouts: Rollouts) -> None:
        """Check one more batch, once prepared, against the model and the way in which it is called.

        Raises:
            ValueError: as :meth:`prepare`, or if what was chosen there is not right for this batch.
        """
        self.check_fits(rollouts)
        tried = copy.copy(self)
        trials = Trials.of(tried, [rollouts], gradients=False)
        tried.lay_out(self._split, alone=self._alone, width=self._width)
        why = trials.difference() or (self._width and trials.shared_difference())
        self.max_tokens, self.notes = tried.max_tokens, tried.notes
        if why:
            raise ValueError(
                f"rollouts: expected sequences that the model treats as those it was tried on, but {why}; keep to the "
                "lengths of those"
            )

    def check_fits(self, rollouts: Rollouts) -> None:
        """Check a batch against the model's context and vocabulary; raises as :meth:`prepare` does."""
        config, context = getattr(self.model, "config", None), self.context
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

    @torch.no_grad()
    def shortest_scores(self, rollouts: Rollouts) -> list[tuple[str, Tensor]]:
        """What the policy makes of the shortest sequence, unchecked: each of its scores, ``[T]``."""
        return list(self.scores(self.pack(rollouts, rollouts.shortest_first[:1]))._asdict().items())

    @torch.no_grad()
    def score(self, rollouts: Rollouts, progress: Progress | None = None, *, share: bool = True) -> TokenScores:
        """Log-probabilities and entropies of every response token, in nats, in the caller's layout, on the CPU.

        Without ``share`` no prompts are shared: that layout's scores differ by rounding only.

        Raises:
            ValueError: if a score is not finite.
        """
        sheet = ScoreSheet(rollouts, self.model)
        for batch, scores in self.each(rollouts, self.scores, share=share, progress=progress):
            sheet.write(batch, scores)
        return sheet.read()
