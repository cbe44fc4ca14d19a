"""What verl, SkyRL, AReaL and DeepSpeed leave in a file per rank is read to the bit, and nothing damaged is."""

from __future__ import annotations

import gc
import json
import re
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.checkpoints import CheckpointError, CheckpointState, inspect_checkpoint, load_checkpoint
from entropy_probe.checkpoints.formats import deepspeed
from entropy_probe.steps.adamw import optimizer_parameters, shadow_step
from tests.checkpoints.ranks.make import CASES, HERE, LORA, SIZES

VERL = [case for case in CASES if case.startswith("fsdp")]
ZERO = [case for case in CASES if case.startswith("zero")]


@pytest.fixture
def unpacked(made_once) -> Callable[[str], Path]:
    """The directory of a case; a test that damages it copies it."""

    def unpack(case: str, directory: Path) -> None:
        with tarfile.open(HERE / f"{case}.tar.xz") as archive:
            archive.extractall(directory, filter="data")
        if case.startswith("zero") and case.endswith("lora"):
            from peft import LoraConfig

            for step in (2, 3):
                config = LoraConfig(**LORA, task_type="CAUSAL_LM")
                config.save_pretrained(str(place(directory, step)))

    return lambda case: made_once(case, lambda directory: unpack(case, directory))


def place(directory: Path, step: int) -> Path:
    of_verl = directory / f"global_step_{step}" / "actor"
    return of_verl if of_verl.is_dir() else directory / f"global_step{step}"


def load(directory: Path, step: int = 2, **more: Any) -> CheckpointState:
    return load_checkpoint(place(directory, step), base_model=directory / "base", **more)


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_weights_and_moments_are_those_that_the_library_gathers(unpacked, case, step):
    directory = unpacked(case)
    state = load(directory, step)
    truth = torch.load(directory / f"truth-{step}.pt", weights_only=True)
    parameters = optimizer_parameters(state.model, state.optimizer)
    assert parameters.keys() == truth.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, truth[name]["weight"]), name
        for key in truth[name].keys() - {"weight", "gradient"}:
            assert torch.equal(state.optimizer.state[parameter][key], truth[name][key]), (name, key)
        assert state.optimizer.state[parameter]["step"] == step
    assert state.report.verdict == "healthy"
    if not case.endswith("lora"):  # whose lora_B did not start at 0 here
        assert state.report.movement.status == "consistent"


@pytest.mark.parametrize("case", ZERO[:1])
def test_deepspeeds_files_are_opened_once(unpacked, monkeypatch, case):
    """Optimizer, weights and masters are in the same ones; nothing of them is kept once it has been read."""
    opened, read = [], deepspeed.read_objects
    monkeypatch.setattr(deepspeed, "read_objects", lambda file, *more: opened.append(file) or read(file, *more))
    directory = unpacked(case)
    assert load(directory).report.verdict == "healthy"
    assert opened[0].name.endswith("optim_states.pt")  # for its settings
    assert sorted(opened[1:]) == sorted(place(directory, 2).glob("*_states.pt"))
    gc.collect()
    assert len(deepspeed._OPEN) == 0


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_a_step_leads_to_the_next_checkpoint(unpacked, case):
    directory = unpacked(case)
    now, after = load(directory, 2), load(directory, 3)
    truth = torch.load(directory / "truth-3.pt", weights_only=True)
    parameters, expected = (optimizer_parameters(s.model, s.optimizer) for s in (now, after))
    stepped = shadow_step(parameters, now.optimizer, {name: truth[name]["gradient"] for name in parameters})
    assert [name for name in stepped if not torch.equal(stepped[name], expected[name])] == []
    assert not all(torch.equal(parameters[name], expected[name]) for name in stepped)


@pytest.mark.parametrize("case", ["zero1-full", "zero2-lora", "zero3-full", "zero3-lora"])
def test_the_rounded_weights_are_there_for_the_asking(unpacked, case):
    directory = unpacked(case)
    masters, rounded = load(directory), load(directory, weights="rounded")
    theirs = dict(rounded.model.named_parameters())
    for name, parameter in optimizer_parameters(masters.model, masters.optimizer).items():
        assert torch.equal(theirs[name], parameter.bfloat16().float())
        moments = (s.optimizer.state[p]["exp_avg"] for s, p in ((masters, parameter), (rounded, theirs[name])))
        assert torch.equal(*moments)
    said = [s.report.optimizer_state.mapping for s in (masters, rounded)]
    assert "float32 masters, not as rounded to bfloat16" in said[0]
    assert "weights: in bfloat16, as the policy samples" in said[1]


