"""The trainer's own settings: read without running anything, told apart by class, and every payload inert."""

from __future__ import annotations

import copyreg
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from entropy_probe.checkpoints import CheckpointError
from entropy_probe.checkpoints.trainer_settings import LOSS, OTHERS, TRAINING_ARGS, read_training_args
from tests.checkpoints.settings_files import pickled_settings as arguments
from tests.checkpoints.settings_files import saved_settings as saved

CODE = 0xE1
"""Of an entry in the extension registry."""


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def item(value: bytes, name: str = "temperature") -> bytes:
    """Instructions that set an item of the dictionary on the stack."""
    return text(name) + value + b"s"


ONE, TWO = b"\x85R", b"\x86R"
"""Call what is on the stack with one argument, or two."""


def payloads(marker: str) -> dict[str, bytes]:
    """Pickles that make a directory where Python's own unpickler reads them, at every place that could."""
    where, mkdir = text(marker), b"cos\nmkdir\n"
    call, space = mkdir + where + ONE, b"ctypes\nSimpleNamespace\n)R}"
    inner = pickle.dumps(None, 0)[:-1] + b"0" + mkdir + pickle.dumps(marker, 0)[:-1] + ONE + b"."
    held = b"B" + len(inner).to_bytes(4, "little") + inner
    imported = b"cbuiltins\n__import__\n" + text("os") + ONE
    values = {
        "reduce": call,
        "in a list": b"]" + call + b"a",
        "in a tuple": call + b"\x85",
        "exec": b"cbuiltins\nexec\n" + text(f"__import__('os').mkdir({marker!r})") + ONE,
        "global by the stack": text("os") + text("mkdir") + b"\x93" + where + ONE,
        "inst": b"(" + where + b"ios\nmkdir\n",
        "obj": b"(" + mkdir + where + b"o",
        "extension": b"\x82" + bytes([CODE]) + where + ONE,
        "nested": b"cpickle\nloads\n" + held + ONE,
        "build": space + text("__setstate__") + mkdir + b"sb" + where + b"b",
        "append": space + text("append") + mkdir + b"sb" + where + b"a",
        "extend": space + text("extend") + b"csubprocess\ncall\nsb(" + text("mkdir") + where + b"e",
        "map": b"cbuiltins\nlist\ncbuiltins\nmap\n" + mkdir + b"]" + where + b"a" + TWO + ONE,
        "getattr": b"cbuiltins\ngetattr\n" + imported + text("mkdir") + TWO + where + ONE,
        "partial": b"cfunctools\npartial\n" + mkdir + where + TWO + b")R",
    }
    return {
        "reduce at the root": b"\x80\x02" + call + b".",
        "reduce as a key": arguments(inside=call + b"K\x01s"),
        "the class": arguments("made_by_import Made"),
        **{name: arguments(inside=item(value)) for name, value in values.items()},
    }


@pytest.fixture
def registered(monkeypatch):
    """``os.mkdir`` in the registry of extensions, and in its cache, which no unpickler asks about."""
    copyreg.add_extension("os", "mkdir", CODE)
    pickle.loads(b"\x80\x02\x82" + bytes([CODE]) + b".")
    yield
    copyreg.remove_extension("os", "mkdir", CODE)


