"""The tables of an attribution: columns, order, text, and what pandas makes of them."""

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from entropy_probe import EntropyProbe, ProbeResult, Rollouts
from entropy_probe.results.attribution_tables import TABLES
from tests.invariants.problems import batches, probe
from tests.reference.enumeration import TinyPolicy, trained_optimizer
from tests.tiny import tiny_policy

UNIT = "nats/token"


@pytest.fixture(scope="module")
def found():
    model = TinyPolicy()
    update, evaluation = batches()
    subject = probe(model, trained_optimizer(model), horizon=None)
    return subject.attribute(update=update, evaluation=evaluation, folds=4)


def test_tables_say_what_their_columns_are(found, tmp_path):
    found.save(tmp_path)
    for file, columns in TABLES.items():
        schema = pq.read_schema(tmp_path / file)
        assert {field.name: str(field.type) for field in schema} == {
            name: {"float64": "double"}.get(kind, kind) for name, (kind, _, _) in columns.items()
        }
        for field in schema:
            assert field.metadata[b"description"].decode() == columns[field.name][2]
        units = {field.name: field.metadata[b"unit"].decode() for field in schema}
        assert all(units[name] == UNIT for name in units if name in ("contribution", "gradient", "standard_error"))
    assert ProbeResult.load(tmp_path).attribution == found.summary


def test_tokens_in_batch_order(found, tmp_path):
    found.save(tmp_path)
    tokens = pd.read_parquet(tmp_path / "tokens.parquet")
    update, mask = found.update, found.update.response_mask
    assert tokens.response_id.tolist() == mask.nonzero()[:, 0].tolist()
    assert tokens.position.tolist() == [t for n in mask.sum(1).tolist() for t in range(n)]
    assert tokens.token_id.tolist() == update.input_ids[mask].tolist()
    assert tokens.prompt_id.tolist() == update.prompt_ids.repeat_interleave(mask.sum(1)).tolist()
    assert tokens.text.tolist() == [f"<{i}>" for i in tokens.token_id]
    for name, values in (
        ("advantage", update.token_advantages),
        ("logprob", found.scores.logprobs),
        ("entropy", found.scores.entropies),
        ("contribution", found.tokens),
        ("covariance", found.covariances),
    ):
        assert tokens[name].tolist() == values[mask].tolist()
    assert tokens.contribution.sum() == pytest.approx(found.summary.gradient, rel=1e-10)


def test_prompts_and_layers_sum_to_the_same(found, tmp_path):
    found.save(tmp_path)
    tokens, prompts, layers = (pd.read_parquet(tmp_path / file) for file in TABLES)
    grouped = tokens.groupby("prompt_id")
    assert prompts.prompt_id.tolist() == list(grouped.groups)
    assert prompts.contribution.tolist() == pytest.approx(grouped.contribution.sum().tolist(), rel=1e-9, abs=1e-18)
    assert prompts.covariance.tolist() == pytest.approx(grouped.covariance.sum().tolist(), rel=1e-9, abs=1e-15)
    assert prompts.num_tokens.tolist() == grouped.size().tolist()
    assert prompts.num_responses.tolist() == [4] * len(prompts)
    rewards = [found.update.rewards[found.update.prompt_ids == p].mean().item() for p in prompts.prompt_id]
    assert prompts.mean_reward.tolist() == pytest.approx(rewards, rel=1e-12)
    assert prompts.standard_error.tolist() == found.standard_errors.tolist()
    assert prompts.prompt.isna().all()
    assert layers.layer.tolist() == ["embed", "inner", "out"]
    assert layers.num_parameters.tolist() == [20, 30, 24]
    assert layers.total.sum() == pytest.approx(found.result.predicted.value, rel=1e-10)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_text_with_a_tokenizer_and_nothing_where_there_is_nothing(tmp_path):
    model, tokenizer = tiny_policy()
    texts = [("1+2=", "3"), ("1+2=", "34"), ("7+8=", "15"), ("7+8=", "1")]
    rows = [(tokenizer.encode(p), [*tokenizer.encode(r), tokenizer.eos_token_id]) for p, r in texts]
    ids, mask, response = (torch.zeros(4, 8, dtype=torch.long) for _ in range(3))
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        mask[i, : len(prompt) + len(answer)] = 1
        response[i, len(prompt) : len(prompt) + len(answer)] = 1
    update = Rollouts(ids, mask, response, torch.tensor([5, 5, 2, 2]), advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    found = EntropyProbe(model, optimizer).attribute(update=update, evaluation=update)
    found.save_tables(tmp_path, tokenizer)
    tokens, prompts = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("tokens", "prompts"))
    assert "".join(tokens.text[tokens.response_id == 1]) == "34" + tokenizer.eos_token
    assert prompts.prompt.tolist() == ["7+8=", "1+2="]
    assert prompts.standard_error.isna().all()
    assert prompts.mean_reward.isna().all()
    assert not (tmp_path / "results.json").exists()


class SpaceEater:
    """Like tokenizers of the SentencePiece kind, it drops the space that a text starts with."""

    pieces = ("a", " word", "er", "\ufffd")

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [0] if text == "a" else []

    def decode(self, ids, clean_up_tokenization_spaces):
        assert not clean_up_tokenization_spaces
        return "".join(self.pieces[i] for i in ids).removeprefix(" ")


def test_tokens_keep_their_leading_space(found, tmp_path):
    found.save_tables(tmp_path, SpaceEater())
    tokens = pd.read_parquet(tmp_path / "tokens.parquet")
    assert tokens.text.tolist() == [SpaceEater.pieces[i] for i in tokens.token_id]