def test_there_is_one_copy_to_ask_for_elsewhere(unpacked):
    with pytest.raises(CheckpointError, match="weights: expected 'masters', since its weights are kept once"):
        load(unpacked("fsdp2-full"), weights="rounded")


def test_a_frozen_part_stays_frozen(unpacked):
    state = load(unpacked("fsdp2-frozen"))
    frozen = [name for name, p in state.model.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(name.startswith("model.layers.0.") for name in frozen)
    assert f"{len(frozen)} tensors without state" in state.report.optimizer_state.mapping


def test_what_was_frozen_needs_the_model_that_training_started_from(unpacked):
    with pytest.raises(CheckpointError, match=r"got none for 12 .*pass base_model"):
        load_checkpoint(place(unpacked("fsdp2-frozen"), 2))


@pytest.mark.parametrize("case", ["fsdp2-full", "fsdp1-tied", "fsdp2-lora", "fsdp1-lora"])
def test_verl_needs_nothing_besides_its_own_folder(unpacked, case):
    directory = unpacked(case)
    alone, told = load_checkpoint(place(directory, 2)), load(directory)
    other = dict(told.model.named_parameters())
    assert all(torch.equal(p, other[name]) for name, p in alone.model.named_parameters())


def test_the_names_of_skyrl_are_read_too(unpacked, tmp_path):
    policy = tmp_path / "global_step_2" / "policy"
    shutil.copytree(place(unpacked("fsdp2-full"), 2), policy)
    (policy / "fsdp_config.json").write_text(json.dumps({"fsdp_strategy": "fsdp2", "world_size": 2}))
    assert inspect_checkpoint(policy).verdict == "healthy"
    with pytest.raises(CheckpointError, match=r"pass one of global_step_2/policy inside it"):
        inspect_checkpoint(tmp_path)


def test_areals_optimizer_lies_beside_safetensors(unpacked, tmp_path):
    directory = unpacked("fsdp2-full")
    expected = load(directory)
    expected.model.save_pretrained(tmp_path)
    for file in place(directory, 2).glob("optim_*"):
        shutil.copy(file, tmp_path)
    found = load_checkpoint(tmp_path, base_model=directory / "base")
    ours, theirs = (dict(s.model.named_parameters()) for s in (found, expected))
    for name, parameter in ours.items():
        moments = (s.optimizer.state[p]["exp_avg"] for s, p in ((found, parameter), (expected, theirs[name])))
        assert torch.equal(*moments)
    assert "rule:named-parameters" in found.report.optimizer_state.mapping


def test_the_folder_above_deepspeeds_leads_to_its_last_save(unpacked):
    directory = unpacked("zero2-full")
    above, below = load_checkpoint(directory, base_model=directory / "base"), load(directory, 3)
    assert torch.equal(above.model.lm_head.weight, below.model.lm_head.weight)


def trainers(unpacked, tmp_path: Path, case: str) -> Path:
    """A checkpoint of the Hugging Face Trainer with DeepSpeed."""
    directory, checkpoint = unpacked(case), tmp_path / "checkpoint-2"
    load(directory, weights="rounded").model.bfloat16().save_pretrained(checkpoint)
    shutil.copytree(
        place(directory, 2), checkpoint / "global_step2", ignore=shutil.ignore_patterns("adapter_config.json", "*.md")
    )
    (checkpoint / "latest").write_text("global_step2")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": []}))
    return checkpoint


@pytest.mark.parametrize("case", ["zero2-full", "zero3-full", "zero2-lora", "zero3-lora"])
def test_the_trainers_own_files_lie_beside_deepspeeds(unpacked, tmp_path, case):
    directory, checkpoint = unpacked(case), trainers(unpacked, tmp_path, case)
    state, expected = load_checkpoint(checkpoint, base_model=directory / "base"), load(directory)
    theirs = dict(expected.model.named_parameters())
    parameters = optimizer_parameters(state.model, state.optimizer)
    assert all(torch.equal(p, theirs[name]) for name, p in parameters.items())
    assert state.report.verdict == "healthy"


def test_weights_of_another_save_beside_deepspeeds_are_noticed(unpacked, tmp_path):
    checkpoint = trainers(unpacked, tmp_path, "zero3-full")
    load(unpacked("zero3-full"), 3, weights="rounded").model.bfloat16().save_pretrained(checkpoint)
    with pytest.raises(CheckpointError, match="expected the optimizer's float32 weights rounded, got others"):
        load_checkpoint(checkpoint)


# ---- faults


class Payload:
    def __reduce__(self):
        return print, ("it ran",)


def rank_file(folder: Path, kind: str, rank: int) -> Path:
    files = list(folder.glob(f"*{kind}*.pt"))
    (file,) = files if len(files) == 1 else (f for f in files if re.search(rf"(?<!mp_)rank_{rank}[._]", f.name))
    return file


def rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a file of ``torch.save``, whose classes stay as they are."""
    saved = torch.load(file, weights_only=False)
    change(saved)
    torch.save(saved, file)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def swap(folder: Path, kind: str) -> None:
    first, second = rank_file(folder, kind, 0), rank_file(folder, kind, 1)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def flip(file: Path) -> None:
    """A bit of a tensor's data."""
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        entry = next(e for e in archive.infolist() if "/data/" in e.filename and e.file_size > 100)
    data[entry.header_offset + 200] ^= 1
    file.write_bytes(bytes(data))


def overwrite(file: Path, key: int, at: int, value: bytes) -> None:
    """Bytes of the data of a tensor, by its number in the file; checksums are right again."""
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in contents if name.endswith(f"/data/{key}"))
    data = bytearray(contents[name])
    at %= len(data)
    data[at : at + len(value)] = value
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for other, content in contents.items():
            archive.writestr(other, bytes(data) if other == name else content)


