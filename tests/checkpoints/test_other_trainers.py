"""What other trainers leave is called by its name, and what is a Trainer's checkpoint but for a name is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from entropy_probe.checkpoints import CheckpointError, MappingError, inspect_checkpoint, load_checkpoint
from entropy_probe.checkpoints.directory import checkpoints_below, find_optimizer, whose_directory
from tests.checkpoints.conftest import assert_same, edit_optimizer, edit_tensors, parameter_names

LAYOUTS = {
    "DeepSpeed": ["mp_rank_00_model_states.pt", "zero_to_fp32.py", "latest"],
    "DeepSpeed-Universal": ["zero/model.norm.weight/exp_avg.pt", "zero/model.norm.weight/fp32.pt"],
    "Megatron": ["mp_rank_01/distrib_optim.pt"],
    "checkpoint of Megatron": [".metadata", "__0_0.distcp", "common.pt", "metadata.json"],
    "torchtune": ["recipe_state/recipe_state.pt", "model-00001.safetensors"],
}


def touch(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_torchtune_keeps_its_state_beside_the_epochs(tmp_path):
    """And the weights of an epoch have the names of any model."""
    touch(tmp_path, ["recipe_state/recipe_state.pt", "epoch_0/config.json", "epoch_0/model.safetensors"])
    with pytest.raises(CheckpointError, match=r"expected optimizer\.pt, got a checkpoint of torchtune"):
        find_optimizer(tmp_path / "epoch_0")


@pytest.mark.parametrize("maker", LAYOUTS)
@pytest.mark.parametrize("above", ["", "step_2", "run/step_2"])
def test_a_directory_of_another_trainer_is_named(tmp_path, maker, above):
    touch(tmp_path / "x" / above, LAYOUTS[maker])
    assert checkpoints_below(tmp_path / "x") == []
    with pytest.raises(CheckpointError, match=f"expected a checkpoint that is read, got .*{maker}.*; what is|{maker}"):
        inspect_checkpoint(tmp_path / "x")


def test_weights_in_a_piece_for_each_rank_are_named(tmp_path):
    """Beside an optimizer that could be read, and from above lead to it."""
    names = ["weights/model/shard-00001-model-00001-of-00001.safetensors", "optimizer/optim/.metadata"]
    touch(tmp_path / "step_2/policy", names)
    with pytest.raises(CheckpointError, match="pass one of step_2/policy inside it"):
        inspect_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"weights of NeMo AutoModel.*save with model_save_format: torch_save"):
        inspect_checkpoint(tmp_path / "step_2/policy")


def test_a_folder_beside_the_files_of_another_trainer_is_named_too(tmp_path):
    touch(tmp_path, ["optim_world_size_4_rank_3.pt", "model_world_size_4_rank_3.pt", "huggingface/config.json"])
    assert "verl" in (whose_directory(tmp_path / "huggingface") or "")


def test_a_directory_without_a_name_that_tells_is_of_nobody(tmp_path):
    assert whose_directory(touch(tmp_path / "a", ["notes.txt", "optimizer_world.pt"])) is None


def test_directories_above_lead_to_their_checkpoints(tmp_path):
    for step in (2, 10, 9):
        touch(tmp_path / "v0-1/runs" / f"checkpoint-{step}", ["optimizer.pt"])
    with pytest.raises(CheckpointError, match=r"pass one of .*checkpoint-2, .*checkpoint-9, .*checkpoint-10 inside it"):
        inspect_checkpoint(tmp_path)


def flatten(order: list[int]):
    """One group, whose i-th parameter is the ``order[i]``-th of the two groups."""

    def change(saved):
        saved["state"] = {i: saved["state"][k] for i, k in enumerate(order) if k in saved["state"]}
        saved["param_groups"] = [saved["param_groups"][0] | {"params": list(range(len(order)))}]

    return change


def test_one_group_in_the_order_of_the_model_is_read(copy_of, runs):
    checkpoint, original = copy_of("full"), runs("full").load(2)
    names = parameter_names(original)
    edit_optimizer(checkpoint, flatten([names.index(n) for n, _ in original.model.named_parameters()]))
    assert_same(load_checkpoint(checkpoint), original)
    assert "named-parameters" in load_checkpoint(checkpoint).report.optimizer_state.mapping


def test_one_group_whose_order_shapes_do_not_tell_is_refused(copy_of):
    checkpoint = copy_of("sgd")  # keeps nothing for a parameter, so any order fits
    edit_optimizer(checkpoint, flatten(list(range(27))))
    with pytest.raises(MappingError, match="different ones do; tried"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("extra", "remedy"),
    [
        (1, "1 entries more than the 27 .* value model.*pass base_model"),
        (-1, "1 entries fewer than the 27 .*frozen, pass base_model"),
    ],
)
def test_another_number_of_entries_leads_on(copy_of, extra, remedy):
    checkpoint = copy_of("full")

    def change(saved):
        group = saved["param_groups"][1]
        if extra > 0:
            saved["state"][27] = saved["state"][26]
            group["params"].append(27)
        else:
            del saved["state"][group["params"].pop()]

    edit_optimizer(checkpoint, change)
    with pytest.raises(MappingError, match=remedy):
        load_checkpoint(checkpoint)


def test_groups_of_ones_own_lead_to_recorded_names(copy_of):
    """Every other parameter in a group of its own, which no rule does."""
    checkpoint = copy_of("lora")

    def split(saved):
        first, order = saved["param_groups"][0], [*range(0, 28, 4), *(i for i in range(28) if i % 4)]
        saved["state"] = {i: saved["state"][k] for i, k in enumerate(order)}
        saved["param_groups"] = [first | {"params": list(range(7))}, first | {"params": list(range(7, 28))}]

    edit_optimizer(checkpoint, split)
    with pytest.raises(MappingError, match=r"as many entries as trainable parameters.*ManifestCallback.*mapping: FILE"):
        load_checkpoint(checkpoint)


def test_a_value_head_beside_the_policy_is_named(copy_of):
    checkpoint = copy_of("full")
    edit_tensors(checkpoint / "model.safetensors", lambda tensors: tensors.update({"v_head.weight": torch.ones(1, 8)}))
    with pytest.raises(CheckpointError, match=r"not supported: a value head \(v_head.weight\) beside the policy"):
        load_checkpoint(checkpoint)
