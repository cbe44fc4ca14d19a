"""An attribution as users get it: contributions that add up, and the tables they are saved in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.analyses.chat import markup_tokens, user_turn
from entropy_probe.analyses.overlap import Contents
from entropy_probe.results.attribution import AttributionSummary
from entropy_probe.results.attribution_tables import LAYERS_FILE, PROMPTS_FILE, TABLES, TOKENS_FILE, write_table
from entropy_probe.results.probe import ProbeResult
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenScores


@dataclass(frozen=True)
class LayerShare:
    """What the parameters of one kind of module in one layer add to the first-order change.

    Attributes:
        layer: such as ``model.layers.0`` or ``lm_head``.
        module: such as ``q_proj``; the layer's own name where it is a single module.
        num_parameters: trained elements.
        gradient: through the fresh gradient, in the attribution's unit.
        momentum: through the first moment.
        weight_decay: through weight decay.
        rounding: through rounding to the precision that training keeps its weights in.
    """

    layer: str
    module: str
    num_parameters: int
    gradient: float
    momentum: float
    weight_decay: float
    rounding: float = 0.0

    @property
    def total(self) -> float:
        """All four."""
        return self.gradient + self.momentum + self.weight_decay + self.rounding


@dataclass(frozen=True, eq=False)
class Contributions:
    """What an attribution says of tokens and prompts, as it is held against real steps.

    Attributes:
        update: the update batch, as given.
        evaluation: what the evaluation batch holds.
        horizon: how many tokens after a changed one count in every contribution; ``None`` for the whole response.
        tokens: each response token's contribution, 0 off the response, float64, ``[N, L]``.
        prompts: contributions of the distinct prompts, by increasing prompt id, float64, ``[B]``.
    """

    update: Rollouts
    evaluation: Contents
    horizon: int | None
    tokens: Float[Tensor, "N L"]
    prompts: Float[Tensor, " B"]


@dataclass(frozen=True, eq=False)
class Attribution:
    """The first-order change of a step, divided over what it comes from.

    Contributions are in ``summary.unit`` (nats per token or per sequence of the evaluation batch's entropy) and add up:
    tokens to :attr:`sequences`, these to :attr:`prompts`, these to the gradient part; layers to all three parts.

    Attributes:
        result: the prediction (and the measurement, if asked for), with :attr:`summary` in it.
        update: the update batch, as given.
        prompt_of_sequence: the prompt that each of its sequences counts for, ``[N]``: its id, but equal prompts and
            those of one trajectory under the smallest of theirs.
        evaluation: what the evaluation batch holds.
        scores: its log-probabilities and entropies, nats.
        tokens: each response token's contribution, 0 off the response, float64, ``[N, L]``.
        covariances: each token's covariance term of Cui et al. (2025), float64, ``[N, L]``.
        prompts: contributions of the distinct prompts, by increasing prompt id, float64, ``[B]``.
        standard_errors: of :attr:`prompts`, from folds of the evaluation batch, ``[B]``; ``None`` unless asked for.
        layers: contributions of layers and modules, in the model's order.
    """

    result: ProbeResult
    update: Rollouts
    prompt_of_sequence: Int[Tensor, " N"]
    evaluation: Contents
    scores: TokenScores
    tokens: Float[Tensor, "N L"]
    covariances: Float[Tensor, "N L"]
    prompts: Float[Tensor, " B"]
    standard_errors: Float[Tensor, " B"] | None
    layers: tuple[LayerShare, ...]

    @property
    def summary(self) -> AttributionSummary:
        """The numbers that go into ``results.json``."""
        assert self.result.attribution is not None
        return self.result.attribution

    @property
    def contributions(self) -> Contributions:
        """What a validation takes of it."""
        return Contributions(self.update, self.evaluation, self.summary.horizon, self.tokens, self.prompts)

    @property
    def sequences(self) -> Float[Tensor, " N"]:
        """Contributions of the update batch's sequences, float64."""
        return self.tokens.sum(1)

    @property
    def prompt_ids(self) -> Int[Tensor, " B"]:
        """The distinct prompt ids, in the order of :attr:`prompts`."""
        return self.prompt_of_sequence.unique()

    def save(self, directory: str | Path, tokenizer: Any = None, names: Mapping[int, str] = {}) -> None:
        """Write the result and the three tables into ``directory`` (made if missing).

        Args:
            directory: gets ``results.json``, ``tokens.parquet``, ``prompts.parquet`` and ``layers.parquet``; columns
                and units in ``docs/attribution.md``.
            tokenizer: decodes tokens and prompts; without one, a token's text is its id and prompts have none.
            names: what to call prompts, by id. Others are called by their last user message, which is found with the
                tokenizer's chat template.
        """
        self.save_tables(directory, tokenizer, names)
        self.result.save(directory)

    def save_tables(self, directory: str | Path, tokenizer: Any = None, names: Mapping[int, str] = {}) -> None:
        """:meth:`save` without ``results.json``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        markup = () if tokenizer is None else markup_tokens(tokenizer)
        for file, columns in _tables(self, tokenizer, names).items():
            texts = "\0".join(filter(None, columns.get("prompt") or dict.fromkeys(columns.get("text", ()))))
            write_table(directory / file, columns, self.summary.unit, [token for token in markup if token in texts])


def _tables(attribution: Attribution, tokenizer: Any, names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """The columns of the three tables, by file."""
    update, mask = attribution.update, attribution.update.response_mask
    rows, columns = mask.nonzero(as_tuple=True)
    token_ids = update.input_ids[rows, columns]
    distinct = token_ids.unique().tolist()
    texts = dict(zip(distinct, _token_texts(distinct, tokenizer), strict=True))
    tokens = {
        "prompt_id": attribution.prompt_of_sequence[rows],
        "response_id": rows,
        "position": columns - mask.int().argmax(1)[rows],
        "token_id": token_ids,
        "text": [texts[token] for token in token_ids.tolist()],
        "advantage": update.token_advantages[rows, columns].double(),
        "logprob": attribution.scores.logprobs[rows, columns].double(),
        "entropy": attribution.scores.entropies[rows, columns].double(),
        "contribution": attribution.tokens[rows, columns],
        "covariance": attribution.covariances[rows, columns],
    }
    layers = {name: [getattr(layer, name) for layer in attribution.layers] for name in TABLES[LAYERS_FILE]}
    return {TOKENS_FILE: tokens, PROMPTS_FILE: _prompt_columns(attribution, tokenizer, names), LAYERS_FILE: layers}


def _prompt_columns(attribution: Attribution, tokenizer: Any, names: Mapping[int, str]) -> dict[str, Any]:
    update = attribution.update
    members = [(attribution.prompt_of_sequence == prompt).nonzero()[:, 0] for prompt in attribution.prompt_ids]
    # the first with a response, which says where the prompt ends
    first = [int(m[update.response_mask[m].any(1).int().argmax()]) for m in members]
    lengths, covariances = update.response_lengths, attribution.covariances.sum(1)
    none = [None] * len(members)
    texts = none if tokenizer is None else [_prompt_text(attribution, row, tokenizer) for row in first]
    turn = user_turn(tokenizer)
    return {
        "prompt_id": attribution.prompt_ids,
        "prompt": texts,
        "name": [
            names.get(prompt) or (turn.last_message(text) if turn and text else None)
            for prompt, text in zip(attribution.prompt_ids.tolist(), texts, strict=True)
        ],
        "num_responses": [len(m) for m in members],
        "num_tokens": [int(lengths[m].sum()) for m in members],
        "mean_reward": none if update.rewards is None else [update.rewards[m].double().mean().item() for m in members],
        "contribution": attribution.prompts,
        "standard_error": none if attribution.standard_errors is None else attribution.standard_errors,
        "covariance": [covariances[m].sum().item() for m in members],
    }


def _prompt_text(attribution: Attribution, row: int, tokenizer: Any) -> str:
    update = attribution.update
    before = update.attention_mask[row] & (update.response_mask[row].cumsum(0) == 0)
    return tokenizer.decode(update.input_ids[row, before].tolist(), clean_up_tokenization_spaces=False)


def _token_texts(token_ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Each token as it reads inside a text: some tokenizers drop the space that a first token starts with."""
    if tokenizer is None:
        return [f"<{token}>" for token in token_ids]
    anchor = tokenizer.encode("a", add_special_tokens=False)
    start = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    behind = [tokenizer.decode([*anchor, token], clean_up_tokenization_spaces=False) for token in token_ids]
    return [
        text.removeprefix(start)
        if text.startswith(start)
        else tokenizer.decode([token], clean_up_tokenization_spaces=False)
        for token, text in zip(token_ids, behind, strict=True)
    ]
