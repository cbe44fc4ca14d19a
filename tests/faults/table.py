"""Every fault: how to make it, and what must come of it. ``docs/checkpoints.md`` describes the same outcomes.

A fault gets a typed error, or the checkpoint loads and the report is suspicious, or it is harmless for the reason
given. ``inspect`` says ``unusable`` where loading raises, unless ``inspects`` says otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.conftest import edit_json, edit_optimizer, edit_tensors
from tests.faults.payloads import Payload, legacy_pickle, raw_pickle, zip_pickle


@dataclass(frozen=True)
class Case:
    """A copy of a checkpoint with its base model, and a directory beside it that nothing may touch."""

    root: Path

    @property
    def checkpoint(self) -> Path:
        return self.root / "run" / "checkpoint-3"

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def outside(self) -> Path:
        return self.root / "outside"

    @property
    def optimizer(self) -> Path:
        return self.checkpoint / "optimizer.pt"

    @property
    def adapter(self) -> Path:
        return self.checkpoint / "adapter_model.safetensors"

    @property
    def weights(self) -> Path:
        return self.checkpoint / "model.safetensors"


@dataclass(frozen=True)
class Fault:
    name: str
    run: str
    make: Callable[[Case], Any]
    error: str | None = None
    message: str = ""
    suspicious: str | None = None
    harmless: str | None = None
    inspects: str | None = None
    manifest: bool = False
    base: str | None = None
    table: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def optimizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Case], None]:
    return lambda case: edit_optimizer(case.checkpoint, change)


def entry(index: int, **values: Any) -> Callable[[Case], None]:
    return optimizer(lambda saved: saved["state"][index].update(values))


def group(**values: Any) -> Callable[[Case], None]:
    return optimizer(lambda saved: [g.update(values) for g in saved["param_groups"]])


def put(key: str, value: float) -> Callable[[Case], None]:
    def change(saved: dict[str, Any]) -> None:
        saved["state"][2][key].view(-1)[3] = value

    return optimizer(change)


def factor(key: str, value: float | None) -> Callable[[Case], None]:
    """Of the first matrix: a value in it, or nothing in its place."""

    def change(saved: dict[str, Any]) -> None:
        state = next(state for state in saved["state"].values() if key in state)
        if value is None:
            del state[key]
        else:
            state[key].view(-1)[0] = value

    return optimizer(change)


def cut(file: str, keep: float) -> Callable[[Case], None]:
    def make(case: Case) -> None:
        path = case.checkpoint / file
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return make


def fill(file: str, content: bytes) -> Callable[[Case], None]:
    return lambda case: (case.checkpoint / file).write_bytes(content)


def remove(file: str) -> Callable[[Case], None]:
    return lambda case: (case.checkpoint / file).unlink()


def config(file: str, **fields: Any) -> Callable[[Case], None]:
    return lambda case: edit_json(case.checkpoint / file, **fields)


def only_policy(case: Case) -> None:
    """Leave one of the two adapters, in a folder of its own."""
    shutil.rmtree(case.checkpoint / "other")


def adapter_folder_outside(case: Case) -> None:
    only_policy(case)
    (case.checkpoint / "policy").rename(case.outside / "policy")
    (case.checkpoint / "policy").symlink_to(case.outside / "policy")


def card_of_quantization(case: Case) -> None:
    sentence = "The following `bitsandbytes` quantization config was used during training:"
    (case.checkpoint / "README.md").write_text(f"{sentence}\n- load_in_4bit: __import__('os').mkdir('ran')\n")


def quantized_base(value: Any) -> Callable[[Case], None]:
    return lambda case: edit_json(case.base / "config.json", quantization_config=value)


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Case], None]:
    return lambda case: edit_tensors(case.checkpoint / file, change)


def base_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Case], None]:
    return lambda case: edit_tensors(case.base / "model.safetensors", change)


def flip_bit(path: Path) -> None:
    """In the middle of the data."""
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 8
    path.write_bytes(data)


def flip_bit_in_archive(case: Case) -> None:
    with zipfile.ZipFile(case.optimizer) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(case.optimizer.read_bytes())
    data[largest.header_offset + 200 + largest.file_size // 2] ^= 64
    case.optimizer.write_bytes(data)


def compress(case: Case) -> None:
    with zipfile.ZipFile(case.optimizer) as archive:
        contents = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(case.optimizer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents:
            archive.writestr(name, content)


def exchange(a: int, b: int) -> Callable[[Case], None]:
    def change(saved: dict[str, Any]) -> None:
        saved["state"][a], saved["state"][b] = saved["state"][b], saved["state"][a]

    return optimizer(change)


def exchange_layers(saved: dict[str, Any]) -> None:
    """Layer 0 and layer 1 of the LoRA run: entries 0 to 13 and 14 to 27."""
    for i in range(14):
        saved["state"][i], saved["state"][i + 14] = saved["state"][i + 14], saved["state"][i]


def share_one_tensor(saved: dict[str, Any]) -> None:
    first: dict[torch.Size, torch.Tensor] = {}
    for state in saved["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = first.setdefault(state[key].shape, state[key])


def merge_groups(saved: dict[str, Any]) -> None:
    first, second = saved["param_groups"]
    first["params"] += second["params"]
    saved["param_groups"] = [first]


def as_sgd(saved: dict[str, Any]) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    saved.clear()
    saved.update(torch.optim.SGD([parameter], momentum=0.9).state_dict())


def nothing_trained(saved: dict[str, Any]) -> None:
    saved["state"].clear()
    for g in saved["param_groups"]:
        g["params"] = []


def wrong_names(saved: dict[str, Any]) -> None:
    for g in saved["param_groups"]:
        g["param_names"] = [f"layer.{i}" for i in g["params"]]


def cut_names(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["param_names"] = ["model.embed_tokens.weight"]


def drop_half(found: dict[str, torch.Tensor]) -> None:
    for name in sorted(found)[::2]:
        del found[name]


def rename_layer(found: dict[str, torch.Tensor]) -> None:
    name = next(n for n in sorted(found) if "layers.0" in n)
    found[name.replace("layers.0", "layers.7")] = found.pop(name)


def put_nan(found: dict[str, torch.Tensor]) -> None:
    found[sorted(found)[-1]].view(-1)[3] = float("nan")


def lower_rank(found: dict[str, torch.Tensor]) -> None:
    for name, x in found.items():
        found[name] = (x[:2] if "lora_A" in name else x[:, :2]).contiguous()


def transpose(found: dict[str, torch.Tensor]) -> None:
    name = next(n for n in sorted(found) if "k_proj.weight" in n)
    found[name] = found[name].T.contiguous()


def declare_absurd_shape(case: Case) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**12, 10**6], "data_offsets": [0, 4]}}).encode()
    case.weights.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def shards(case: Case, directory: str) -> None:
    """The weights as one shard that the index says is elsewhere."""
    found = load_file(case.weights)
    target = case.outside / "weights.safetensors"
    save_file(found, target, metadata={"format": "pt"})
    case.weights.unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(found, f"{directory}weights.safetensors")}
    (case.checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def base_shards(case: Case) -> None:
    found = load_file(case.base / "model.safetensors")
    (case.base / "model.safetensors").rename(case.outside / "weights.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(found, "../outside/weights.safetensors")}
    (case.base / "model.safetensors.index.json").write_text(json.dumps(index))


def link_outside(file: str) -> Callable[[Case], None]:
    def make(case: Case) -> None:
        path = case.checkpoint / file
        path.rename(case.outside / file)
        path.symlink_to(case.outside / file)

    return make


def own_code(case: Case) -> None:
    (case.checkpoint / "evil.py").write_text(f"import os\nos.mkdir({str(case.outside / 'ran')!r})\n")


def auto_map(model_type: str) -> Callable[[Case], None]:
    def make(case: Case) -> None:
        own_code(case)
        mapped = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        edit_json(case.checkpoint / "config.json", model_type=model_type, auto_map=mapped)

    return make


def tokenizer_code(case: Case) -> None:
    own_code(case)
    edit_json(
        case.checkpoint / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
    )


def pickles_everywhere(case: Case) -> None:
    payload = {"evil": Payload(case.outside / "ran")}
    for file in ("scheduler.pt", "rng_state.pth", "rng_state_0.pth", "pytorch_model.bin"):
        zip_pickle(case.checkpoint / file, payload)
    raw_pickle(case.checkpoint / "adapter_model.bin", payload)


def optimizer_pickle(write: Callable[[Path, Any], None]) -> Callable[[Case], None]:
    return lambda case: write(case.optimizer, {"state": {0: Payload(case.outside / "ran")}, "param_groups": []})


def settings_pickle(write: Callable[[Path, Any], None]) -> Callable[[Case], None]:
    return lambda case: write(case.checkpoint / "training_args.bin", {"evil": Payload(case.outside / "ran")})


def settings_with_payload(case: Case) -> None:
    """The trainer's own arguments, of which one is a payload."""
    args = torch.load(case.checkpoint / "training_args.bin", weights_only=False)
    args.hub_token = Payload(case.outside / "ran")
    torch.save(args, case.checkpoint / "training_args.bin")


