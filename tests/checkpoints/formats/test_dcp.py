"""Shards of ``torch.distributed.checkpoint`` as trainers lay them out: folders, keys, wrapped names, adapters."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from entropy_probe.checkpoints import CheckpointError, errors, inspect_checkpoint, load_checkpoint
from entropy_probe.checkpoints.directory import checkpoints_below
from entropy_probe.checkpoints.eight_bit import WRAPPED
from entropy_probe.steps.adamw import optimizer_parameters, shadow_step
from tests.checkpoints.conftest import assert_same

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
SCHEDULE = {"last_epoch": 2, "_last_lr": [1e-3]}

Content = dict[str, Any]
LAYOUTS: dict[str, Callable[[Content, Content], dict[str, Content]]] = {
    "prime-rl": lambda m, o: {
        "trainer": {"app": {"model": m, "optimizers": o, "scheduler": SCHEDULE, "progress": {"step": 2}}}
    },
    "Miles": lambda m, o: {
        "model": {"model_state": {"model": m}},
        "optimizer": {"optim_state": {"optim": o}},
        "lr_scheduler": {"lr_scheduler_state": {"lr_scheduler": SCHEDULE}},
    },
    "NeMo-RL": lambda m, o: {"weights": {"model": m}, "optimizer": {"optim": {"optim": o, "sched": SCHEDULE}}},
    "AReaL": lambda m, o: {"": {"dcp": {"model": m, "optim": o}}},
    "accelerate": lambda m, o: {"pytorch_model_fsdp_0": {"model": m}, "optimizer_0": {"optimizer": o}},
    "folders of its own": lambda m, o: {"actor": {"net": m}, "actor_opt": {"adam": o}, "schedule": {"s": SCHEDULE}},
    "keys of its own": lambda m, o: {"": {"run": {"policy": m, "opt": o, "steps": torch.tensor(2)}}},
    "a reference beside": lambda m, o: {"": {"app": {"model": m, "ref_model": m, "optim": o}}},
}


def saved(place: Path, layout: str, model: Content, optimizer: Content) -> Path:
    for folder, content in LAYOUTS[layout](model, optimizer).items():
        dcp.save(content, checkpoint_id=place / folder, no_dist=True)
    return place / "trainer" if layout == "prime-rl" else place


def state_of(state) -> tuple[Content, Content]:
    """Model and optimizer as the library gives them to trainers."""
    return get_model_state_dict(state.model), get_optimizer_state_dict(state.model, state.optimizer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_folders_and_keys_are_read(runs, tmp_path, layout):
    run = runs("full")
    original = run.load(2)
    place = saved(tmp_path / "step_2", layout, *state_of(original))
    state = load_checkpoint(place, run.directory / "base")
    assert_same(state, original)
    assert (state.report.verdict, state.report.movement.status) == ("healthy", "consistent")
    assert [place] == [x for x in (tmp_path, *checkpoints_below(tmp_path)) if x != tmp_path]


def test_a_directory_of_checkpoints_leads_to_them_and_opens_few(runs, tmp_path):
    state = state_of(runs("full").load(2))
    for step in (2, 3):
        saved(tmp_path / f"globalstep{step}", "AReaL", *state)
    with pytest.raises(CheckpointError, match="pass one of globalstep2, globalstep3 inside it"):
        load_checkpoint(tmp_path)
    for step in range(4, 11):
        (tmp_path / f"globalstep{step}").mkdir()
        (tmp_path / f"globalstep{step}" / ".metadata").write_bytes(b"not looked at")
    with pytest.raises(CheckpointError, match="pass one of globalstep8, globalstep9, globalstep10 inside it"):
        load_checkpoint(tmp_path)


def test_flattened_state_is_read(runs, tmp_path):
    """As torchtitan and NeMo AutoModel save it, model and optimizer at the top or below a key."""
    run = runs("full")
    original = run.load(2)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = get_optimizer_state_dict(original.model, original.optimizer, options=options)
    model = get_model_state_dict(original.model)
    dcp.save({**model, **flat, "train_state": {"step": 2}}, checkpoint_id=tmp_path / "titan", no_dist=True)
    dcp.save({"optim": flat, "model": model}, checkpoint_id=tmp_path / "below", no_dist=True)
    for place, content in (("weights/model", model), ("optimizer/optim", {"optim": flat})):
        dcp.save(content, checkpoint_id=tmp_path / "automodel/policy" / place, no_dist=True)
    assert checkpoints_below(tmp_path / "automodel") == [tmp_path / "automodel/policy"]
    for place in ("titan", "below", "automodel/policy"):
        state = load_checkpoint(tmp_path / place, run.directory / "base")
        assert_same(state, original)
        groups = sorted((len(g["params"]), g["weight_decay"], g["lr"]) for g in state.optimizer.param_groups)
        assert groups == sorted((len(g["params"]), g["weight_decay"], g["lr"]) for g in original.optimizer.param_groups)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_next_step_is_the_next_checkpoint_bitwise(runs, tmp_path, name):
    run = runs(name)
    states = []
    for k in (2, 3):
        place = saved(tmp_path / f"step_{k}", "prime-rl", *state_of(run.load(k)))
        if name == "lora":
            shutil.copy(run.checkpoint(k) / "adapter_config.json", place)
        states.append(load_checkpoint(place, run.directory / "base"))
    now, after = states
    stepped = shadow_step(optimizer_parameters(now.model, now.optimizer), now.optimizer, run.gradients[3])
    expected = optimizer_parameters(after.model, after.optimizer)
    assert stepped.keys() == expected.keys()
    assert [n for n in stepped if not torch.equal(stepped[n], expected[n])] == []


WRAPPINGS: dict[str, Callable[[str], str]] = {
    "compile": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: re.sub(r"(layers\.\d+)", r"\1._orig_mod", name),
    "checkpointed layers": lambda name: re.sub(r"(layers\.\d+)", r"\1._checkpoint_wrapped_module", name),
    "FSDP1": lambda name: f"_fsdp_wrapped_module.{name}",
    "DDP and compile": lambda name: f"module._orig_mod.{name}",
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_names_of_wrappers_are_taken_off(runs, tmp_path, wrapping):
    run, wrap = runs("full"), WRAPPINGS[wrapping]
    original = run.load(2)
    model, optimizer = state_of(original)
    groups = [group | {"params": [wrap(name) for name in group["params"]]} for group in optimizer["param_groups"]]
    optimizer = {"state": {wrap(n): x for n, x in optimizer["state"].items()}, "param_groups": groups}
    place = saved(tmp_path, "AReaL", {wrap(name): x for name, x in model.items()}, optimizer)
    assert_same(load_checkpoint(place, run.directory / "base"), original)


# --- adapters -------------------------------------------------------------------------------------------------------


def own_names(model: Content) -> Content:
    """As accelerate saves an adapter: without the base, and without the adapter's name."""
    return {
        name.replace(".default", ""): x for name, x in model.items() if "lora_" in name or "modules_to_save" in name
    }


