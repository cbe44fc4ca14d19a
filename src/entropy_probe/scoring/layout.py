"""Which ways of calling a model are right for it, tried on the rows of the batches that are the hardest.

A sequence's scores are what the whole model says of it alone, unpadded. Every faster way has to agree with that in
scores and in the gradient of every trained parameter, since a way may leave out what matters only once it is trained
(an adapter that starts at zero). A window shows in the longest and the most packed row, a switch with the length of the
call between the longest and the shortest; so these are compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from entropy_probe.parallel.shards import is_sharded, local
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.calls import PolicyCalls
from entropy_probe.scoring.isolation import of_this_thread
from entropy_probe.scoring.packing import bounded_groups, padded, row_tokens, shared_groups
from entropy_probe.scoring.sample import (
    REFUSALS,
    Sample,
    Seen,
    Tolerance,
    add,
    cut,
    difference,
    look,
    most_packed,
    name_of,
    rms,
    see,
    take_sample,
    words_of,
)


@dataclass(frozen=True, eq=False)
class Trials:
    """Trials of ways to call a policy on some batches, against the whole model on one sequence at a time.

    Gradients are compared on the first batch, scores on all. The policy is laid out in one way after the other.

    Attributes:
        calls: the policy.
        samples: what is tried of each batch.
        width: the model's hidden size, if it says.
        tolerance: what rounding may do.
    """

    calls: PolicyCalls
    samples: Sequence[Sample]
    width: int | None
    tolerance: Tolerance

    @classmethod
    def of(cls, calls: PolicyCalls, batches: Sequence[Rollouts], *, gradients: bool) -> Trials:
        """Sequences of some batches, called alone, and their gradients if they are to be compared, too.

        Raises:
            ValueError: if the model cannot be called, changes or has changed its parameters, or has scores that depend
                on later tokens or on what it was called on before.
        """
        _check_undivided(calls.model)
        named = calls.model.named_parameters() if gradients and not calls.sharded else ()
        trained = {name: p for name, p in named if p.requires_grad and p.is_floating_point()}
        width = getattr(getattr(calls.model, "config", None), "hidden_size", None)
        width = width if isinstance(width, int) else None
        before = [_content(p) for p in calls.model.parameters()]
        samples = [take_sample(calls, batch, {} if k else trained, width) for k, batch in enumerate(batches)]
        for (name, p), content in zip(calls.model.named_parameters(), before, strict=True):
            if _content(p) != content:
                raise ValueError(
                    f"model: expected a forward pass that leaves parameters as they are, but that of {name_of(calls)} "
                    f"changes {name}; it cannot be probed without a trace"
                )
        trials = cls(calls, samples, width, Tolerance.of(calls))
        if trials.finite:
            _check_plain(calls, samples, trials.tolerance)
        return trials

    @property
    def finite(self) -> bool:
        """Whether there is something to compare; scores that are not finite are refused once all are there."""
        return all(bool(torch.isfinite(x).all()) for sample in self.samples for x in sample.expected.scores.values())

    def head(self) -> tuple[tuple[nn.Module, nn.Linear] | None, str, str | None]:
        """Trunk and output layer if they are right; how logits are computed; why sequences need calls of their own."""
        calls, split = self.calls, _plain_head(self.calls.model)
        if not self.finite:
            return None, "logits (scores are not finite)", None
        if isinstance(split, str):
            whole = split
        else:
            calls.lay_out(split, alone=True)
            if not _head_is_final(calls, self.samples[0]):
                whole = "the model changes logits after its output layer"
            else:
                calls.lay_out(split)
                padding = self.difference()
                calls.lay_out(split, alone=True)
                wrong = padding and self.difference()
                if not wrong:
                    return split, "chunked", padding
                whole = f"through trunk and output layer alone {wrong}"
        calls.lay_out(None)
        return None, f"logits ({whole})", self.difference()

    def difference(self) -> str | None:
        """Why the policy cannot be called as it is laid out, without shared prompts; ``None`` if it can."""
        for sample in self.samples:
            try:
                seen = look(self.calls, sample.rollouts, sample.rows, sample.parameters)
            except torch.OutOfMemoryError:
                raise
            except REFUSALS as error:
                return words_of(error)
            why = difference(sample.expected, seen, self.tolerance)
            if why:
                return why
        return None

    def why_not_shared(self) -> str | None:
        """Why responses to one prompt cannot share a row; ``None`` if they can."""
        trunk, width = self.calls.trunk, self.width
        if trunk is None:
            return "the model's logits are computed as a whole"
        if width is None or "position_ids" not in inspect.signature(trunk.forward).parameters:
            return "the model takes no position ids"
        config = getattr(self.calls.model, "config", None)
        layers = set(getattr(config, "layer_types", None) or ["full_attention"])
        if getattr(config, "sliding_window", None) or layers != {"full_attention"}:
            return "the model does not attend to the whole context"
        if all(most_packed(self.calls, sample.rollouts, width) is None for sample in self.samples):
            return "no prompt has two responses of 3 tokens"
        why = self.shared_difference()
        return why and f"the model treats a shared prompt differently: {why}"

    def shared_difference(self) -> str | None:
        """Why the rows in which responses would share a prompt are not right; ``None`` if they are."""
        assert self.width is not None
        for sample in self.samples:
            why = _shared_difference(self.calls, sample, self.width, self.tolerance)
            if why:
                return why
        return None


def _content(parameter: Parameter) -> tuple[int, str]:
    """Enough of a parameter to notice that it was replaced or written into."""
    own = local(parameter.detach())
    return own.data_ptr(), float(own.sum(dtype=torch.float64)).hex()  # as text, in which NaN equals itself


def _check_undivided(model: nn.Module) -> None:
    """Make sure that RWKV's weights are those that are trained: evaluated, it keeps them divided by powers of two."""
    for module in model.modules():
        if vars(module).get("layers_are_rescaled") and module.config.rescale_every:  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(
                f"model: expected weights as they are trained, got those that {type(module).__name__} divided when it "
                "was evaluated; call it in training mode once, which restores them, or set rescale_every=0 in its "
                "configuration before it is evaluated"
            )