@pytest.fixture
def on_import(tmp_path, monkeypatch) -> Path:
    """A module that makes the directory when it is imported."""
    marker = tmp_path / "ran"
    (tmp_path / "made_by_import.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Made: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return marker


@pytest.mark.parametrize("place", payloads(""))
def test_a_payload_does_not_run(place, tmp_path, registered, on_import):
    pickled = payloads(str(on_import))[place]
    saved(tmp_path, pickled)
    error = None
    try:
        read_training_args(tmp_path)
    except CheckpointError as raised:
        error = str(raised)
    assert error is None or (error.startswith(str(tmp_path / TRAINING_ARGS)) and "\n" not in error)
    assert not on_import.exists()
    assert "made_by_import" not in sys.modules
    with suppress(Exception):  # of what comes after the payload
        pickle.loads(pickled)
    assert on_import.exists(), "the payload is none"
    sys.modules.pop("made_by_import", None)


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        (b"\x80\x02K\x01.", "expected the trainer's arguments, got 1"),
        (b"\x80\x02]K\x01b.", "got a pickle that is none"),
        (b"\x80\x02N", "expected an intact archive"),
        (arguments("trl \x1b[2JGRPOConfig"), "expected the trainer's arguments, got a value of Inert"),
        (arguments(inside=item(b"\x82\x01")), "it names an entry of the extension registry"),
        (arguments(inside=item(b"Vx\nQ")), "a persistent_load|persistent id"),
        (arguments(inside=item(b"Nr\xff\xff\xff\x0f")), "it numbers a value 268435455"),
        (arguments(inside=item(b")" + 60 * b"q\x00h\x00\x86")), "a tuple of 1000 values"),
        (arguments(temperature=float("nan")), "temperature: expected a number, got nan"),
        (arguments(steps_per_generation="x"), "steps_per_generation: expected a whole number above 0, got 'x'"),
        (arguments(gradient_accumulation_steps=0), "gradient_accumulation_steps: expected a whole number above 0"),
        (arguments(num_iterations=True), "num_iterations: expected a whole number above 0, got True"),
        (arguments(scale_rewards=["group"]), "scale_rewards: expected a word, got"),
        (arguments(reward_weights="ab"), "reward_weights: expected numbers, got 'ab'"),
        (arguments(max_grad_norm="x"), "max_grad_norm: expected a number, got 'x'"),
        (arguments(beta=10**30), "beta: expected a finite number"),
        (arguments(loss_type="x" * 1000), "loss_type: expected a finite number or a word"),
        (arguments(loss_type="\x1b[2J"), "loss_type: expected a finite number or a word"),
    ],
)
def test_what_are_no_settings_is_one_line(tmp_path, pickled, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        read_training_args(saved(tmp_path, pickled))
    assert "\n" not in str(caught.value)
    assert "delete the file and give the trainer's settings" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}.", 9 * b"x", b"0" * 2**21])
def test_other_files_are_one_line(tmp_path, content):
    (tmp_path / TRAINING_ARGS).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"training_args\.bin: expected") as caught:
        read_training_args(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_seen(tmp_path):
    file = saved(tmp_path, arguments(temperature=0.75)) / TRAINING_ARGS
    data = bytearray(file.read_bytes())
    data[data.index(b"temperature")] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="wrong checksum"):
        read_training_args(tmp_path)


def test_no_file_tells_nothing(tmp_path):
    assert read_training_args(tmp_path) is None


def written_by(make: Callable[[Path], object], directory: Path) -> Path:
    torch.save(make(directory), directory / TRAINING_ARGS)
    return directory


def test_trls_own_file_is_read_whole(tmp_path):
    """Every name that is looked for is one of ``GRPOConfig``, and its value is that of the object."""
    from trl import GRPOConfig

    def make(directory: Path) -> object:
        return GRPOConfig(
            str(directory), use_cpu=True, bf16=False, report_to="none", loss_type="dr_grpo", beta=0.04, temperature=0.7,
            epsilon_high=0.28, scale_rewards=False, max_grad_norm=0.2, num_iterations=2, steps_per_generation=4,
            gradient_accumulation_steps=2, per_device_train_batch_size=8, lr_scheduler_type="cosine",
            reward_weights=[1.0, 0.5], hub_token="secret", generation_kwargs={"stop": ["x"], "seed": 3},
        )  # fmt: skip

    told, args = read_training_args(written_by(make, tmp_path)), make(tmp_path)
    assert told is not None
    assert told.trainer == "trl.trainer.grpo_config.GRPOConfig"
    assert told.loss is not None
    assert "secret" not in str(told)
    missing = {name for name in (*LOSS, *OTHERS) if name not in told.values}
    others = {"normalize_advantages", "reward_clip_range", "use_liger_loss", "warmup_ratio"}  # of RLOO, of older TRL
    assert missing <= others
    for name, value in told.values.items():
        assert value == getattr(args, name), name
    assert {name: told.loss[name] for name in told.loss if name in told.values} == {
        name: value for name, value in told.values.items() if name in LOSS
    }
    assert told.loss["num_processes"] == 1
    assert told.values["scale_rewards"] == "none"


