"""Embeddings that peft saves along an adapter are those of training again, to the bit, whatever rows the base has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from entropy_probe import load_checkpoint
from entropy_probe.checkpoints import CheckpointError, MismatchError, inspect_checkpoint
from tests.checkpoints.conftest import edit_tensors
from tests.tiny import tiny_policy

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft",
    "ignore:`is_gradient:FutureWarning",
    "ignore:torch.distributed is disabled:UserWarning",
)
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


def train(base: Path, adapter: dict[str, Any] | None, rows: int | None) -> tuple[Any, dict[str, Any]]:
    """Two steps over all parameters; the model, and the optimizer's state with the parameters' numbers."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows)
    if adapter is not None:
        model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **adapter))
    optimizer = torch.optim.AdamW(model.train().parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return model.eval(), optimizer.state_dict()


def by_name(model: Any, saved: dict[str, Any]) -> dict[str, Any]:
    names = [name for name, _ in model.named_parameters()]
    state = {names[i]: entry for i, entry in saved["state"].items()}
    return {"state": state, "param_groups": [saved["param_groups"][0] | {"params": list(state)}]}


def as_accelerate(place: Path, model: Any, saved: dict[str, Any]) -> None:
    """What FSDP writes of an adapter: its tensors by peft's names, embeddings of other rows along."""
    weights = model.state_dict()
    if isinstance(model, PeftModel):
        model.peft_config["default"].save_pretrained(place)
        weights = {name: x.clone() for name, x in get_peft_model_state_dict(model).items()}
    dcp.save({"model": weights}, checkpoint_id=place / "pytorch_model_fsdp_0")
    dcp.save({"optimizer": by_name(model, saved)}, checkpoint_id=place / "optimizer_0")


def as_prime_rl(place: Path, model: Any, saved: dict[str, Any]) -> None:
    """The whole model by its own names."""
    dcp.save({"app": {"model": model.state_dict(), "optimizers": by_name(model, saved)}}, checkpoint_id=place)
    if isinstance(model, PeftModel):
        model.peft_config["default"].save_pretrained(place)


def as_verl(place: Path, model: Any, saved: dict[str, Any]) -> None:
    """The same, of one rank, with what verl says of an adapter."""
    torch.save(model.state_dict(), place / "model_world_size_1_rank_0.pt")
    torch.save(saved, place / "optim_world_size_1_rank_0.pt")
    if isinstance(model, PeftModel):
        (place / "lora_train_meta.json").write_text(json.dumps({"r": 2, "lora_alpha": 8, "task_type": "CAUSAL_LM"}))
    model.config.save_pretrained(place / "huggingface")


ADAPTED = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}


@pytest.mark.parametrize(
    ("save", "adapter", "tied", "rows"),
    [
        (as_accelerate, SAVED_WHOLE, False, 107),
        (as_accelerate, None, True, 107),
        (as_prime_rl, ADAPTED, False, 98),
        (as_prime_rl, NEW_TOKENS, True, None),
        (as_verl, SAVED_WHOLE, False, 107),
        *(
            pytest.param(save, adapter, tied, rows, marks=pytest.mark.slow)
            for save in (as_accelerate, as_prime_rl, as_verl)
            for adapter in (None, ATTENTION, SAVED_WHOLE, ADAPTED, NEW_TOKENS)
            for tied in (False, True)
            for rows in (107, 98, None)
            if not (save is as_verl and adapter is NEW_TOKENS)
        ),
    ],
)
def test_whole_models_and_shards_have_them_too(tmp_path, bases, save, adapter, tied, rows):
    trained, saved = train(bases[tied], adapter, rows)
    save(tmp_path, trained, saved)
    for base in (bases[tied], *([None] if save is as_verl else ())):
        state = load_checkpoint(tmp_path, base_model=base)
        assert_policy(state, trained)
        names = [name for name, _ in trained.named_parameters()]
        assert len(state.optimizer.state) == len(saved["state"])
        for index, entry in saved["state"].items():
            own = state.optimizer.state[state.model.get_parameter(names[index])]
            assert all(torch.equal(own[key], entry[key]) for key in ("exp_avg", "exp_avg_sq"))
        said = [note.text for note in state.report.notes if note.code == "embeddings_along"]
        if save is not as_verl or adapter is not None:
            told = f"({rows} rows) are those that were saved, not the base model's ({BASE_ROWS} rows)"
            assert [told in text for text in said] == [True] * (rows is not None and base is not None)


def test_rows_of_an_embedding_need_a_configuration(tmp_path, bases):
    trained, saved = train(bases[False], NEW_TOKENS, None)
    as_verl(tmp_path, trained, saved)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: .* with the trainable_token_indices of training"):
        load_checkpoint(tmp_path)
    trained.peft_config["default"].save_pretrained(tmp_path)
    assert_policy(load_checkpoint(tmp_path), trained)


def test_a_configuration_of_other_rows_than_the_base_model_is_missed(tmp_path, bases):
    """An adapter alone, on a model whose vocabulary training resized."""
    trained, saved = train(bases[False], ATTENTION, 107)
    as_verl(tmp_path, trained, saved)
    own = {name: x for name, x in trained.state_dict().items() if ".lora_" in name}
    torch.save(own, tmp_path / "model_world_size_1_rank_0.pt")
    with pytest.raises(
        MismatchError, match=r"vocabulary of the 104 rows .* got 107; .* pass as base_model the resized"
    ):
        load_checkpoint(tmp_path, base_model=bases[False])


@pytest.fixture
def group_of_one(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("rows", [107, pytest.param(98, marks=pytest.mark.slow)])
def test_shards_hold_the_same(tmp_path, bases, group_of_one, rows):
    """Of new rows that no file has too, below copies that were trained."""
    place = tmp_path / "checkpoint"
    checkpoint(bases[False], place, SAVED_WHOLE, rows, save_embedding_layers=False)
    whole, shards = (
        dict(load_checkpoint(place, bases[False], shard=on).model.named_parameters()) for on in (False, True)
    )
    assert whole.keys() == shards.keys()
    for name, parameter in whole.items():
        torch.testing.assert_close(shards[name].full_tensor(), parameter, rtol=0, atol=0, equal_nan=True)