def payload(file: Path) -> None:
    torch.save({"state": Payload(), "param_groups": []}, file)


def first_moments(saved: dict[str, Any]) -> list[torch.Tensor]:
    """Of a rank's optimizer file of FSDP1 or DeepSpeed: flat."""
    state = saved["state"] if "state" in saved else saved["optimizer_state_dict"]
    state = state.get("base_optimizer_state", state.get("optimizer_state_dict", state))
    state = state.get("state", state)
    return [state[key]["exp_avg"] for key in sorted(state)]


def spoil(index: int, at: int, value: float) -> Callable[[Any], Any]:
    def change(saved: Any) -> None:
        first_moments(saved)[index][at] = value

    return change


FAULTS: dict[str, tuple[list[str], Callable[[Path, Path], Any], str]] = {
    "a rank's optimizer missing": (
        ["fsdp2-full", "fsdp1-full", "zero2-full", "zero3-full"],
        lambda folder, other: rank_file(folder, "optim", 1).unlink(),
        "expected .* of each of [234] ranks, (got 1|found none of rank 1).*copy the files of all",
    ),
    "a rank's model missing": (
        ["fsdp2-full", "fsdp1-lora", "zero3-full", "zero3-lora"],
        lambda folder, other: rank_file(folder, "model", 1).unlink(),
        "expected .* of each of [234] ranks, (got 1|found none of rank 1)",
    ),
    "a rank's optimizer of another step": (
        ["fsdp2-full", "fsdp1-full", "zero2-full", "zero3-full"],
        lambda folder, other: shutil.copy(rank_file(other, "optim", 1), rank_file(folder, "optim", 1)),
        "step: expected .*2.*, got .*3.*files of two saves|step: expected one number on all ranks",
    ),
    "all of the optimizer of another step": (
        ["zero2-full", "zero3-full"],
        lambda folder, other: [shutil.copy(file, folder) for file in other.glob("*optim*")],
        "expected state after 2 steps .*got after .3|expected the optimizer's float32 weights rounded",
    ),
    "truncated": (
        ["fsdp2-full", "fsdp1-full", "zero2-full", "zero3-full"],
        lambda folder, other: truncate(rank_file(folder, "optim", 1)),
        "expected an archive written by torch.save",
    ),
    "a flipped bit": (
        ["fsdp2-full", "fsdp1-full", "zero2-full", "zero3-full"],
        lambda folder, other: flip(rank_file(folder, "optim", 1)),
        "wrong checksum",
    ),
    "the optimizer's files swapped": (
        ["fsdp2-full", "fsdp1-full", "zero2-full", "zero3-full"],
        lambda folder, other: swap(folder, "optim"),
        "expected what was saved under this name, got what was saved as .*; files were swapped",
    ),
    "the model's files swapped": (
        ["fsdp2-full", "fsdp1-tied", "fsdp2-lora"],
        lambda folder, other: swap(folder, "model"),
        "expected what was saved under this name, got what was saved as .*; files were swapped",
    ),
    "another number of ranks said": (
        ["fsdp2-full"],
        lambda folder, other: (folder / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 4}'),
        r"expected files of 4 ranks, as fsdp_config.json says, got optim files of \[2\]",
    ),
    "files of two numbers of ranks": (
        ["fsdp2-full"],
        lambda folder, other: shutil.copy(rank_file(folder, "optim", 1), folder / "optim_world_size_3_rank_1.pt"),
        r"got optim files of \[2, 3\]; remove those of another save",
    ),
    "a rank too many": (
        ["zero2-full"],
        lambda folder, other: shutil.copy(
            rank_file(folder, "optim", 1), folder / "bf16_zero_pp_rank_4_mp_rank_00_optim_states.pt"
        ),
        "expected what was saved under this name|expected optim files of 4 ranks, got 5",
    ),
    "a pickle payload": (
        ["fsdp2-full", "fsdp1-full", "zero2-full", "zero3-full"],
        lambda folder, other: payload(rank_file(folder, "optim", 1)),
        "it names .*print.*nothing in it was run",
    ),
    "a pickle payload in the model": (
        ["fsdp2-full", "zero2-full"],
        lambda folder, other: payload(rank_file(folder, "model", 0)),
        "it names .*print.*nothing in it was run",
    ),
    "tensor parallelism": (
        ["zero2-full"],
        lambda folder, other: shutil.copy(rank_file(folder, "model", 0), folder / "mp_rank_01_model_states.pt"),
        "not supported: tensor parallelism",
    ),
    "padding of FSDP1 that is not 0": (
        ["fsdp1-tied"],
        lambda folder, other: rewrite(rank_file(folder, "optim", 4), spoil(0, -1, 1.0)),
        "expected 1 zeros behind the parameters, got other numbers",
    ),
    "NaN in a moment": (
        ["fsdp1-full"],
        lambda folder, other: rewrite(rank_file(folder, "optim", 1), spoil(1, 3, float("nan"))),
        "exp_avg: expected finite values, got NaN",
    ),
    "NaN in a buffer": (
        ["zero2-full", "zero3-full"],
        lambda folder, other: overwrite(rank_file(folder, "optim", 1), 1, 8, struct.pack("<f", float("nan"))),
        "exp_avg: expected finite values, got NaN",
    ),
    "a negative second moment": (
        ["zero2-full", "zero3-full", "fsdp1-full"],
        lambda folder, other: overwrite(rank_file(folder, "optim", 0), 2, 8, struct.pack("<f", -1.0)),
        "exp_avg_sq: expected values of at least 0",
    ),
    "padding of a partition that is not 0": (
        ["zero2-full"],
        lambda folder, other: overwrite(rank_file(folder, "optim", 3), 4, -4, struct.pack("<f", 1.0)),
        "expected 4 zeros behind the parameters, got other numbers",
    ),
    "padding of a parameter that is not 0": (
        ["zero3-full"],
        lambda folder, other: overwrite(rank_file(folder, "optim", 3), 4, 4 * 3, struct.pack("<f", 1.0)),
        r"k_proj\.bias: exp_avg: expected 2 zeros behind the parameters, got other numbers",
    ),
    "a master that is not what the model rounds": (
        ["zero2-full"],
        lambda folder, other: overwrite(rank_file(folder, "optim", 0), 6, 8, struct.pack("<f", 0.5)),
        "expected the optimizer's float32 weights rounded, got others",
    ),
    "a flat parameter too short": (
        ["fsdp1-full"],
        lambda folder, other: rewrite(
            rank_file(folder, "optim", 1), lambda saved: saved["state"][1].update(exp_avg=torch.zeros(5))
        ),
        "expected the 3 flat parameters of FSDP1 to be the model's layers",
    ),
    "a flat parameter without state": (
        ["fsdp1-full"],
        lambda folder, other: [
            rewrite(rank_file(folder, "optim", rank), lambda saved: saved["state"].pop(1)) for rank in (0, 1)
        ],
        "expected state for each of 27 parameters, got none for 12",
    ),
    "groups in another order": (
        ["fsdp1-full"],
        lambda folder, other: [
            rewrite(rank_file(folder, "optim", rank), lambda saved: saved["param_groups"][0].update(params=[0, 2, 1]))
            for rank in (0, 1)
        ],
        r"expected the groups to number parameters 0, 1, 2 .*got \[0, 2, 1\]",
    ),
    "groups that differ between ranks": (
        ["fsdp1-full"],
        lambda folder, other: rewrite(
            rank_file(folder, "optim", 1), lambda saved: saved["param_groups"][0].update(lr=1e-5)
        ),
        "expected the parameter groups of rank 0, got others",
    ),
}


