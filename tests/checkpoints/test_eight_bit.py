"""8-bit and paged Adam of bitsandbytes in a Trainer's checkpoint, without the library.

``tests/fixtures/trl_8bit`` is what TRL saved with ``optim="adamw_bnb_8bit"``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from entropy_probe.checkpoints import CheckpointError, MismatchError, errors, inspect_checkpoint, load_checkpoint
from entropy_probe.checkpoints.eight_bit import WRAPPED
from entropy_probe.steps.adamw import adamw_step, optimizer_parameters
from tests.checkpoints.conftest import edit_optimizer
from tests.cli.conftest import invoke
from tests.faults.payloads import Payload
from tests.tiny import tiny_policy

FIXTURE = Path(__file__).parents[1] / "fixtures" / "trl_8bit"
PARTS = [f"{what}{i}" for what in ("state", "qmap", "absmax") for i in (1, 2)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("eight-bit") / "base"
    model, tokenizer = tiny_policy()
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return Path(shutil.copytree(FIXTURE / "checkpoint-2", tmp_path / "checkpoint-2"))


def moments(state) -> dict[str, dict[str, Any]]:
    return {n: state.optimizer.state[p] for n, p in optimizer_parameters(state.model, state.optimizer).items()}


def dequantised(entry: dict[str, Any], i: int, block: int = 256) -> torch.Tensor:
    """Element by element, as the format is defined."""
    stored = entry[WRAPPED]
    codes = stored[f"state{i}"]
    if codes.dtype == torch.float32:
        return codes
    elements = enumerate(codes.flatten().tolist())
    values, scales = stored[f"qmap{i}"], stored[f"absmax{i}"]
    return torch.stack([values[code] * scales[at // block] for at, code in elements]).view(codes.shape)


def plain(saved: dict[str, Any]) -> None:
    """The same state as torch's own AdamW saves it."""
    for entry in saved["state"].values():
        m, v = dequantised(entry, 1), dequantised(entry, 2)
        entry.pop(WRAPPED)
        entry |= {"step": torch.tensor(float(entry["step"])), "exp_avg": m, "exp_avg_sq": v}
    for i, group in enumerate(saved["param_groups"]):
        fresh = torch.optim.AdamW([torch.zeros(1)], lr=group["lr"], weight_decay=group["weight_decay"])
        saved["param_groups"][i] = fresh.param_groups[0] | {"params": group["params"]}


def unwrap(saved: dict[str, Any]) -> None:
    """As versions before the wrapper had it."""
    for entry in saved["state"].values():
        entry |= entry.pop(WRAPPED)
    for group in saved["param_groups"]:
        for key in ("alpha", "t_alpha", "t_beta3"):
            del group[key]


def test_moments_are_those_of_the_library_to_the_bit(base):
    truth = torch.load(FIXTURE / "dequantized.pt", weights_only=True)
    state = load_checkpoint(FIXTURE / "checkpoint-2", base)
    entries = list(moments(state).values())
    assert len(entries) == len(truth) == 6
    for i, entry in enumerate(entries):  # the Trainer's first group is in the model's order
        assert {key: torch.equal(entry[key].flatten()[::97], x) for key, x in truth[i].items()} == {
            "exp_avg": True,
            "exp_avg_sq": True,
        }
        assert entry["step"] == 2
        assert entry["exp_avg"].dtype == torch.float32


def test_the_step_is_that_of_the_library(base):
    state = load_checkpoint(FIXTURE / "checkpoint-2", base)
    parameters = optimizer_parameters(state.model, state.optimizer)
    gradients = torch.load(FIXTURE / "gradients.pt", weights_only=True)
    step = adamw_step(parameters, state.optimizer, gradients)
    after = load_file(FIXTURE / "after.safetensors")
    for name, parameter in parameters.items():
        moved = after[name.replace(".default", "")].double() - parameter.detach().double()
        error = (step.delta[name].double() - moved).norm() / moved.norm()
        assert error < 2e-5, (name, error)  # the kernel's approximate root
        assert moved.norm() > 1e-3


def test_the_report_says_what_it_is(base):
    report = inspect_checkpoint(FIXTURE / "checkpoint-2", base)
    assert (report.verdict, report.optimizer) == ("healthy", "AdamW, 8-bit state")
    assert [note.code for note in report.notes] == ["eight_bit_state"]
    assert report.movement is not None
    assert report.movement.status == "consistent"


def blocks_of_2048(saved: dict[str, Any]) -> None:
    for entry in saved["state"].values():
        for i in (1, 2):
            if f"absmax{i}" in entry[WRAPPED]:
                entry[WRAPPED][f"absmax{i}"] = entry[WRAPPED][f"absmax{i}"][::8].clone()


