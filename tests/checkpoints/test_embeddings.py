"""Embeddings that peft saves along an adapter are those of training again, to the bit, whatever rows the base has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from entropy_probe import load_checkpoint
from entropy_probe.checkpoints import MismatchError, inspect_checkpoint
from tests.checkpoints.conftest import edit_tensors
from tests.tiny import tiny_policy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:`is_gradient:FutureWarning")
TOKENS = torch.arange(1, 62, 5)[None]
BASE_ROWS = 104
"""Six more than there are tokens."""
ATTENTION = {"target_modules": ["q_proj"]}
SAVED_WHOLE = {**ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}
NEW_TOKENS = {**ATTENTION, "trainable_token_indices": {"embed_tokens": [3, 90]}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether embedding and output layer are tied."""
    places = {}
    for tied in (False, True):
        places[tied] = tmp_path_factory.mktemp("tied" if tied else "untied") / "base"
        model, tokenizer = tiny_policy(num_layers=1, tie_word_embeddings=tied)
        model.resize_token_embeddings(BASE_ROWS)
        model.save_pretrained(places[tied])
        tokenizer.save_pretrained(places[tied])
    return places


def checkpoint(base: Path, place: Path, adapter: dict[str, Any], rows: int | None, **saving: Any) -> torch.nn.Module:
    """Two steps of training, saved by peft; the model as it was saved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows)
    model.train()
    policy = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **adapter))
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained, "weight_decay": 0.0}, {"params": [], "weight_decay": 0.0}])
    for _ in range(2):
        optimizer.zero_grad()
        policy(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    policy.save_pretrained(place, **saving)
    torch.save(optimizer.state_dict(), place / "optimizer.pt")
    return policy.eval()


def assert_policy(state: Any, trained: torch.nn.Module) -> None:
    """The same parameters, those included that are not computed with, and the same logits."""
    expected = dict(trained.named_parameters())
    for name, parameter in state.model.named_parameters():
        assert torch.equal(parameter, expected.pop(name)), name
        assert parameter.requires_grad == trained.get_parameter(name).requires_grad
    assert not expected
    assert torch.equal(state.model(TOKENS).logits, trained(TOKENS).logits)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rows", [107, *(pytest.param(n, marks=pytest.mark.slow) for n in (98, None))])
@pytest.mark.parametrize(
    ("adapter", "saving"),
    [
        (ATTENTION, {"save_embedding_layers": True}),
        (SAVED_WHOLE, {"save_embedding_layers": True}),
        (ATTENTION | {"modules_to_save": ["embed_tokens"]}, {"save_embedding_layers": True}),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {}),
        (ATTENTION | {"trainable_token_indices": {"embed_tokens": [3, 60]}}, {"save_embedding_layers": True}),
    ],
    ids=["frozen", "trained", "one trained", "adapted", "some rows"],
)
def test_the_policy_is_the_one_that_was_trained(tmp_path, bases, tied, rows, adapter, saving):
    trained = checkpoint(bases[tied], tmp_path, adapter, rows, **saving)
    state = load_checkpoint(tmp_path, base_model=bases[tied])
    assert_policy(state, trained)
    if rows is not None:
        again = AutoModelForCausalLM.from_pretrained(bases[tied], dtype=torch.float32)
        again.resize_token_embeddings(rows)
        assert_policy(state, PeftModel.from_pretrained(again, tmp_path, is_trainable=True).eval())
    (note,) = [note for note in state.report.notes if note.code == "embeddings_along"]
    assert f"({rows or BASE_ROWS} rows)" in note.text


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_trained_embeddings_alone_are_enough_for_the_policy(tmp_path, bases, tied):
    """As peft saves them where it cannot see that the vocabulary was resized; the frozen ones below are unknown."""
    trained = checkpoint(bases[tied], tmp_path, SAVED_WHOLE, 107, save_embedding_layers=False)
    model = load_checkpoint(tmp_path, base_model=bases[tied]).model
    assert torch.equal(model(TOKENS).logits, trained(TOKENS).logits)
    with model.disable_adapter():  # what a KL term takes as the reference
        assert model(TOKENS).logits[..., BASE_ROWS:].isnan().all()


@pytest.mark.parametrize(
    ("adapter", "lacking"),
    [
        (ATTENTION | {"modules_to_save": ["embed_tokens"]}, "lm_head.weight"),
        (ATTENTION | {"modules_to_save": ["lm_head"]}, "embed_tokens.weight"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lm_head.weight"),
    ],
)
def test_new_rows_that_no_file_has_are_missed_by_name(tmp_path, bases, adapter, lacking):
    checkpoint(bases[False], tmp_path, adapter, 107, save_embedding_layers="embed_tokens" in adapter["target_modules"])
    with pytest.raises(MismatchError, match=rf"expected base_model.*{lacking} in it.*pass as base_model the resized"):
        load_checkpoint(tmp_path, base_model=bases[False])
    resized = AutoModelForCausalLM.from_pretrained(bases[False], dtype=torch.float32)
    resized.resize_token_embeddings(107)
    resized.save_pretrained(tmp_path / "resized")
    load_checkpoint(tmp_path, base_model=tmp_path / "resized")


def test_embeddings_of_another_base_are_doubted(tmp_path, bases):
    checkpoint(bases[False], tmp_path, ATTENTION, 107, save_embedding_layers=True)
    edit_tensors(
        tmp_path / "adapter_model.safetensors",
        lambda tensors: tensors["base_model.model.lm_head.weight"][:5].add_(0.5),
    )
    report = inspect_checkpoint(tmp_path, base_model=bases[False])
    assert report.verdict == "suspicious"
    assert "5 of 104 rows" in next(note.text for note in report.notes if note.code == "embeddings_changed")


def test_two_numbers_of_rows_are_refused(tmp_path, bases):
    checkpoint(bases[False], tmp_path, ATTENTION, 107, save_embedding_layers=True)
    name = "base_model.model.lm_head.weight"
    edit_tensors(tmp_path / "adapter_model.safetensors", lambda tensors: tensors.update({name: tensors[name][:105]}))
    with pytest.raises(MismatchError, match=r"embeddings of one number of rows, got .* in .*; copy the checkpoint"):
        load_checkpoint(tmp_path, base_model=bases[False])


def test_a_tokenizer_beyond_the_saved_rows_is_refused(tmp_path, bases):
    checkpoint(bases[False], tmp_path, ATTENTION, 107, save_embedding_layers=True)
    tokenizer = json.loads((bases[False] / "tokenizer.json").read_text())
    tokenizer["added_tokens"][-1]["id"] = 107
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text((bases[False] / "tokenizer_config.json").read_text())
    with pytest.raises(MismatchError, match="below the 107 rows of the embedding, got 107"):
        load_checkpoint(tmp_path, base_model=bases[False])
