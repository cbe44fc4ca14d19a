"""A LoRA run on a 4-bit base model: loading, replay, probing."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.checkpoints import CheckpointError, inspect_checkpoint, load_checkpoint
from entropy_probe.checkpoints.libraries import quiet
from entropy_probe.checkpoints.manifest import MANIFEST_FILE
from entropy_probe.checkpoints.record import record_checkpoint
from entropy_probe.integrations.trl import ManifestCallback
from entropy_probe.steps.adamw import adamw_step, optimizer_parameters, shadow_step
from tests.checkpoints.conftest import edit_json
from tests.invariants.traces import assert_same, state
from tests.notes import texts
from tests.tiny import train_grpo
from tests.trained import Run

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: qlora)")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes", "ignore::FutureWarning:bitsandbytes")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
TRAINED = NF4 | {"bnb_4bit_compute_dtype": "float32"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    directory, gradients = tmp_path_factory.mktemp("qlora"), {}
    train_grpo(directory, lora=True, steps=3, capture=gradients, quantization=TRAINED)
    return Run(directory, gradients, {"quantization": NF4})


def rollouts(seed: int, groups: int = 4, size: int = 4) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    n = groups * size
    ids = torch.randint(3, 40, (n, 10), generator=generator)
    response = torch.zeros(n, 10, dtype=torch.bool)
    response[:, 4:] = True
    ids[:, :4] = ids[::size, :4].repeat_interleave(size, 0)
    prompts = torch.arange(groups).repeat_interleave(size)
    advantages = torch.randn(n, generator=generator)
    return Rollouts(ids, torch.ones_like(response), response, prompts, advantages=advantages)


def logits(model, batch: Rollouts) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits


def test_replay_is_bitwise(run):
    """TRL trains the adapter of a 4-bit model in bfloat16, so its steps are rounded to that."""
    now, after = run.load(2, dtype="bfloat16"), run.load(3, dtype="bfloat16")
    parameters, expected = (optimizer_parameters(s.model, s.optimizer) for s in (now, after))
    stepped = shadow_step(parameters, now.optimizer, run.gradients[3])
    assert stepped.keys() == expected.keys() == run.gradients[3].keys()
    assert [n for n in stepped if not torch.equal(stepped[n], expected[n])] == []
    assert not all(torch.equal(parameters[n], expected[n]) for n in stepped)
    assert {p.dtype for p in stepped.values()} == {torch.bfloat16}


def test_in_float32_the_same_step_is_not_rounded(run):
    now, after = run.load(2), run.load(3)
    parameters, expected = (optimizer_parameters(s.model, s.optimizer) for s in (now, after))
    delta = adamw_step(parameters, now.optimizer, run.gradients[3]).delta
    for name, change in delta.items():
        got, wanted = parameters[name] + change, expected[name]
        assert got.dtype == torch.float32
        # half a unit in the last place of bfloat16 for the parameter, and the moments' own rounding
        assert ((got - wanted).abs() <= 2**-8 * wanted.abs() + 0.02 * change.abs().max()).all(), name


def test_the_policy_is_the_quantised_one(run):
    import bitsandbytes
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model, batch = run.load(2).model, rollouts(0)
    config = BitsAndBytesConfig(**TRAINED)
    base = AutoModelForCausalLM.from_pretrained(
        run.directory / "base", dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    with quiet():
        expected = PeftModel.from_pretrained(base, run.checkpoint(2)).eval()
    for module in expected.modules():  # the kernel of training, on processors that have another for inference
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    torch.testing.assert_close(logits(model, batch), logits(expected, batch), rtol=1e-5, atol=1e-6)
    assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules()) == 14
    plain = load_checkpoint(run.checkpoint(2)).model
    assert (logits(model, batch) - logits(plain, batch)).abs().max() > 1e-3


def test_a_base_model_stored_in_four_bits_needs_nothing(run, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # kept in bfloat16, as most base models are, but computed with in float32
    plain = AutoModelForCausalLM.from_pretrained(run.directory / "base", dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain")
    config = BitsAndBytesConfig(**NF4)
    stored = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
    )
    stored.save_pretrained(tmp_path / "base")
    checkpoint, batch = run.checkpoint(2), rollouts(0)
    loaded = load_checkpoint(checkpoint, tmp_path / "base")
    quantised_now = load_checkpoint(checkpoint, tmp_path / "plain", quantization=NF4)
    expected = logits(quantised_now.model, batch)
    assert torch.equal(logits(loaded.model, batch), expected)
    # the way through which gradients go dequantises by itself
    mask = batch.attention_mask.long()
    differentiable = loaded.model(input_ids=batch.input_ids, attention_mask=mask).logits
    torch.testing.assert_close(differentiable, expected, rtol=1e-5, atol=1e-5)
    assert inspect_checkpoint(checkpoint, tmp_path / "base").verdict == "healthy"
    with pytest.raises(CheckpointError, match="is stored quantised already"):
        load_checkpoint(checkpoint, tmp_path / "base", quantization=NF4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_precision_is_that_of_everything_but_the_codes(run, dtype):
    wanted = getattr(torch, dtype)
    loaded = load_checkpoint(run.checkpoint(2), quantization=NF4, dtype=dtype)
    codes = [p for p in loaded.model.parameters() if hasattr(p, "quant_state")]
    assert len(codes) == 14
    assert {p.dtype for p in codes} == {torch.uint8}
    base = [p for n, p in loaded.model.named_parameters() if not hasattr(p, "quant_state") and "lora_" not in n]
    assert {p.dtype for p in base} == {wanted}
    assert {m.compute_dtype for m in loaded.model.modules() if hasattr(m, "compute_dtype")} == {wanted}
    config = ProbeConfig(dtype=dtype, max_grad_norm=None)
    result = EntropyProbe(loaded.model, loaded.optimizer, config).predict(update=rollouts(0), evaluation=rollouts(1))
    assert any("computed in torch.bfloat16" in m for m in texts(result.diagnostics.notes)) == (dtype == "bfloat16")
    if dtype == "bfloat16":
        with pytest.raises(ValueError, match=r"expected parameters of at least float32, got torch\.bfloat16"):
            EntropyProbe(loaded.model, loaded.optimizer)


def test_coarse_arithmetic_is_seen_behind_float32_parameters(run):
    loaded = run.load(2)
    next(m for m in loaded.model.modules() if hasattr(m, "compute_dtype")).compute_dtype = torch.bfloat16
    with pytest.raises(ValueError, match=r"got torch\.bfloat16 in the arithmetic of .*q_proj"):
        EntropyProbe(loaded.model, loaded.optimizer)


def test_the_storage_type_of_codes_is_no_precision(run):
    storage = NF4 | {"bnb_4bit_quant_storage": "bfloat16"}
    loaded = load_checkpoint(run.checkpoint(2), quantization=storage)
    assert {p.dtype for p in loaded.model.parameters() if hasattr(p, "quant_state")} == {torch.bfloat16}
    batch = rollouts(0)
    assert torch.equal(logits(loaded.model, batch), logits(run.load(2).model, batch))
    result = EntropyProbe(loaded.model, loaded.optimizer).predict(update=batch, evaluation=rollouts(1))
    assert not any("computed in" in m for m in texts(result.diagnostics.notes))


def test_a_probe_runs_and_leaves_everything_as_it_was(run):
    loaded = run.load(2)
    loaded.model.train()
    before = state(loaded.model, loaded.optimizer)
    result = EntropyProbe(loaded.model, loaded.optimizer).run(update=rollouts(0), evaluation=rollouts(1))
    assert_same(before, state(loaded.model, loaded.optimizer))
    assert result.diagnostics.per_sample_gradients == "linear-layer hooks"
    assert abs(result.difference.value) < 0.3 * abs(result.realized.value)


def test_weights_are_not_repacked_for_another_kernel(run):
    """On processors with AVX512-BF16 an evaluation without gradients would rewrite the 4-bit weights in place."""
    loaded = run.load(2)
    layers = [m for m in loaded.model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert layers
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    seen = []
    layers[0].register_forward_hook(lambda module, *_: seen.append(module.support_avx512bf16_for_cpu))
    for layer in layers[1:]:
        layer.register_forward_pre_hook(lambda module, *_: seen.append(module.support_avx512bf16_for_cpu))
    probe = EntropyProbe(loaded.model, loaded.optimizer)
    layers[0].weight.requires_grad_(False)
    before = layers[0].weight.detach().clone()
    probe.predict(update=rollouts(0), evaluation=rollouts(1))
    assert set(seen) == {False}
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
    assert torch.equal(layers[0].weight, before)


@pytest.mark.parametrize(
    ("quantization", "arguments", "message"),
    [
        (NF4, {"dtype": "float64"}, "a 4-bit base model computes in float32 or bfloat16, got torch.float64"),
        ({"load_in_8bit": True}, {}, "weights quantised by bitsandbytes without load_in_4bit"),
        ({"quant_method": "gptq", "bits": 4}, {}, "weights quantised by gptq; expected bitsandbytes"),
        (NF4 | {"bnb_4bit_quant_typ": "nf4"}, {}, r"unknown \['bnb_4bit_quant_typ'\]"),
    ],
)
def test_what_is_not_supported_is_refused(run, quantization, arguments, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(run.checkpoint(2), quantization=quantization, **arguments)


def test_another_method_in_the_base_model_is_refused_before_anything_is_loaded(run, tmp_path):
    base = shutil.copytree(run.directory / "base", tmp_path / "base")
    edit_json(base / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    assert "weights quantised by awq" in inspect_checkpoint(run.checkpoint(2), base).reasons[0]


def test_without_bitsandbytes_there_is_one_clear_error(run, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else real(n, *a))
    with pytest.raises(CheckpointError, match=r"needs bitsandbytes, which is not installed; pip install"):
        run.load(2)
    assert load_checkpoint(run.checkpoint(2)).report.verdict == "healthy"


def test_movement_and_manifest_work_as_on_plain_weights(run, tmp_path):
    """TRL keeps this adapter, and so its moments, in bfloat16; the hashes of the base model are of what is stored."""
    checkpoint = shutil.copytree(run.checkpoint(3), tmp_path / "checkpoint-3")
    assert inspect_checkpoint(checkpoint, **run.needed).movement.status == "consistent"
    record_checkpoint(checkpoint, written_by="a test", **run.needed)
    report = load_checkpoint(checkpoint, **run.needed).report
    assert (report.verdict, report.manifest) == ("healthy", "inspection")


def test_a_manifest_from_training_has_the_settings(run, tmp_path):
    """Without them the adapter would stand on plain weights, and no file but the manifest says that it did not."""
    train_grpo(tmp_path, lora=True, steps=2, quantization=TRAINED, callbacks=[ManifestCallback()])
    checkpoint, batch = tmp_path / "checkpoint-2", rollouts(0)
    recorded, given = (load_checkpoint(checkpoint, **arguments) for arguments in ({}, {"quantization": TRAINED}))
    assert recorded.report.verdict == "healthy"
    assert torch.equal(logits(recorded.model, batch), logits(given.model, batch))
    (checkpoint / MANIFEST_FILE).unlink()
    assert not torch.equal(logits(recorded.model, batch), logits(load_checkpoint(checkpoint).model, batch))


def test_an_adapter_whose_card_speaks_of_quantisation_is_not_put_on_plain_weights(run, tmp_path):
    checkpoint = shutil.copytree(run.checkpoint(2), tmp_path / "checkpoint-2")
    with (checkpoint / "README.md").open("a") as card:
        card.write("\nThe following `bitsandbytes` quantization config was used during training:\n- bits: 4\n")
    with pytest.raises(CheckpointError, match=r"says that the base model was quantised .* pass quantization="):
        load_checkpoint(checkpoint)
    assert "pass quantization=" in inspect_checkpoint(checkpoint).reasons[0]
    assert inspect_checkpoint(checkpoint, quantization=NF4).verdict == "healthy"
    assert load_checkpoint(checkpoint, quantization=NF4).report.verdict == "healthy"


def test_full_weights_in_four_bits_are_refused(run, tmp_path):
    """Quantised weights do not train."""
    checkpoint = shutil.copytree(run.directory / "base", tmp_path / "checkpoint-2")
    edit_json(checkpoint / "config.json", quantization_config=NF4 | {"quant_method": "bitsandbytes"})
    shutil.copy(run.checkpoint(2) / "optimizer.pt", checkpoint)
    with pytest.raises(CheckpointError, match="not supported: quantised weights"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attribution_adds_up_whatever_rules_the_kernels_have(run, dtype):
    loaded = load_checkpoint(run.checkpoint(2), quantization=NF4, dtype=dtype)
    found = EntropyProbe(loaded.model, loaded.optimizer, ProbeConfig(dtype=dtype)).attribute(
        update=rollouts(0), evaluation=rollouts(1)
    )
    gradient = found.result.components["gradient"].value
    tolerance = 1e-6 if dtype == "float32" else 0.06
    assert found.tokens.sum().item() == pytest.approx(gradient, abs=tolerance * found.tokens.abs().sum().item())
    assert found.summary.gradient == gradient