OTHER_TRAINERS = [
    ("trl.trainer.dpo_config DPOConfig", True),
    ("trl.trainer.kto_config KTOConfig", True),
    ("trl.trainer.sft_config SFTConfig", True),
    ("trl.trainer.reward_config RewardConfig", True),
    ("trl.trainer.ppo_config PPOConfig", True),
    ("trl.trainer.online_dpo_config OnlineDPOConfig", True),
    ("trl.experimental.online_dpo.online_dpo_config OnlineDPOConfig", True),
    ("trl.experimental.async_grpo.async_grpo_config AsyncGRPOConfig", True),
    ("trl.experimental.sdpo.sdpo_config SDPOConfig", True),
    ("axolotl.core.training_args AxolotlDPOConfig", True),
    ("unsloth_compiled_cache.UnslothSFTTrainer UnslothSFTConfig", True),
    ("transformers.training_args TrainingArguments", False),
    ("my_project.train MyArguments", False),
]


@pytest.mark.parametrize(("named", "refused"), OTHER_TRAINERS)
def test_trainers_of_other_losses_are_known_by_name(tmp_path, named, refused):
    told = read_training_args(saved(tmp_path, arguments(named, beta=0.1, loss_type="sigmoid", max_grad_norm=0.5)))
    assert told is not None
    assert told.loss is None
    assert told.other_loss is refused
    assert told.values["max_grad_norm"] == 0.5


@pytest.mark.parametrize(
    ("named", "loss_type"),
    [
        ("trl.trainer.grpo_config GRPOConfig", "bnpo"),
        ("unsloth_compiled_cache.UnslothGRPOTrainer UnslothGRPOConfig", "bnpo"),
        ("open_r1.configs GRPOConfig", "bnpo"),
        ("my_project.train MyArguments", "bnpo"),
        ("trl.trainer.rloo_config RLOOConfig", "rloo"),
        ("trl.experimental.gmpo.gmpo_config GMPOConfig", "gmpo"),
    ],
)
def test_the_losses_that_are_modelled(tmp_path, named, loss_type):
    given = {"loss_type": "bnpo", "epsilon": 0.2, "num_generations": 4, "beta": 0.0}
    told = read_training_args(saved(tmp_path, arguments(named, **given)))
    assert told is not None
    assert told.loss is not None
    assert told.loss["loss_type"] == loss_type


def test_what_older_versions_did_without_a_setting(tmp_path):
    old = {"epsilon": 0.2, "num_generations": 4, "beta": 0.04, "use_vllm": True, "vllm_importance_sampling_cap": 2.0}
    told = read_training_args(saved(tmp_path, arguments(**old)))
    assert told is not None
    assert told.loss is not None
    assert told.loss["loss_type"] == "grpo"
    assert told.loss["use_bias_correction_kl"] is False
    assert told.loss["vllm_importance_sampling_correction"] is False
    assert told.loss["vllm_importance_sampling_clip_max"] == 2.0


def test_processes_are_told_by_the_batch(tmp_path):
    sizes = {"per_device_train_batch_size": 8, "steps_per_generation": 4, "generation_batch_size": 96}
    told = read_training_args(saved(tmp_path, arguments(epsilon=0.2, **sizes)))
    assert told is not None
    assert told.loss is not None
    assert told.loss["num_processes"] == 3


def test_adaptive_entropy_goes_by_the_file_of_its_control(tmp_path):
    given = {"entropy_coef": 0.01, "use_adaptive_entropy": True, "entropy_target": 0.5}
    (tmp_path / "entropy_ctrl_state.json").write_text('{"entropy_coef": 0.025, "last_world_entropy": 0.4}')
    told = read_training_args(saved(tmp_path, arguments(**given)))
    assert told is not None
    assert told.loss is not None
    assert (told.loss["entropy_coef"], told.loss["last_world_entropy"]) == (0.025, 0.4)


def test_the_demo_of_every_checkpoint_format(trained, tmp_path):
    told = read_training_args(trained.checkpoint)
    assert told is not None
    assert told.values["max_completion_length"] == 8
    shutil.copy(trained.checkpoint / TRAINING_ARGS, tmp_path)
    assert os.listdir(tmp_path) == [TRAINING_ARGS]