@pytest.fixture
def adapter(runs, tmp_path) -> Callable[..., Path]:
    """A checkpoint in shards of the run ``lora``, with its configuration beside."""

    def make(layout: str = "prime-rl", name: str = "lora", change: Callable[[Content, Content], Any] = lambda m, o: 0):
        run = runs(name)
        model, optimizer = state_of(run.load(2))
        model = own_names(model) if layout == "accelerate" else dict(model)
        change(model, optimizer)
        place = saved(tmp_path / "step_2", layout, model, optimizer)
        shutil.copy(run.checkpoint(2) / "adapter_config.json", place)
        return place

    return make


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        pytest.param(layout, name, marks=[pytest.mark.slow] * (name != "lora" and layout != "prime-rl"))
        for layout in ("prime-rl", "accelerate", "Miles", "folders of its own")
        for name in ("lora", "dora", "rslora")
    ],
)
def test_an_adapter_is_read(runs, adapter, layout, name):
    run = runs(name)
    state = load_checkpoint(adapter(layout, name), run.directory / "base")
    assert_same(state, run.load(2))
    assert (state.report.kind, state.report.verdict) == ("lora", "healthy")


def test_modules_saved_whole_are_read(runs, adapter):
    run = runs("modules_to_save")
    assert_same(load_checkpoint(adapter(name="modules_to_save"), run.directory / "base"), run.load(2))


def test_frozen_parameters_in_the_list_are_left_out(runs, adapter):
    """As an optimizer over all parameters of the model has them."""

    def with_frozen(model: Content, optimizer: Content) -> None:
        group, names = optimizer["param_groups"][0], optimizer["param_groups"][0]["params"]
        group["params"] = [n for n in model if "lora_" not in n][:5] + names

    run = runs("lora")
    assert_same(load_checkpoint(adapter(change=with_frozen), run.directory / "base"), run.load(2))


def test_another_base_model_is_noticed_by_the_frozen_weights(runs, adapter, tmp_path):
    base = Path(shutil.copytree(runs("lora").directory / "base", tmp_path / "other"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] += 0.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"up_proj.weight: expected the frozen base model to be .*other, got other"
    ):
        load_checkpoint(adapter(), base)


def test_a_base_model_in_another_precision_is_the_same(runs, adapter):
    def half(model: Content, _: Content) -> None:
        for name, x in model.items():
            if "lora_" not in name:
                model[name] = x.bfloat16()

    run = runs("lora")
    assert_same(load_checkpoint(adapter(change=half), run.directory / "base"), run.load(2))