@pytest.mark.parametrize(("fault", "case"), [(fault, case) for fault, (cases, *_) in FAULTS.items() for case in cases])
def test_a_fault_is_one_line(unpacked, tmp_path, fault, case, capsys):
    _, damage, refusal = FAULTS[fault]
    directory = unpacked(case)
    folder = Path(shutil.copytree(place(directory, 2), tmp_path / "global_step2"))
    damage(folder, place(directory, 3))
    with pytest.raises(CheckpointError, match=refusal) as raised:
        load_checkpoint(folder, base_model=directory / "base")
    assert "\n" not in str(raised.value)
    report = inspect_checkpoint(folder, directory / "base")
    assert report.verdict == "unusable"
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize("case", ["fsdp2-full", "fsdp2-lora", "zero2-full", "zero3-full", "zero2-lora"])
def test_another_base_of_the_same_shapes_is_noticed(unpacked, tmp_path, case):
    from entropy_probe.demo.policy import build_model

    build_model("qwen2", initializer_range=0.2, seed=7, **SIZES).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"from which training started, got a cosine of|expected the frozen base model to be"
    ):
        load_checkpoint(place(unpacked(case), 2), base_model=tmp_path)


def test_an_adapter_of_deepspeeds_needs_its_configuration(unpacked, tmp_path):
    directory = unpacked("zero2-lora")
    folder = Path(shutil.copytree(place(directory, 2), tmp_path / "global_step2"))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no file says its lora_alpha; write one with peft, .*: LoraConfig"):
        load_checkpoint(folder, base_model=directory / "base")


