"""Walks the causal language model classes of transformers: each is right, or refused by name in one line.

``python -m tests.architectures > docs/architectures.md`` writes the table; ``test_architectures.py`` keeps it true.
"""

from __future__ import annotations

import re
import sys
import textwrap
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch import nn

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.losses.trl import TRLLoss
from entropy_probe.sampling import HFGenerator, SamplingParameters
from tests.notes import texts
from tests.tiny_architectures import UNBUILT, VARIANTS, register, tiny_model

CONFIG = ProbeConfig(
    measure_noise_floor=False,
    learning_rate=1e-4,
    evaluation_unit="sequence",
    loss=TRLLoss(router_aux_loss_coef=0.0),
)
RIGHT, REFUSED, WRONG = "right", "refused", "WRONG"

SHORT = {
    "sampling goes on ": "",
    "recomputing whole sequences at every token, which is slow": "recomputed",
    "with the model's cache and prompts of one length to a batch": "cache, one prompt length",
    "with the model's cache": "cache",
}


@dataclass(frozen=True)
class Row:
    """What was found about a model type.

    Attributes:
        name: the model type, and what was set.
        scores: how logits were computed.
        sharing: whether responses to one prompt share a row, or why not.
        gradients: how per-sample gradients were computed.
        sampling: with the model's cache, or how else.
        verdict: right, refused, or what is wrong.
        detail: the refusals' lines, or the differences.
    """

    name: str
    scores: str
    sharing: str
    gradients: str
    sampling: str
    verdict: str
    detail: str


class Plain(nn.Module):
    """The same model called on one sequence at a time, without padding, mask or cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: object) -> SimpleNamespace:
        rows = []
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            logits = plain_logits(self.inner, ids[mask])
            rows.append(logits.new_zeros(len(ids), logits.shape[-1]).index_put((mask.nonzero()[:, 0],), logits))
        return SimpleNamespace(logits=torch.stack(rows))


def plain_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``[l, V]`` of the model's own call on the tokens, ``[l]``."""
    return model(input_ids=ids[None], use_cache=False).logits[0]


def batch(prompts: int, group: int, seed: int) -> Rollouts:
    """Random prompts of 5 to 12 tokens and responses of 2 to 9, with advantages."""
    g = torch.Generator().manual_seed(seed)
    number, width = prompts * group, 21
    ids = torch.randint(3, 64, (prompts, width), generator=g).repeat_interleave(group, 0)
    starts = torch.randint(5, 13, (prompts, 1), generator=g).repeat_interleave(group, 0)
    ends = starts + torch.randint(2, 10, (number, 1), generator=g)
    ends[0], ends[1] = starts[0] + 9, starts[1] + 9
    column = torch.arange(width)
    response = (column >= starts) & (column < ends)
    ids = torch.where(response, torch.randint(3, 64, (number, width), generator=g), ids)
    return Rollouts(
        input_ids=ids,
        attention_mask=column < ends,
        response_mask=response,
        prompt_ids=torch.arange(prompts).repeat_interleave(group),
        advantages=torch.randn(number, generator=g),
    )


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    """AdamW after three steps on random gradients, with the parameters as before them."""
    g = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    saved = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        for p in model.parameters():
            p.grad = 0.1 * torch.randn(p.shape, generator=g)
        optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for p, value in zip(model.parameters(), saved, strict=True):
            p.copy_(value)
    return optimizer


def by_hand(model: nn.Module, update: Rollouts, evaluation: Rollouts) -> tuple[float, float]:
    """The entropy per token of the evaluation batch, and the norm of the update's gradient."""
    if hasattr(model.config, "rescale_every"):  # RWKV divides weights when it is evaluated: those trained are others
        model.config.rescale_every = 0
    entropy = 0.0
    with torch.no_grad():
        for ids, real, response in zip(
            evaluation.input_ids, evaluation.attention_mask, evaluation.response_mask, strict=True
        ):
            log_p = plain_logits(model, ids[real]).double().log_softmax(-1)[:-1]
            entropy -= float((log_p.exp() * log_p).sum(-1)[response[real][1:]].sum())
    tokens = int(update.response_mask.sum())
    assert update.advantages is not None
    for i, advantage in enumerate(update.advantages.tolist()):
        real = update.attention_mask[i]
        ids, response = update.input_ids[i, real], update.response_mask[i, real][1:]
        log_p = plain_logits(model, ids).log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
        (-advantage * log_p[response].sum() / tokens).backward()
    norm = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    for p in model.parameters():
        p.grad = None
    return entropy / int(evaluation.response_mask.sum()), norm


def refusal(error: ValueError) -> str:
    """The line that a user sees; an error of the model's own code is no refusal and goes on."""
    if "entropy_probe" not in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts:
        raise error
    return " ".join(str(error).split())