@pytest.mark.parametrize(("change", "block"), [(unwrap, 256), (lambda s: None, 256), (blocks_of_2048, 2048)])
def test_other_versions_lay_the_same_out_otherwise(checkpoint, base, change, block):
    edit_optimizer(checkpoint, change)
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for entry, stored in zip(moments(load_checkpoint(checkpoint, base)).values(), saved["state"].values(), strict=True):
        stored = stored if WRAPPED in stored else {WRAPPED: stored}
        assert torch.equal(entry["exp_avg"], dequantised(stored, 1, block))
        assert torch.equal(entry["exp_avg_sq"], dequantised(stored, 2, block))


def test_paged_state_in_32_bits_is_plain_adamw(checkpoint, base):
    def paged(saved: dict[str, Any]) -> None:
        for entry in saved["state"].values():
            entry[WRAPPED] = {f"state{i}": dequantised(entry, i) for i in (1, 2)}

    expected = moments(load_checkpoint(checkpoint, base))
    edit_optimizer(checkpoint, paged)
    state = load_checkpoint(checkpoint, base)
    assert (state.report.optimizer, state.report.notes) == ("AdamW", ())
    for name, entry in moments(state).items():
        assert torch.equal(entry["exp_avg"], expected[name]["exp_avg"])


def test_large_tensors_are_dequantised_in_parts():
    from entropy_probe.checkpoints.eight_bit import EightBitState

    n = 2**23 + 300
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8)
    scales = torch.rand(-(-n // 256), generator=generator)
    entry = {"step": 1, "state1": codes, "state2": codes, "absmax1": scales, "absmax2": scales}
    entry |= {"qmap1": torch.linspace(-1, 1, 256), "qmap2": torch.linspace(0, 1, 256)}
    group = {"params": [0], "lr": 1.0, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    read = EightBitState.of(Path("here"), [group], {0: entry}, 10**9).read(0, "exp_avg")
    at = torch.tensor([0, 255, 256, 2**22 - 1, 2**22, 2**23 + 1, n - 1])
    assert torch.equal(read[at], entry["qmap1"][codes[at].int()] * scales[at // 256])


def test_a_prediction_is_that_of_the_same_state_in_a_plain_checkpoint(checkpoint, base, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{a}+{a}=", "answer": str(2 * a)}) + "\n" for a in range(4)))
    predicted = []
    for name, change in (("8 bits", lambda s: None), ("plain", plain)):
        edit_optimizer(checkpoint, change)
        settings = {
            "checkpoint": str(checkpoint),
            "base_model": str(base),
            "output_dir": str(tmp_path / name),
            "prompts": {"jsonl": str(prompts)},
            "reward": "tests.cli.rewards:odd_characters",
            "update": {"num_prompts": 4, "group_size": 4},
            "evaluation": {"total_sequences": 16},
            "probe": {"max_completion_length": 6},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        done = invoke("run", tmp_path / "run.yaml")
        assert done.exit_code == 0, (done.output, done.exception)
        results = json.loads((tmp_path / name / "results.json").read_text())
        predicted.append(results["predicted"]["value"])
        codes = [note["code"] for note in results["diagnostics"]["notes"]]
        assert ("eight_bit_state" in codes) == (name == "8 bits")
    assert predicted[0] != 0
    assert predicted[0] == pytest.approx(predicted[1], rel=1e-6)


# --- faults ---------------------------------------------------------------------------------------------------------


def inside(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change what is stored of the first parameter."""
    return lambda place: edit_optimizer(place, lambda saved: change(saved["state"][0][WRAPPED]))


def put(key: str, value: Any) -> Callable[[Path], None]:
    def change(stored: dict[str, Any]) -> None:
        stored[key] = value(stored[key]) if callable(value) else value

    return inside(change)


def group(**settings: Any) -> Callable[[Path], None]:
    return lambda place: edit_optimizer(place, lambda saved: saved["param_groups"][0].update(settings))


def swap(saved: dict[str, Any]) -> None:
    saved["state"][0], saved["state"][3] = saved["state"][3], saved["state"][0]


def cut(place: Path) -> None:
    file = place / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-3000])


def flip(place: Path) -> None:
    file = place / "optimizer.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


FAULTS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "file missing": (lambda p: (p / "optimizer.pt").unlink(), "MissingFileError", "expected the optimizer's state"),
    "truncated": (cut, "DamagedFileError", "archive"),
    "flipped": (flip, "DamagedFileError|UnsafeFileError", r"optimizer\.pt"),
    "payload": (put("state1", Payload(Path("ran"))), "UnsafeFileError", "nothing in it was run"),
    "swapped": (lambda p: edit_optimizer(p, swap), "MappingError", "index 0 is"),
    "a scale missing": (put("absmax1", lambda x: x[:-1].clone()), "MismatchError", r"absmax1 \[15\]"),
    "one scale": (put("absmax2", lambda x: x[:1].clone()), "MismatchError", r"absmax2 \[1\]"),
    "a map cut": (put("qmap2", lambda x: x[:-1].clone()), "MismatchError", r"qmap2 \[255\]"),
    "NaN": (put("absmax2", lambda x: x * float("nan")), "InvalidValueError", "absmax2: expected finite scales"),
    "negative scale": (
        put("absmax1", lambda x: -x),
        "InvalidValueError",
        "absmax1: expected finite scales of at least",
    ),
    "map out of order": (put("qmap1", lambda x: x.flip(0)), "InvalidValueError", "qmap1: expected rising values"),
    "signed map of squares": (put("qmap2", lambda x: 2 * x - 1), "InvalidValueError", "expected rising values from 0"),
    "codes of another type": (
        put("state1", lambda x: x.int()),
        "DamagedFileError",
        "state1: expected a dense tensor of",
    ),
    "codes that repeat": (
        put("state1", lambda x: x[:1, :1].expand(64, 64)),
        "DamagedFileError",
        "state1: expected a dense tensor",
    ),
    "codes of another shape": (put("state2", lambda x: x[:32].clone()), "MismatchError", r"absmax2 \[16\]"),
    "moments of two shapes": (
        inside(lambda s: s.update(state2=s["state2"][:32].clone(), absmax2=s["absmax2"][:8].clone())),
        "MismatchError",
        r"exp_avg_sq: expected the shape \[64, 64\]",
    ),
    "no map": (inside(lambda s: s.pop("qmap1")), "UnsupportedError", "expected .*qmap1"),
    "no codes": (put("state2", "none"), "DamagedFileError", "state2: expected a tensor"),
    "no tensors": (
        lambda p: edit_optimizer(p, lambda s: s["state"][0].update({WRAPPED: 3})),
        "DamagedFileError",
        "expected tensors by name",
    ),
    "an entry missing": (
        lambda p: edit_optimizer(p, lambda s: s["state"].pop(2)),
        "MappingError",
        "expected state for each of 6 parameters, got none for 1",
    ),
    "no step": (
        lambda p: edit_optimizer(p, lambda s: s["state"][0].pop("step")),
        "InvalidValueError",
        "step: expected",
    ),
    "step 0": (lambda p: edit_optimizer(p, lambda s: s["state"][0].update(step=0)), "InvalidValueError", "at least 1"),
    "Lion": (inside(lambda s: [s.pop(k) for k in PARTS if k.endswith("2")]), "UnsupportedError", "no second moment"),
    "LAMB": (put("unorm_vec", torch.zeros(1)), "UnsupportedError", "bounds the step of each tensor"),
    "percentile clipping": (put("gnorm_vec", torch.zeros(100)), "UnsupportedError", "percentile clipping"),
    "AdEMAMix": (group(alpha=5.0, betas=(0.9, 0.999, 0.9999)), "UnsupportedError", "AdEMAMix"),
    "AdEMAMix, whose scales are two": (
        lambda p: [
            group(alpha=5.0, betas=(0.9, 0.999, 0.9999))(p),
            put("absmax1", lambda x: x.expand(2, -1).clone())(p),
        ],
        "UnsupportedError",
        "AdEMAMix",
    ),
    "settings of another": (group(momentum=0.9), "UnsupportedError", "settings of another .'momentum'"),
    "rate not finite": (group(lr=float("inf")), "InvalidValueError", "lr: expected a finite number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line(checkpoint, base, fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, error, message = FAULTS[fault]
    make(checkpoint)
    names = tuple(getattr(errors, name) for name in error.split("|"))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(checkpoint, base)
    assert isinstance(caught.value, names)
    assert "\n" not in str(caught.value)
    assert inspect_checkpoint(checkpoint, base).verdict == "unusable"
    assert not (tmp_path / "ran").exists()


def test_a_file_of_another_step_is_suspicious(checkpoint, base):
    edit_optimizer(checkpoint, lambda saved: [entry.update(step=9) for entry in saved["state"].values()])
    report = inspect_checkpoint(checkpoint, base)
    assert report.verdict == "suspicious"
    assert "two_saves" in [note.code for note in report.notes]


def test_two_entries_of_equal_shape_exchanged_are_seen(checkpoint, base):
    def exchange(saved: dict[str, Any]) -> None:
        saved["state"][1], saved["state"][5] = saved["state"][5], saved["state"][1]  # lora_B of q_proj and o_proj

    edit_optimizer(checkpoint, exchange)
    report = inspect_checkpoint(checkpoint, base)
    assert (report.verdict, report.notes[0].code) == ("suspicious", "moments_exchanged")


def test_a_base_model_of_another_size_is_refused(checkpoint, tmp_path):
    tiny_policy(hidden_size=32)[0].save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match=r"adapter_model.safetensors: .*expected shape"):
        load_checkpoint(checkpoint, tmp_path / "other")