def test_an_adapters_configuration_beside_latest_is_that_of_every_folder_below(unpacked, tmp_path):
    """OpenRLHF: ``_actor`` has it, given as such, by one of its saves, or by what is above."""
    directory = unpacked("zero2-lora")
    actor = tmp_path / "ckpt" / "_actor"
    for step in (2, 3):
        shutil.copytree(place(directory, step), actor / f"global_step{step}")
        (actor / f"global_step{step}" / "adapter_config.json").rename(actor / "adapter_config.json")
    (actor / "latest").write_text("global_step3")
    config = actor / "adapter_config.json"
    told = json.loads(config.read_text()) | {"base_model_name_or_path": str(directory / "base")}
    config.write_text(json.dumps(told))
    for given, step in ((actor, 3), (actor / "global_step2", 2), (actor / "global_step3", 3)):
        state, expected = load_checkpoint(given), load(directory, step)
        assert_equal_states(state, expected)
    with pytest.raises(CheckpointError, match=r"a directory of checkpoints; pass one of _actor inside it"):
        load_checkpoint(actor.parent)
    with pytest.raises(CheckpointError, match=r"a directory of checkpoints; pass one of ckpt/_actor inside it"):
        load_checkpoint(tmp_path)


def assert_equal_states(state: CheckpointState, expected: CheckpointState) -> None:
    for (name, p), (other, q) in zip(state.model.named_parameters(), expected.model.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)
        for key, value in expected.optimizer.state.get(q, {}).items():
            assert torch.equal(torch.as_tensor(state.optimizer.state[p][key]), torch.as_tensor(value))


def test_what_shapes_the_step_is_read_from_deepspeeds_own_configuration(unpacked, tmp_path):
    state = load(unpacked("zero2-full"))
    assert state.settings == {"max_grad_norm": 1e9, "per_device_train_batch_size": 4}
    told = {setting.name: (setting.value, setting.source) for setting in state.report.settings}
    assert told["max_grad_norm"][0] == 1e9
    assert told["max_grad_norm"][1].endswith("_optim_states.pt")
    assert state.report.trainer == "DeepSpeed"
    script = tmp_path / "train.sh"
    script.write_text("python -m openrlhf.cli.train_ppo_ray --max_norm 0.5 --eps_clip 0.3\n")
    state = load(unpacked("zero2-full"), trainer_config=script)
    assert (state.settings["max_grad_norm"], state.loss["eps_clip"]) == (1e9, 0.3)
    (note,) = [note for note in state.report.notes if note.code == "engine_clips"]
    assert "max_grad_norm 0.5, DeepSpeed's own configuration 1e+09" in note.text