def scored(name: str, update: Rollouts, evaluation: Rollouts) -> tuple[tuple[str, str, str], list[str], str | None]:
    """How the probe computed, what is wrong with its numbers, and the line it refused with."""
    model = tiny_model(name)
    try:
        found = EntropyProbe(model, optimizer_of(model), CONFIG).run(update=update, evaluation=evaluation)
    except ValueError as error:
        return ("–", "–", "–"), [], refusal(error)
    entropy, norm = by_hand(tiny_model(name), update, evaluation)
    wrapped = Plain(tiny_model(name))
    plain = EntropyProbe(wrapped, optimizer_of(wrapped), CONFIG).run(update=update, evaluation=evaluation)
    assert found.predicted is not None
    assert plain.predicted is not None
    pairs = [
        ("H", found.entropy.value, entropy, 1e-5),
        ("gradient norm", found.diagnostics.gradient_norm, norm, 1e-3),
        ("δH₁", found.predicted.value, plain.predicted.value, 5e-3),
        ("its error", found.predicted.standard_error, plain.predicted.standard_error, 5e-3),
    ]
    wrong = [
        f"{what} {a:.6g} for {b:.6g}"
        for what, a, b, tolerance in pairs
        if (a is None) != (b is None) or (a is not None and not abs(a - b) <= tolerance * abs(b))
    ]
    d = found.diagnostics
    return (d.head, d.prefix_sharing, d.per_sample_gradients), wrong, None


def sampled(name: str) -> tuple[str, list[str], str | None]:
    """How the sampler decoded, what is wrong with its log-probabilities, and the line it refused with."""
    model = tiny_model(name)
    prompts = [[5, 6, 7, 8, 9, 10, 11]] * 3 + [[9, 8, 7]] * 2 + [[20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31]] * 3
    engine = HFGenerator(model, SimpleNamespace(eos_token_id=2), batch_size=8)
    try:
        completions = engine.generate(prompts, SamplingParameters(1.0, 10), range(len(prompts)))
    except ValueError as error:
        return "–", [], refusal(error)
    model = tiny_model(name)
    worst = 0.0
    for completion in completions:
        ids = torch.tensor(completion.prompt_token_ids + completion.token_ids)
        start = len(completion.prompt_token_ids)
        with torch.no_grad():
            log_p = plain_logits(model, ids)[start - 1 : -1].double().log_softmax(-1)
        gap = log_p.gather(-1, ids[start:, None])[:, 0] - torch.tensor(completion.logprobs, dtype=torch.float64)
        worst = max(worst, float(gap.abs().max()))
    how = "; ".join(texts(engine.notes)) or "cache"
    for long, short in SHORT.items():
        how = how.replace(long, short)
    return how, [f"sampled log-probabilities off by {worst:.2g}"] if not worst < 1e-3 else [], None


def examine(name: str) -> Row:
    """Try a model type; an error that is no refusal is not caught."""
    update, evaluation = batch(3, 4, 1), batch(4, 2, 2)
    (head, sharing, gradients), wrong, unscored = scored(name, update, evaluation)
    how, off, unsampled = sampled(name)
    wrong, refusals = [*wrong, *off], [line for line in (unscored, unsampled) if line is not None]
    verdict = WRONG if wrong else REFUSED if refusals else RIGHT
    return Row(name, head, sharing, gradients, how, verdict, "; ".join(wrong or refusals))


def walk(names: tuple[str, ...] = ()) -> Iterator[Row]:
    """All model types that can be built here, and some settings of them."""
    for name in names or (*register(), *VARIANTS):
        if name not in UNBUILT:
            yield examine(name)


def brief(text: str) -> str:
    """Without what differs from machine to machine, and not longer than a cell of a table bears."""
    text = re.sub(r"(by|to) [0-9.e+-]+ nats( per token)?", r"\1 some nats", text)
    return textwrap.shorten(text.replace("|", "/"), 150, placeholder=" …")


def line(row: Row) -> str:
    """A row of the table."""
    cells = (row.name, row.scores, row.sharing, row.gradients, row.sampling, row.verdict, row.detail)
    return "| " + " | ".join(brief(cell) for cell in cells) + " |"


HEAD = """# Architectures

What the probe makes of every causal language model class that transformers registers, tiny and with random weights
(written by `python -m tests.architectures`, kept true by `make test-full`).

*Right*: the entropy, the norm of the update gradient, the predicted change with its error, and the sampler's
log-probabilities agree with plain calls of the model on one sequence at a time, without padding and without a cache.
*Refused*: one line says why, and no number is given.

| model type | scores | shared prompts | per-sample gradients | sampling | verdict | why |
|---|---|---|---|---|---|---|"""


def document(rows: Iterable[Row]) -> str:
    """The whole of docs/architectures.md."""
    rows = list(rows)
    counts = Counter(row.verdict for row in rows)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (RIGHT, REFUSED, WRONG) if counts[verdict])
    unbuilt = [f"- `{name}`: {reason}" for name, reason in UNBUILT.items()]
    tail = [f"{len(rows)} tried with transformers {transformers.__version__}: {summary}. Not built here:"]
    return "\n".join([HEAD, *map(line, rows), "", *tail, "", *unbuilt, ""])


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(document(walk(tuple(sys.argv[1:]))), end="")  # noqa: T201