def test_the_configuration_that_no_trainer_saves_is_asked_for(runs, adapter):
    place = adapter("accelerate")
    (place / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: expected the configuration") as caught:
        load_checkpoint(place, runs("lora").directory / "base")
    said = str(caught.value)
    code = re.search(r"LoraConfig\(.*\)\.save_pretrained\('[^']*'\)", said)
    assert code is not None
    from peft import LoraConfig

    eval(code[0].replace("...", "8"), {"LoraConfig": LoraConfig})
    assert_same(load_checkpoint(place, runs("lora").directory / "base"), runs("lora").load(2))


# --- faults ---------------------------------------------------------------------------------------------------------

A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
B = A.replace("lora_A", "lora_B")


def flipped(place: Path) -> None:
    file = next(place.rglob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


def cut(place: Path) -> None:
    file = next(place.rglob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-2000])


def eight_bit(moment: torch.Tensor) -> Content:
    codes, scales, values = moment.to(torch.uint8), torch.ones(1), torch.linspace(0, 1, 256)
    one = {"state1": codes, "absmax1": scales, "qmap1": values}
    return one | {"step": torch.tensor(2.0), "state2": codes, "absmax2": scales, "qmap2": values}


CONTENTS: dict[str, tuple[Callable[[Content, Content], Any], str, str]] = {
    "half an adapter": (lambda m, o: m.pop(A), "MismatchError", "1 missing"),
    "an unknown tensor": (lambda m, o: m.update({"v_head.weight": torch.ones(2)}), "MismatchError", "1 unknown"),
    "another rank": (lambda m, o: m.update({A: m[A][:3].clone()}), "MismatchError", "expected shape"),
    "NaN": (lambda m, o: m[B].fill_(float("nan")), "InvalidValueError", "expected finite values"),
    "NaN in a moment": (lambda m, o: o["state"][B]["exp_avg"].fill_(float("nan")), "InvalidValueError", "finite"),
    "moments exchanged in shape": (
        lambda m, o: o["state"].update({A: o["state"][B], B: o["state"][A]}),
        "MappingError",
        "reordered or transposed",
    ),
    "an entry missing": (lambda m, o: o["state"].pop(B), "MappingError", "got none for 1"),
    "a name unknown": (
        lambda m, o: o["param_groups"][0]["params"].append("value.head"),
        "MappingError",
        "value.head|got none for 1",
    ),
    "a name twice": (lambda m, o: o["param_groups"][0]["params"].append(A), "MappingError", "1 in two"),
    "8-bit state": (
        lambda m, o: o["state"].update({B: eight_bit(o["state"][B]["exp_avg"])}),
        "UnsupportedError",
        "state of bitsandbytes in shards",
    ),
    "8-bit state in a dictionary": (
        lambda m, o: o["state"].update({B: {WRAPPED: eight_bit(o["state"][B]["exp_avg"])}}),
        "UnsupportedError",
        "state of bitsandbytes in shards",
    ),
    "two names for one": (lambda m, o: m.update({f"_orig_mod.{A}": m[A]}), "MismatchError", "expected one tensor for"),
}
FILES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "a file missing": (lambda p: next(p.rglob("*.distcp")).unlink(), "MissingFileError", "expected the shard"),
    "a file cut": (cut, "DamagedFileError", "bytes within"),
    "a bit flipped": (flipped, "DamagedFileError|UnsafeFileError", "distcp"),
    "two optimizers": (
        lambda p: shutil.copytree(p / "actor_opt", p / "critic_opt"),
        "UnsupportedError",
        "expected an optimizer in one folder, got 2 .actor_opt, critic_opt.",
    ),
    "two models": (
        lambda p: shutil.copytree(p / "actor", p / "critic"),
        "UnsupportedError",
        "expected a model in one folder, got 2 .actor, critic.",
    ),
    "no optimizer": (lambda p: shutil.rmtree(p / "actor_opt"), "MissingFileError", "expected the optimizer's state"),
}


@pytest.mark.parametrize("fault", [*CONTENTS, *FILES])
def test_a_fault_is_one_line(runs, adapter, fault):
    base = runs("lora").directory / "base"
    if fault in CONTENTS:
        change, error, message = CONTENTS[fault]
        place = adapter(change=change)
    else:
        make, error, message = FILES[fault]
        place = adapter("folders of its own")
        make(place)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(place, base)
    assert isinstance(caught.value, tuple(getattr(errors, name) for name in error.split("|")))
    assert "\n" not in str(caught.value)


def test_parameters_exchanged_by_name_are_seen(runs, adapter):
    b = [B, B.replace("layers.1", "layers.0")]
    swap: Callable[[Content, Content], Any] = lambda m, o: o["state"].update(  # noqa: E731
        {one: o["state"][other] for one, other in itertools.permutations(b)}
    )
    report = inspect_checkpoint(adapter(change=swap), runs("lora").directory / "base")
    assert report.notes[0].code == "moments_exchanged"
