"""Recorded names: in the file, in a manifest from training, and in one written afterwards."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from entropy_probe.checkpoints import (
    CheckpointError,
    DamagedFileError,
    MappingError,
    MismatchError,
    inspect_checkpoint,
    load_checkpoint,
)
from entropy_probe.checkpoints.adapters import live_settings
from entropy_probe.checkpoints.examine import Request, examine
from entropy_probe.checkpoints.manifest import MANIFEST_FILE, plain_name, read_manifest, write_manifest
from entropy_probe.checkpoints.record import record_checkpoint
from entropy_probe.integrations.trl import ManifestCallback
from tests.checkpoints.conftest import edit_optimizer
from tests.tiny import tiny_policy, train_grpo


@pytest.fixture(scope="module", params=["lora", "full", "tied"])
def trained(request, tmp_path_factory):
    """A run of two steps with the callback."""
    directory = tmp_path_factory.mktemp("manifest")
    fields = {"lora": request.param == "lora", "tie_word_embeddings": request.param == "tied"}
    train_grpo(directory, steps=2, weight_decay=0.1, callbacks=[ManifestCallback()], **fields)
    return directory


def by_name(state):
    return {n: state.optimizer.state[p] for n, p in state.model.named_parameters() if p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])


def test_the_callback_records_what_the_rules_find(trained, tmp_path):
    checkpoint = trained / "checkpoint-2"
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    assert (manifest.recorded, manifest.mapping, manifest.global_step) == ("training", "live optimizer", 2)
    with_manifest = load_checkpoint(checkpoint)
    report = with_manifest.report
    assert report.optimizer_state.mapping == f"manifest (from the live optimizer, {len(manifest.names)} tensors)"
    assert report.manifest == "training"
    plain = shutil.copytree(checkpoint, tmp_path / "plain")
    (plain / MANIFEST_FILE).unlink()
    without = load_checkpoint(plain)
    assert without.report.optimizer_state.mapping.startswith("rule:hf-trainer-patterns + shapes")
    assert same(by_name(with_manifest), by_name(without))
    assert [g.settings["weight_decay"] for g in manifest.groups] == [0.1, 0.0]
    for name, record in manifest.files.items():
        assert record.sha256 == hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    assert {"optimizer.pt", "trainer_state.json", "training_args.bin"} <= manifest.files.keys()
    assert manifest.base_model.name == str(trained / "base")
    assert manifest.base_model.files.keys() == {"model.safetensors"}


def test_a_manifest_settles_what_the_rules_cannot(trained, tmp_path):
    """The order of entries comes from the manifest: reversed in both, the state still finds its parameters."""
    checkpoint = shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    expected = by_name(load_checkpoint(checkpoint))

    def reverse(saved):
        size = len(saved["param_groups"][0]["params"])
        reordered = {size - 1 - i if i < size else i: state for i, state in saved["state"].items()}
        saved["state"] = dict(sorted(reordered.items()))

    edit_optimizer(checkpoint, reverse)
    content = json.loads((checkpoint / MANIFEST_FILE).read_text())
    content["groups"][0]["parameters"].reverse()
    data = (checkpoint / "optimizer.pt").read_bytes()
    content["files"]["optimizer.pt"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(content))
    assert same(by_name(load_checkpoint(checkpoint)), expected)
    (checkpoint / MANIFEST_FILE).unlink()
    assert inspect_checkpoint(checkpoint).verdict == "unusable"


def test_a_manifest_by_inspection_claims_no_more_than_the_rules(copy_of):
    checkpoint = copy_of("lora")
    before = inspect_checkpoint(checkpoint)
    path, _ = record_checkpoint(checkpoint, written_by="a test")
    assert path == checkpoint / MANIFEST_FILE
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    assert (manifest.recorded, manifest.mapping) == ("inspection", before.optimizer_state.mapping)
    after = inspect_checkpoint(checkpoint)
    assert after.verdict == "healthy"
    assert after.optimizer_state.mapping == f"manifest (by inspection: {before.optimizer_state.mapping})"
    with pytest.raises(CheckpointError, match="expected no manifest yet, got one"):
        record_checkpoint(checkpoint, written_by="a test")


def test_a_manifest_from_training_says_which_adapter_was_trained(tmp_path):
    train_grpo(tmp_path, lora=False, prepare="adapters", steps=2, callbacks=[ManifestCallback()])
    checkpoint = tmp_path / "checkpoint-2"
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    assert manifest.adapter == "policy"
    assert {"policy/adapter_model.safetensors", "other/adapter_config.json"} <= manifest.files.keys()
    state = load_checkpoint(checkpoint)
    assert state.report.optimizer_state.mapping.startswith("manifest (from the live optimizer")
    assert same(by_name(state), by_name(load_checkpoint(checkpoint, adapter="policy")))
    with pytest.raises(MismatchError, match="adapter: expected 'policy', the manifest's, got 'other'"):
        load_checkpoint(checkpoint, adapter="other")


def test_a_manifest_guards_the_files_of_an_adapter_in_a_folder(runs, copy_of):
    checkpoint = copy_of("two adapters")
    _, report = record_checkpoint(checkpoint, written_by="a test", adapter="policy")
    assert inspect_checkpoint(checkpoint).optimizer_state == report.optimizer_state.model_copy(
        update={"mapping": f"manifest (by inspection: {report.optimizer_state.mapping})"}
    )
    weights = checkpoint / "policy" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 8
    weights.write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"policy/adapter_model\.safetensors: expected the recorded SHA-256"):
        load_checkpoint(checkpoint)


def test_a_frozen_part_is_recorded_with_the_rest(runs, copy_of):
    """With the names recorded, the model that training started from is not needed any more."""
    checkpoint = copy_of("frozen subset")
    record_checkpoint(checkpoint, runs("frozen subset").needed["base_model"], written_by="a test")
    expected = runs("frozen subset").load(2)
    loaded = load_checkpoint(checkpoint)
    assert same(by_name(loaded), by_name(expected))
    assert loaded.report.movement == expected.report.movement


def test_a_doubtful_order_is_not_recorded(copy_of):
    checkpoint = copy_of("lora", 3)

    def exchange(saved):
        for i in range(14):
            saved["state"][i], saved["state"][i + 14] = saved["state"][i + 14], saved["state"][i]

    edit_optimizer(checkpoint, exchange)
    with pytest.raises(MappingError, match="got a doubtful one: the optimizer state of"):
        record_checkpoint(checkpoint, written_by="a test")
    assert not (checkpoint / MANIFEST_FILE).exists()


@pytest.mark.parametrize("trained", ["lora"], indirect=True)
def test_a_manifest_knows_how_training_quantised_the_base(trained, tmp_path):
    """No other file does, and the plain weights are another policy."""
    checkpoint = Path(shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2"))
    config = SimpleNamespace(
        to_dict=lambda: {
            "quant_method": SimpleNamespace(value="bitsandbytes"),
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.float32,
            "llm_int8_threshold": 6.0,
        }
    )
    model = torch.nn.Linear(1, 1)
    assert live_settings(model) is None
    model.config = SimpleNamespace(quantization_config=config)
    settings = live_settings(model)
    manifest = read_manifest(checkpoint)
    assert manifest.quantization is None
    (checkpoint / MANIFEST_FILE).unlink()
    write_manifest(checkpoint, manifest.model_copy(update={"quantization": settings}))
    expected = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}

    def examined(given=None):
        return examine(Request(checkpoint, trained / "base", None, given), {}).model.adapter.quantization.settings

    assert examined() == expected
    assert examined(expected | {"bnb_4bit_use_double_quant": True})["bnb_4bit_use_double_quant"]
    with pytest.raises(MismatchError, match=r"expected what training used, bnb_4bit_quant_type 'nf4', got 'fp4'"):
        examined({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"})


def test_a_failing_callback_warns_once_and_leaves_training_alone(tmp_path):
    class Stray(ManifestCallback):
        def on_save(self, args, state, control, **kwargs):
            other, _ = tiny_policy()
            super().on_save(args, state, control, **(kwargs | {"model": other}))

    with pytest.warns(UserWarning, match="no manifest, and none for later.*expected parameters of the model") as caught:
        train_grpo(tmp_path, lora=True, steps=2, callbacks=[Stray()])
    assert len([w for w in caught if "no manifest" in str(w.message)]) == 1
    assert not list(tmp_path.rglob(MANIFEST_FILE))


def named_checkpoint(directory, names, trained, architecture="qwen2"):
    """Full weights whose optimizer was given names, over some of the parameters in an order of its own."""
    model, _ = tiny_policy(architecture)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([(names(n), parameters[n]) for n in trained(list(parameters))], lr=1e-3)
    for i, p in enumerate(parameters.values()):
        p.grad = torch.full_like(p, 0.1 * (i + 1))
    optimizer.step()
    model.save_pretrained(directory)
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    return {n: optimizer.state[parameters[n]] for n in trained(list(parameters))}


@pytest.mark.parametrize("names", [str, "module.{}".format, "_orig_mod.{}".format])
@pytest.mark.parametrize("trained", [sorted, lambda names: names[3:7], lambda names: names[::-2]])
def test_names_in_the_file_decide(tmp_path, names, trained):
    """Whatever the order and the subset, and with the wrappers' prefixes; what has no entry is frozen."""
    expected = named_checkpoint(tmp_path, names, trained)
    state = load_checkpoint(tmp_path)
    assert same(by_name(state), expected)
    assert state.report.optimizer_state.mapping == f"names ({len(expected)} tensors)"


def test_names_that_fit_in_shape_but_not_in_the_manifest_are_refused(trained, tmp_path):
    checkpoint = shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    names = list(read_manifest(checkpoint).names)
    swapped = [
        n.replace("layers.0", "layers.9").replace("layers.1", "layers.0").replace("layers.9", "layers.1") for n in names
    ]

    def name(saved):
        for g in saved["param_groups"]:
            g["param_names"] = [swapped[i] for i in g["params"]]

    edit_optimizer(checkpoint, name)
    data = (checkpoint / "optimizer.pt").read_bytes()
    content = json.loads((checkpoint / MANIFEST_FILE).read_text())
    content["files"]["optimizer.pt"] = {"size": len(data), "sha256": None}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(MappingError, match="expected its param_names to be those of the manifest"):
        load_checkpoint(checkpoint)


def test_wrappers_come_off_names():
    assert plain_name("module._orig_mod.model._fsdp_wrapped_module.layers.0.weight") == "model.layers.0.weight"
    assert plain_name("model.module.weight") == "model.module.weight"
