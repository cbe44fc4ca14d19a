"""Checkpoints with several adapters, and full weights of which a part was frozen."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from entropy_probe.checkpoints import CheckpointError, UnsupportedError, inspect_checkpoint, load_checkpoint
from tests.checkpoints.conftest import NO_OTHER_DOUBTS


def test_the_adapter_that_was_trained_has_to_be_named(runs):
    run = runs("two adapters")
    checkpoint = run.checkpoint(2)
    assert not (checkpoint / "adapter_config.json").exists()
    with pytest.raises(CheckpointError, match=r"expected one trained adapter, got other, policy; pass adapter=\.\.\."):
        load_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match="adapter: expected one of other, policy, got 'default'"):
        load_checkpoint(checkpoint, adapter="default")
    assert inspect_checkpoint(checkpoint).verdict == "unusable"
    assert inspect_checkpoint(checkpoint, adapter="policy") == run.load(2).report
    model = run.load(2).model
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    stored = load_file(checkpoint / "policy" / "adapter_model.safetensors")
    assert {n.replace(".policy", "") for n in trained} == set(stored)
    assert all(torch.equal(p, stored[n.replace(".policy", "")]) for n, p in trained.items())


@pytest.mark.parametrize("arguments", [{"adapter": "policy"}, {"quantization": {"load_in_4bit": True}}])
def test_what_is_for_adapters_is_refused_with_full_weights(runs, arguments):
    with pytest.raises(UnsupportedError, match=f"{next(iter(arguments))}: expected none with full weights"):
        load_checkpoint(runs("full").checkpoint(2), **arguments)


def test_the_reference_copy_of_a_trainer_is_left_out(runs):
    checkpoint = runs("trl reference").checkpoint(2)
    if not (checkpoint / "ref" / "adapter_model.safetensors").is_file():
        pytest.skip("this TRL turns the adapter off for the reference")
    names = [n for n, _ in load_checkpoint(checkpoint).model.named_parameters() if "lora_" in n]
    assert names
    assert all(".default." in n for n in names)


def test_a_lone_named_adapter_is_found_and_only_references_are_refused(runs, tmp_path):
    checkpoint = shutil.copytree(runs("two adapters").checkpoint(2), tmp_path / "checkpoint-2")
    shutil.rmtree(checkpoint / "other")
    report = load_checkpoint(checkpoint).report
    assert (report.verdict, report.reasons) == NO_OTHER_DOUBTS
    (checkpoint / "policy").rename(checkpoint / "ref")
    with pytest.raises(CheckpointError, match="got only reference copies"):
        load_checkpoint(checkpoint)
    assert load_checkpoint(checkpoint, adapter="ref").report == report


def test_what_was_frozen_is_told_by_the_base_model(runs, tmp_path):
    run = runs("frozen subset")
    with pytest.raises(CheckpointError, match="none does; tried"):
        load_checkpoint(run.checkpoint(2))
    state = run.load(2)
    frozen = {n for n, p in state.model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in state.model.named_parameters() if "layers.0" in n or "embed" in n}
    assert f"{len(frozen)} tensors that are as in" in state.report.optimizer_state.mapping
    held = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in state.model.parameters() if p.requires_grad}
    # of another run, nothing is unchanged
    with pytest.raises(CheckpointError, match="none does; tried"):
        load_checkpoint(run.checkpoint(2), _perturbed(run.directory / "base", tmp_path / "base"))


def _perturbed(base, to):
    from safetensors.torch import save_file

    shutil.copytree(base, to)
    tensors = {n: x + 1e-3 for n, x in load_file(to / "model.safetensors").items()}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_a_base_model_freezes_nothing_where_everything_was_trained(runs):
    run = runs("full")
    given = load_checkpoint(run.checkpoint(2), run.directory / "base")
    assert all(p.requires_grad for p in given.model.parameters())
    assert given.report.optimizer_state.mapping == load_checkpoint(run.checkpoint(2)).report.optimizer_state.mapping


@pytest.mark.parametrize(
    ("name", "part"),
    [("dora", "lora_magnitude_vector"), ("modules_to_save", "embed_tokens.modules_to_save"), ("biases", "bias")],
)
def test_trained_parts_besides_the_low_rank_factors(runs, name, part):
    state = runs(name).load(2)
    parts = [p for n, p in state.model.named_parameters() if part in n and p.requires_grad]
    assert parts
    assert all(state.optimizer.state[p]["exp_avg"].any() for p in parts)
    assert (state.report.verdict, state.report.reasons) == NO_OTHER_DOUBTS


def test_each_group_has_its_own_rate(runs):
    assert [g["lr"] for g in runs("two rates").load(2).optimizer.param_groups] == [1e-3, 3e-4]