def _check_plain(calls: PolicyCalls, samples: Sequence[Sample], tolerance: Tolerance) -> None:
    """Make sure that the whole model's scores of one sequence are those of a policy.

    The longest sequence is cut after its first response token, in the middle, and before its last. The shortest is
    called in between, since a model may keep what the call before it needed.
    """
    calls.lay_out(None, alone=True)
    name = name_of(calls)
    sample = max(samples, key=lambda sample: int(sample.lengths.max()))
    shortest, longest = sample.rows[sample.lengths.argmin()][None], int(sample.rows[sample.lengths.argmax()])
    before = Seen({int(shortest): sample.expected.scores[int(shortest)]})
    why = difference(before, look(calls, sample.rollouts, shortest, {}), tolerance)
    if why:
        raise ValueError(
            f"model: expected scores of a sequence that do not depend on earlier calls, but {why} once {name} was "
            "called on a longer one; keep sequences within the length up to which it keeps nothing (for dynamic rotary "
            "embeddings the original context)"
        )
    response = sample.rollouts.response_mask[longest].nonzero()[:, 0]
    first, last = int(response[0]), int(response[-1])
    errors, sizes = [], []
    for column in sorted({first + 1, (first + last) // 2 + 1, last} - {first}):
        look(calls, sample.rollouts, shortest, {})
        truncated = look(calls, cut(sample.rollouts, longest, column), torch.tensor([longest]), {}).scores[longest]
        full = sample.expected.scores[longest][:, : truncated.shape[1]]
        errors.append(truncated - full)
        sizes.append(full)
    error = rms(torch.cat(errors, 1)) if errors else 0.0
    if errors and not error <= tolerance.scores * (1 + rms(torch.cat(sizes, 1))):
        raise ValueError(
            f"model: expected scores of a token that do not depend on later ones, but those of sequence {longest} "
            f"change by {error:.2g} nats when it is cut off: {name} looks ahead, or changes with the length of a "
            "sequence (rotary embeddings beyond the original context); use a causal model, or sequences on one side of "
            "that length"
        )


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
    return trunk, head


@torch.no_grad()
def _head_is_final(calls: PolicyCalls, sample: Sample) -> bool:
    """Whether the model's logits are its output layer's, also when these are scaled up to 100."""
    head = calls.head
    assert head is not None
    batch = calls.pack(sample.rollouts, sample.rows[:1])
    seen: list[Tensor] = []

    def scaled(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output * (100 / output.abs().max().clamp(min=1e-6)))
        return seen[-1]

    with head.register_forward_hook(of_this_thread(scaled)):
        logits = calls.model_logits(batch)
    if len(seen) != 1 or seen[0].shape[:2] != batch.input_ids.shape:
        return False
    output = seen[0].flatten(0, 1)[batch.source]
    tolerance = 2e-2 if output.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return bool(((logits - output).abs() <= 100 * tolerance).all())


def _shared_difference(calls: PolicyCalls, sample: Sample, width: int, tolerance: Tolerance) -> str | None:
    """Why the rows in which the sample's sequences would stand are not right; ``None`` if they are."""
    rollouts, everything = sample.rollouts, torch.arange(len(sample.rollouts))
    while True:
        groups, _ = shared_groups(rollouts, everything, width, calls.max_tokens, calls.context)
        rows = [group for group in groups if bool(torch.isin(group, sample.rows).any())]
        seen: Seen | None = Seen()
        for some in bounded_groups([padded(row_tokens(rollouts, row)) for row in rows], calls.max_tokens):
            try:
                batch = calls.pack_shared(rollouts, [rows[k] for k in some])
                outcome = calls.attempt(batch, lambda batch: see(calls, batch, sample.rows, sample.parameters))
            except torch.OutOfMemoryError:
                raise
            except REFUSALS as error:
                return words_of(error)
            if outcome is None:  # tried again with shorter rows
                seen = None
                break
            add(seen, outcome[0])
        if seen is not None:
            return difference(sample.expected, seen, tolerance)