def test_a_swap_shows_by_the_place_in_the_mesh_too(unpacked, tmp_path):
    """Where the archive does not say under which name it was written, as from a buffer."""
    directory = unpacked("fsdp2-full")
    folder = Path(shutil.copytree(place(directory, 2), tmp_path / "actor"))
    contents = [rank_file(folder, "optim", rank).read_bytes() for rank in (0, 1)]
    for rank, content in zip((1, 0), contents, strict=True):
        name = f"optim_world_size_2_rank_{1 - rank}/".encode()
        rank_file(folder, "optim", rank).write_bytes(content.replace(name, b"a" * (len(name) - 1) + b"/"))
    with pytest.raises(
        CheckpointError, match=r"expected the part of rank 0 in the file of rank 0, got that of place .1."
    ):
        load_checkpoint(folder)


def rollouts(seed: int) -> Rollouts:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, SIZES["vocab_size"], (12, 9), generator=random)
    return Rollouts(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        response_mask=torch.arange(9).expand_as(ids) >= 3,
        prompt_ids=torch.arange(12) // 3,
        advantages=torch.randn(12, generator=random),
    )


@pytest.mark.parametrize("case", ["fsdp1-tied", "fsdp2-lora", "fsdp2-full", "zero1-full", "zero2-full", "zero3-lora"])
def test_the_prediction_is_that_of_the_same_state_in_a_plain_checkpoint(unpacked, tmp_path, case):
    directory = unpacked(case)
    state = load(directory)
    state.model.save_pretrained(tmp_path)
    torch.save(state.optimizer.state_dict(), tmp_path / "optimizer.pt")
    plain = load_checkpoint(tmp_path, base_model=directory / "base")
    config = ProbeConfig(loss_type="grpo")
    found, expected = (
        EntropyProbe(s.model, s.optimizer, config).predict(update=rollouts(1), evaluation=rollouts(2)).predicted.value
        for s in (state, plain)
    )
    assert found == pytest.approx(expected, rel=1e-6)
    assert abs(found) > 1e-7


@pytest.mark.parametrize("case", ["fsdp1-lora", "fsdp2-lora"])
def test_an_adapter_saved_alone_is_put_on_the_base_model(unpacked, tmp_path, case):
    """As with verl's ``save_lora_only``."""
    import torch.distributed.tensor  # to load DTensors

    directory = unpacked(case)
    folder = Path(shutil.copytree(place(directory, 2), tmp_path / "actor"))
    for file in folder.glob("model_*"):
        rewrite(file, lambda saved: [saved.pop(name) for name in list(saved) if "lora_" not in name])
    alone, whole = load_checkpoint(folder, base_model=directory / "base"), load(directory)
    theirs = dict(whole.model.named_parameters())
    for name, parameter in alone.model.named_parameters():
        assert torch.equal(parameter, theirs[name])
        if parameter.requires_grad:
            moments = (s.optimizer.state[p]["exp_avg"] for s, p in ((alone, parameter), (whole, theirs[name])))
            assert torch.equal(*moments)
    with pytest.raises(CheckpointError, match="expected a name, got None; pass base_model"):
        load_checkpoint(folder)


@pytest.mark.parametrize(("type_", "decoupled"), [("AdamW", True), ("Adam", True), (None, None)])
def test_deepspeeds_own_adam_has_torchs_step(unpacked, monkeypatch, type_, decoupled):
    """Its groups have other settings, and counts that are plain numbers."""
    read = deepspeed.read_objects

    def own(path: Path, names: Any, instead: str) -> Any:
        content = read(path, names, instead)
        if "optimizer_state_dict" in content:
            content["ds_config"]["optimizer"] = {"type": type_} if type_ else None
            state = content["optimizer_state_dict"]["base_optimizer_state"]
            kept = ("lr", "betas", "eps", "weight_decay", "params")
            state["param_groups"] = [
                {key: group[key] for key in kept} | {"bias_correction": True, "step": 0}
                for group in state["param_groups"]
            ]
            for entry in state["state"].values():
                entry["step"] = int(entry["step"])
        return content

    directory = unpacked("zero2-full")
    expected = load(directory)
    monkeypatch.setattr(deepspeed, "read_objects", own)
    state = load(directory)
    group = state.optimizer.param_groups[0]
    assert (group["lr"], group["betas"]) == (1e-3, (0.9, 0.95))
    theirs = dict(expected.model.named_parameters())
    parameters = optimizer_parameters(state.model, state.optimizer)
    assert all(
        torch.equal(state.optimizer.state[p]["exp_avg"], expected.optimizer.state[theirs[n]]["exp_avg"])
        for n, p in parameters.items()
    )
    said = [note.code for note in state.report.notes]
    assert said == ([] if decoupled else ["weight_decay_unknown"])