def another_trainer(case: Case) -> None:
    history = [{"step": 3, "loss": 0.5, "rewards/chosen": 1.0}]
    edit_json(case.checkpoint / "trainer_state.json", log_history=history)
    (case.checkpoint / "training_args.bin").unlink()


def adapter_pickle(case: Case) -> None:
    case.adapter.unlink()
    raw_pickle(case.checkpoint / "adapter_model.bin", {"evil": Payload(case.outside / "ran")})


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Case], None]:
    def make(case: Case) -> None:
        path = case.checkpoint / "entropy-probe-manifest.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return make


def reorder_names(content: dict[str, Any]) -> None:
    found = content["groups"][0]["parameters"]
    found[0], found[1] = found[1], found[0]


FORCED = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
NAMES = "expected weights for exactly the model"
COPY = "the file is damaged"

FAULTS = [
    # --- the optimizer file
    Fault("optimizer missing", "lora", remove("optimizer.pt"), "MissingFileError", "optimizer.pt: .* no such file"),
    Fault("optimizer empty", "lora", fill("optimizer.pt", b""), "DamagedFileError", "got 0 bytes"),
    Fault("optimizer garbage", "full", fill("optimizer.pt", b"\x93" * 5000), "DamagedFileError", "5000 bytes"),
    Fault("optimizer cut in half", "full", cut("optimizer.pt", 0.5), "DamagedFileError", "archive written by torch"),
    Fault("optimizer end missing", "full", cut("optimizer.pt", 0.999), "DamagedFileError", "archive written by torch"),
    Fault("optimizer bit flipped", "full", flip_bit_in_archive, "DamagedFileError", "wrong checksum in"),
    Fault("optimizer compressed", "lora", compress, "UnsafeFileError", "compressed or encrypted"),
    Fault(
        "huge tensor in a small file",
        "full",
        entry(2, exp_avg=torch.zeros(1).expand(10**9), exp_avg_sq=torch.zeros(1).expand(10**9)),
        "DamagedFileError",
        "parameter 2: exp_avg: expected data for each of 1,000,000,000 elements",
    ),
    Fault(
        "stride 0 in the right shape",
        "lora",
        entry(0, exp_avg=torch.zeros(1).expand(4, 64)),
        "DamagedFileError",
        r"parameter 0: exp_avg: expected data for each of 256 elements.*strides \[0, 0\]",
    ),
    Fault("moments share data", "full", optimizer(share_one_tensor), "DamagedFileError", "share their data"),
    Fault("entry missing", "full", optimizer(lambda s: s["state"].pop(26)), "MappingError", r"none for 1 \(index \[26"),
    Fault(
        "key missing",
        "full",
        optimizer(lambda s: s["state"][3].pop("exp_avg")),
        "UnsupportedError",
        "parameter 3: .*Adam",
    ),
    Fault(
        "wrong shape",
        "full",
        entry(2, exp_avg=torch.ones(32, 63), exp_avg_sq=torch.ones(32, 63)),
        "MappingError",
        r"index 2 is \[32, 63\].*\[32, 64\]",
    ),
    Fault(
        "transposed, with the kernel that does not check shapes",
        "full",
        lambda case: (
            group(fused=True)(case),
            entry(2, exp_avg=torch.ones(64, 32), exp_avg_sq=torch.ones(64, 32))(case),
        ),
        "MappingError",
        r"index 2 is \[64, 32\].*\[32, 64\]",
    ),
    Fault("entries of two shapes swapped", "full", exchange(1, 2), "MappingError", "none does; tried"),
    Fault(
        "two layers swapped",
        "lora",
        optimizer(exchange_layers),
        suspicious=r"state of .*layers\.0.* and .*layers\.1.*seems exchanged and 6 more",
        table=True,
    ),
    Fault("first moment NaN", "full", put("exp_avg", float("nan")), "InvalidValueError", "parameter 2 .*NaN"),
    Fault("first moment infinite", "lora", put("exp_avg", float("inf")), "InvalidValueError", "expected finite"),
    Fault("second moment NaN", "lora", put("exp_avg_sq", float("nan")), "InvalidValueError", "expected finite"),
    Fault("second moment negative", "full", put("exp_avg_sq", -1e-9), "InvalidValueError", "at least 0, got -1e-09"),
    Fault("step 0", "lora", entry(0, step=torch.tensor(0.0)), "InvalidValueError", "at least 1, got 0"),
    Fault("step negative", "lora", entry(0, step=torch.tensor(-3.0)), "InvalidValueError", "at least 1, got -3"),
    Fault("maximize", "full", group(maximize=True), "UnsupportedError", "maximize=True"),
    Fault("beta of 1", "full", group(betas=(0.9, 1.0)), "InvalidValueError", r"betas in \[0, 1\)"),
    Fault("beta negative", "lora", group(betas=(-0.1, 0.99)), "InvalidValueError", r"betas in \[0, 1\)"),
    Fault("learning rate 0", "lora", group(lr=0.0), suspicious="learning rate is 0"),
    Fault("learning rate tiny", "lora", group(lr=1e-300), suspicious=r"learning rate 1e-300 is below 1e-15"),
    Fault("eps of 1", "lora", group(eps=1.0), suspicious="eps 1 is above 0.001"),
    Fault("betas exchanged", "lora", group(betas=(0.999, 0.9)), suspicious=r"betas \(0\.999, 0\.9\): .*exchanged\?"),
    Fault(
        "no first moments",
        "lora",
        optimizer(lambda saved: [entry["exp_avg"].zero_() for entry in saved["state"].values()]),
        suspicious="exp_avg is all zero for .* parameters whose exp_avg_sq is not",
    ),
    Fault(
        "adapter in whole numbers",
        "lora",
        tensors("adapter_model.safetensors", lambda x: x.update({n: t.to(torch.int8) for n, t in x.items()})),
        error="UnsupportedError",
        message="not supported: weights in torch.int8; save them in float32",
    ),
    Fault(
        "weights in whole numbers",
        "full",
        tensors("model.safetensors", lambda x: x.update({n: t.to(torch.int16) for n, t in list(x.items())[:1]})),
        error="UnsupportedError",
        message="not supported: weights in torch.int16; save them in float32",
    ),
    Fault("learning rate huge", "lora", group(lr=1e6), suspicious=r"learning rate 1e\+06 is above"),
    Fault("learning rate NaN", "lora", group(lr=float("nan")), "InvalidValueError", "lr: expected a finite number"),
    Fault(
        "learning rate of 60 digits",
        "lora",
        group(lr=10**60),
        "InvalidValueError",
        "lr: expected a finite number, got 1",
    ),
    Fault("groups merged", "full", optimizer(merge_groups), "MappingError", "27 entries .*none does; tried"),
    Fault("another optimizer", "full", optimizer(as_sgd), "MappingError", "for each of 1 parameters, got none for 1"),
    Fault("nothing trained", "full", optimizer(nothing_trained), "MappingError", "at least one trained parameter"),
    Fault("param_names of another model", "full", optimizer(wrong_names), "MappingError", "27 unknown"),
    Fault("param_names incomplete", "full", optimizer(cut_names), "MappingError", "expected 16 names, got 1"),
    # --- optimizers other than Adam
    Fault(
        "Adafactor, a factor missing", "adafactor", factor("exp_avg_sq_row", None), "UnsupportedError", "expected Ad"
    ),
    Fault(
        "Adafactor, factor NaN", "adafactor", factor("exp_avg_sq_col", float("nan")), "InvalidValueError", "finite v"
    ),
    Fault("Adafactor, factor negative", "adafactor", factor("exp_avg_sq_row", -1.0), "InvalidValueError", "at least 0"),
    Fault(
        "Adafactor, rates of its own", "adafactor", group(relative_step=True), "UnsupportedError", "relative_step=True"
    ),
    Fault("Adafactor, entries of two shapes swapped", "adafactor", exchange(1, 2), "MappingError", "none does; tried"),
    Fault(
        "huge factors in a small file",
        "adafactor",
        entry(2, exp_avg_sq_row=torch.zeros(1).expand(10**6), exp_avg_sq_col=torch.zeros(1).expand(10**6)),
        "DamagedFileError",
        "expected data for each of 1,000,000 elements",
    ),
    Fault("SGD that should have momentum", "sgd", group(momentum=0.9), "MappingError", "got none for 27"),
    Fault("SGD, groups merged", "sgd", optimizer(merge_groups), "MappingError", "27 entries .*different ones do"),
    Fault("SGD, kernels exclude each other", "sgd", group(fused=True, foreach=True), "InvalidValueError", "SGD takes"),
    Fault("RMSprop, mean of squares negative", "rmsprop", put("square_avg", -1.0), "InvalidValueError", "at least 0"),
    Fault("Adagrad, sum infinite", "adagrad", put("sum", float("inf")), "InvalidValueError", "expected finite"),
    Fault("keys of bitsandbytes", "adagrad", entry(0, state1=torch.zeros(2)), "UnsupportedError", "of bitsandbytes"),
    # --- an interrupted save
    Fault("scheduler missing", "lora", remove("scheduler.pt"), suspicious="scheduler.pt is missing"),
    Fault("trainer state missing", "lora", remove("trainer_state.json"), suspicious="written last, is missing"),
    Fault("trainer state cut", "lora", cut("trainer_state.json", 0.5), "DamagedFileError", "expected JSON"),
    Fault(
        "trainer state of another save",
        "lora",
        config("trainer_state.json", global_step=7),
        suspicious="at step 3, trainer_state.json at 7",
    ),
    Fault("weights missing", "full", remove("model.safetensors"), "MissingFileError", "expected safetensors weights"),
    Fault("weights empty", "full", fill("model.safetensors", b""), "DamagedFileError", "expected safetensors, got"),
    Fault("weights garbage", "full", fill("model.safetensors", b"\x93" * 999), "DamagedFileError", "expected safeten"),
    Fault("weights cut", "full", cut("model.safetensors", 0.9), "DamagedFileError", "expected safetensors, got"),
    Fault("weights declare an absurd shape", "full", declare_absurd_shape, "DamagedFileError", "expected safetensors"),
    Fault("weights half", "full", tensors("model.safetensors", drop_half), "MismatchError", "14 missing keys"),
    Fault("weights transposed", "full", tensors("model.safetensors", transpose), "MismatchError", "mismatched keys"),
    Fault("weights NaN", "full", tensors("model.safetensors", put_nan), "InvalidValueError", "expected finite values"),
    Fault("config cut", "full", cut("config.json", 0.5), "DamagedFileError", "config.json: expected JSON"),
    Fault("config nested deeply", "full", fill("config.json", b"[" * 10**6), "DamagedFileError", "expected JSON"),
    Fault(
        "config with 10^9 layers", "full", config("config.json", num_hidden_layers=10**9), "MismatchError", "up to 27"
    ),
    Fault("config with 0 heads", "full", config("config.json", num_attention_heads=0), "CheckpointError", "be loaded"),
    # --- the adapter
    Fault("adapter half", "lora", tensors("adapter_model.safetensors", drop_half), "MismatchError", "14 missing"),
    Fault("adapter renamed", "lora", tensors("adapter_model.safetensors", rename_layer), "MismatchError", "1 unknown"),
    Fault("adapter NaN", "lora", tensors("adapter_model.safetensors", put_nan), "InvalidValueError", "expected finite"),
    Fault(
        "adapter as before training",
        "lora",
        tensors("adapter_model.safetensors", lambda x: [t.zero_() for n, t in x.items() if "lora_B" in n]),
        suspicious="every lora_B is 0, as before training, though the optimizer has taken 3 steps",
    ),
    Fault("adapter of lower rank", "lora", tensors("adapter_model.safetensors", lower_rank), "MismatchError", "shape"),
    Fault(
        "rank in the config", "lora", config("adapter_config.json", r=8), "MismatchError", r"expected shape \[8, 64\]"
    ),
    Fault(
        "alpha in the config",
        "lora",
        config("adapter_config.json", lora_alpha=32),
        harmless="undetectable: nothing but adapter_config.json says what alpha was; with a manifest it is an error",
    ),
    Fault(
        "alpha in the config, with a manifest",
        "lora",
        config("adapter_config.json", lora_alpha=32),
        "DamagedFileError",
        "adapter_config.json: expected the recorded",
        manifest=True,
    ),
    Fault("alpha 0", "lora", config("adapter_config.json", lora_alpha=0), "InvalidValueError", "lora_alpha"),
    Fault("alpha NaN", "lora", config("adapter_config.json", lora_alpha=float("nan")), "InvalidValueError", "got nan"),
    Fault(
        "nothing trainable",
        "lora",
        config("adapter_config.json", target_modules=["no_such_layer"]),
        "CheckpointError",
        "the adapter of .*could not be loaded: Target modules",
    ),
    Fault(
        "adapter marked for inference",
        "lora",
        config("adapter_config.json", inference_mode=True),
        harmless="peft writes it into every saved adapter; parameters are made trainable whatever it says",
    ),
    Fault("several adapters", "two adapters", lambda case: None, "MappingError", "got other, policy; pass adapter="),
    Fault(
        "folder of an adapter with control characters",
        "two adapters",
        lambda case: (case.checkpoint / "other").rename(case.checkpoint / "x\n\x1b[2J"),
        "MappingError",
        r"got policy, 'x\\n\\x1b\[2J'; pass",
        table=True,
    ),
    Fault(
        "adapter of a folder linked outside", "two adapters", adapter_folder_outside, "UnsafeFileError", "got a link"
    ),
    Fault(
        "adapter of a folder with a base path that climbs",
        "two adapters",
        lambda case: (
            only_policy(case),
            config("policy/adapter_config.json", base_model_name_or_path="../../../base")(case),
        ),
        "UnsafeFileError",
        r"policy/adapter_config.json: .*without '\.\.'",
    ),
    Fault(
        "adapter of a folder, half",
        "two adapters",
        lambda case: (only_policy(case), tensors("policy/adapter_model.safetensors", drop_half)(case)),
        "MismatchError",
        "4 missing",
    ),
    # --- the base model
    Fault("card that says quantised", "lora", card_of_quantization, "MismatchError", "pass quantization="),
    Fault(
        "base quantised by another method",
        "lora",
        quantized_base({"quant_method": "awq", "bits": 4}),
        "UnsupportedError",
        "quantised by awq",
    ),
    Fault("quantization that is none", "lora", quantized_base(["evil"]), "CheckpointError", "base"),
    Fault(
        "quantised full weights",
        "full",
        config("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "UnsupportedError",
        "not supported: quantised weights",
    ),
    Fault(
        "another base of the same shapes",
        "lora",
        lambda case: (case.base.rename(case.root / "other"), base_of(case, "other")),
        suspicious="the adapter was trained on .*base, the base model given is .*other",
        base="other",
    ),
    Fault(
        "another base, with a manifest",
        "lora",
        base_tensors(lambda found: found.update({n: x + 1e-3 for n, x in found.items()})),
        "MismatchError",
        "not the base model of the manifest",
        inspects="healthy",  # which does not read the base model's weights
        manifest=True,
    ),
    Fault("base without a tensor", "lora", base_tensors(lambda x: x.pop("lm_head.weight")), "MismatchError", NAMES),
    Fault("base NaN", "lora", base_tensors(put_nan), "InvalidValueError", "expected finite values", inspects="healthy"),
    Fault(
        "base of another width",
        "lora",
        lambda case: edit_json(case.base / "config.json", hidden_size=32, head_dim=8),
        "MismatchError",
        "mismatched keys",
    ),
    Fault(
        "base gone", "lora", lambda case: case.base.rename(case.root / "moved"), "MissingFileError", "base model's dir"
    ),
    Fault("base is an adapter", "lora", lambda case: None, "MismatchError", "got an adapter", base="run/checkpoint-3"),
    Fault(
        "tied in the weights, not in the config",
        "tied",
        config("config.json", tie_word_embeddings=False),
        "MismatchError",
        r"1 missing keys \['lm_head",
    ),
    Fault(
        "tied in the config, not in the weights",
        "full",
        config("config.json", tie_word_embeddings=True),
        harmless="both matrices are in the file and loaded as they are; the optimizer's 27 entries prove them untied",
    ),
    Fault(
        "vocabulary smaller than the tokenizer",
        "full",
        lambda case: add_token(case.checkpoint / "tokenizer.json", 98),
        "MismatchError",
        "token ids below the 98 rows of the embedding, got 98",
    ),
    Fault("tokenizer garbage", "full", fill("tokenizer.json", b"{}}"), "DamagedFileError", "expected JSON"),
    # --- hostile files
    Fault("pickle in the optimizer", "lora", optimizer_pickle(zip_pickle), "UnsafeFileError", "nothing in it was run"),
    Fault(
        "pickle in the optimizer, weights-only forced off",
        "lora",
        optimizer_pickle(zip_pickle),
        "UnsafeFileError",
        "nothing in it was run",
        environment=FORCED,
    ),
    Fault(
        "legacy pickle in the optimizer",
        "lora",
        optimizer_pickle(legacy_pickle),
        "DamagedFileError",
        "another format",
        environment=FORCED,
    ),
    Fault(
        "raw pickle in the optimizer",
        "lora",
        optimizer_pickle(raw_pickle),
        "DamagedFileError",
        "another format",
        environment=FORCED,
    ),
    Fault(
        "pickled adapter",
        "lora",
        adapter_pickle,
        "MissingFileError",
        r"pickles \(\.bin\) are not read",
        environment=FORCED,
    ),
    Fault(
        "pickle in the trainer's settings",
        "lora",
        settings_pickle(zip_pickle),
        "UnsupportedError",
        "expected the trainer's arguments, got {'evil': a value of Inert}",
        environment=FORCED,
    ),
    *(
        Fault(
            f"{name} pickle in the trainer's settings",
            "lora",
            settings_pickle(write),
            "DamagedFileError",
            "expected an intact archive",
            environment=FORCED,
        )
        for name, write in (("legacy", legacy_pickle), ("raw", raw_pickle))
    ),
    Fault("cut settings of the trainer", "lora", cut("training_args.bin", 0.5), "DamagedFileError", "intact archive"),
    Fault(
        "payload among the trainer's settings",
        "lora",
        settings_with_payload,
        harmless="whatever the file names is an inert record",
        environment=FORCED,
    ),
    Fault("another trainer by its log", "lora", another_trainer, "UnsupportedError", "got one of DPO, KTO"),
    Fault(
        "pickles in every other file",
        "lora",
        pickles_everywhere,
        harmless="these files are never opened",
        environment=FORCED,
    ),
    Fault("code for an unknown model", "full", auto_map("evil"), "UnsafeFileError", "remote code is never run"),
    Fault(
        "code for a known model", "full", auto_map("qwen2"), harmless="transformers' own class is used, not the code"
    ),
    Fault(
        "code for the tokenizer",
        "full",
        tokenizer_code,
        harmless="the code is not run; a built-in class reads the files",
    ),
    Fault(
        "kernel from the hub",
        "full",
        config("config.json", attn_implementation="evil/kernel"),
        "UnsafeFileError",
        "attn_implementation: expected a built-in",
    ),
    Fault(
        "module import through peft",
        "lora",
        config("adapter_config.json", megatron_config={"a": 1}, megatron_core="evil"),
        "UnsafeFileError",
        "megatron_config",
    ),
    Fault(
        "base path that climbs",
        "lora",
        config("adapter_config.json", base_model_name_or_path="../../base"),
        "UnsafeFileError",
        r"without '\.\.'",
    ),
    Fault("optimizer linked outside", "lora", link_outside("optimizer.pt"), "UnsafeFileError", "got a link to"),
    Fault("weights linked outside", "full", link_outside("model.safetensors"), "UnsafeFileError", "got a link to"),
    Fault("shard outside", "full", lambda case: shards(case, "../../outside/"), "UnsafeFileError", "which is outside"),
    Fault(
        "shard at an absolute path",
        "full",
        lambda case: shards(case, f"{case.outside}/"),
        "UnsafeFileError",
        "which is outside",
    ),
    Fault("shard of the base outside", "lora", base_shards, "UnsafeFileError", "which is outside"),
    Fault("shard missing", "full", lambda case: shards(case, ""), "MissingFileError", "expected the shard that"),
    Fault(
        "pipe in place of a file",
        "full",
        lambda case: (remove("tokenizer.json")(case), os.mkfifo(case.checkpoint / "tokenizer.json")),
        "UnsafeFileError",
        "got a pipe or device",
    ),
    Fault(
        "control characters in a name",
        "lora",
        config("adapter_config.json", base_model_name_or_path="./\x1b]0;owned\x07\x1b[2J\u202e[bold red]x"),
        "MissingFileError",
        "owned",
        table=True,
    ),
    # --- the manifest
    Fault(
        "bit flipped in the weights",
        "full",
        lambda case: flip_bit(case.weights),
        "DamagedFileError",
        "SHA-256",
        manifest=True,
    ),
    Fault(
        "weights cut after the manifest",
        "full",
        cut("model.safetensors", 0.9),
        "DamagedFileError",
        "bytes",
        manifest=True,
    ),
    Fault(
        "manifest garbage",
        "lora",
        fill("entropy-probe-manifest.json", b"{"),
        "DamagedFileError",
        "a manifest of version 1",
    ),
    Fault(
        "manifest names in another order",
        "full",
        manifest(reorder_names),
        "MappingError",
        "expected every entry to have its parameter's shape",
        manifest=True,
    ),
    Fault(
        "manifest of other settings",
        "full",
        manifest(lambda content: content["groups"][0]["settings"].update(lr=0.5)),
        "MappingError",
        "group 0: lr: expected the manifest's 0.5",
        manifest=True,
    ),
    Fault(
        "manifest points outside",
        "full",
        manifest(lambda content: content["files"].update({"../../outside/secret": {"size": 6, "sha256": None}})),
        "UnsafeFileError",
        "expected names in the directory",
        manifest=True,
    ),
    Fault(
        "file added after the manifest",
        "full",
        manifest(lambda content: content["files"].pop("model.safetensors")),
        "MismatchError",
        "model.safetensors: expected a file that",
        manifest=True,
    ),
]


def base_of(case: Case, name: str) -> None:
    """Leave the recorded name of the base as it was; the copy under the given name has other weights."""
    edit_tensors(case.root / name / "model.safetensors", lambda x: x.update({n: t * 1.5 for n, t in x.items()}))


def add_token(file: Path, number: int) -> None:
    content = json.loads(file.read_text())
    extra = {"id": number, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append(extra | {"normalized": False, "special": True})
    file.write_text(json.dumps(content))
