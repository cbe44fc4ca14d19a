from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from entropy_probe.checkpoints import CheckpointError, CheckpointReport, inspect_checkpoint, load_checkpoint
from entropy_probe.checkpoints.libraries import random_state_kept
from entropy_probe.checkpoints.weights import check_loaded, read_weights
from entropy_probe.demo.policy import build_tokenizer
from tests.checkpoints.conftest import NO_OTHER_DOUBTS, UNDECIDED, edit_json, edit_tensors

TEXT = "12+34=46 Hello, World!\n  a"


@pytest.mark.parametrize(("name", "trainable"), [("lora", 28), ("full", 27), ("tied", 26)])
def test_trained_parameters_and_nothing_else_require_a_gradient(runs, name, trainable):
    state = load_checkpoint(runs(name).checkpoint(2))
    named = {n: p for n, p in state.model.named_parameters() if p.requires_grad}
    assert len(named) == trainable
    assert all(("lora_" in n) == (name == "lora") for n in named)
    held = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in named.values()}
    assert not any(module.training for module in state.model.modules())
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["lora", "full", "tied"])
def test_weights_are_those_of_the_files(runs, name):
    checkpoint = runs(name).checkpoint(2)
    parameters = dict(load_checkpoint(checkpoint).model.named_parameters())
    if name == "lora":
        base = load_file(runs(name).directory / "base" / "model.safetensors")
        adapter = load_file(checkpoint / "adapter_model.safetensors")
        expected = {n.replace("weight", "default.weight"): x for n, x in adapter.items()}
        assert len(parameters) == len(base) + len(adapter)
        for n, p in parameters.items():
            original = n.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(p, expected[n] if "lora_" in n else base[original])
    else:
        expected = load_file(checkpoint / "model.safetensors")
        assert all(torch.equal(p, expected[n]) for n, p in parameters.items())


def test_every_group_keeps_its_own_hyperparameters_and_kernel_flags(runs):
    optimizer = load_checkpoint(runs("fused").checkpoint(2)).optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert [(len(g["params"]), g["weight_decay"], g["fused"]) for g in optimizer.param_groups] == [
        (16, 0.1, True),
        (11, 0.0, True),
    ]


@pytest.mark.parametrize(("dtype", "moments"), [("float64", torch.float64), ("bfloat16", torch.float32)])
@pytest.mark.parametrize("name", ["lora", "full"])
def test_moments_are_never_rounded_to_the_model_precision(runs, name, dtype, moments):
    run = runs(name)
    exact, state = load_checkpoint(run.checkpoint(2)), load_checkpoint(run.checkpoint(2), dtype=dtype)
    parameters = dict(state.model.named_parameters())
    for n, p in exact.model.named_parameters():
        if p.requires_grad:
            for key in ("exp_avg", "exp_avg_sq"):
                got = state.optimizer.state[parameters[n]][key]
                assert got.dtype == moments
                assert torch.equal(got.float(), exact.optimizer.state[p][key])


@pytest.mark.parametrize("name", ["lora", "full"])
def test_loading_and_inspecting_leave_the_random_states_alone(runs, name):
    checkpoint = runs(name).checkpoint(2)
    before = list(np.random.get_state()[1]), torch.get_rng_state().tolist()  # noqa: NPY002
    load_checkpoint(checkpoint)
    inspect_checkpoint(checkpoint)
    after = list(np.random.get_state()[1]), torch.get_rng_state().tolist()  # noqa: NPY002
    assert before == after


def test_random_states_are_restored_also_after_an_error():
    """On the guard itself: the run-time type checker of the tests draws from Python's generator around a call."""

    def draw_and_fail():
        with random_state_kept():
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
            raise KeyError

    before = random.getstate(), list(np.random.get_state()[1]), torch.get_rng_state().tolist()  # noqa: NPY002
    with pytest.raises(KeyError):
        draw_and_fail()
    after = random.getstate(), list(np.random.get_state()[1]), torch.get_rng_state().tolist()  # noqa: NPY002
    assert before == after


@pytest.mark.parametrize("name", ["lora", "full", "tied"])
def test_the_report_is_the_one_of_inspect_and_survives_json(runs, name):
    report = load_checkpoint(runs(name).checkpoint(2)).report
    assert report == inspect_checkpoint(runs(name).checkpoint(2))
    assert CheckpointReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize("name", ["lora", "full"])
def test_the_tokenizer_splits_text_as_the_one_that_was_saved(runs, name):
    tokenizer = load_checkpoint(runs(name).checkpoint(2)).tokenizer
    assert tokenizer is not None
    assert tokenizer(TEXT)["input_ids"] == build_tokenizer()(TEXT)["input_ids"]
    assert tokenizer.padding_side == "left"


def test_the_tokenizer_of_the_base_model_stands_in(copy_of, runs):
    checkpoint = copy_of("lora")
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    tokenizer = load_checkpoint(checkpoint).tokenizer
    assert tokenizer is not None
    assert tokenizer(TEXT)["input_ids"] == build_tokenizer()(TEXT)["input_ids"]


def test_without_any_tokenizer_there_is_none(copy_of):
    checkpoint = copy_of("full")
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    assert load_checkpoint(checkpoint).tokenizer is None


@pytest.mark.parametrize("given", ["base", "run/base"])
def test_the_base_model_is_found_relative_to_the_checkpoint(copy_of, runs, tmp_path, monkeypatch, given):
    checkpoint = tmp_path / "run" / "checkpoint-2"
    shutil.copytree(runs("lora").checkpoint(2), checkpoint)
    shutil.copytree(runs("lora").directory / "base", tmp_path / "run" / "base")
    edit_json(checkpoint / "adapter_config.json", base_model_name_or_path=given)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    report = inspect_checkpoint(checkpoint)
    assert (report.verdict, report.reasons) == NO_OTHER_DOUBTS
    assert (checkpoint / report.base_model).resolve() == tmp_path / "run" / "base"


def test_sharded_weights(copy_of, runs):
    checkpoint = copy_of("full")
    whole = load_checkpoint(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    whole.model.save_pretrained(checkpoint, max_shard_size="100KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    again = load_checkpoint(checkpoint)
    assert (again.report.verdict, again.report.reasons) == NO_OTHER_DOUBTS
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    sorted(checkpoint.glob("model-*.safetensors"))[0].unlink()
    with pytest.raises(CheckpointError, match=r"model-00001.*expected the shard that model\.safetensors\.index"):
        load_checkpoint(checkpoint)


# --- weights that must not load -------------------------------------------------------------------------------


def _rename_one(tensors):
    name = next(n for n in sorted(tensors) if "layers.0" in n)
    tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)


def _drop_half(tensors):
    for name in sorted(tensors)[::2]:
        del tensors[name]


def _nan(tensors):
    tensors[sorted(tensors)[-1]].view(-1)[3] = float("nan")


def _eight_bits(tensors):
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def _complex(tensors):
    try:
        save({"x": torch.zeros(1, dtype=torch.complex64)})
    except KeyError:
        pytest.skip("this safetensors cannot write complex numbers")
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name].to(torch.complex64)


def _extra(tensors):
    tensors["stranger.weight"] = torch.ones(2)


def _transpose(tensors):
    name = next(n for n in sorted(tensors) if "q_proj.lora_A" in n)
    tensors[name] = tensors[name].T.contiguous()


def _json(**fields):
    return lambda checkpoint: edit_json(checkpoint / "tokenizer.json", **fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        # transformers 4 tries another kind of tokenizer, and reports what that one lacks
        (_json(padding=1), "tokenizer: could not be loaded: (invalid type: integer `1`|requires the protobuf library)"),
        (lambda c: edit_json(c / "adapter_config.json", target_modules="[x"), "could not be loaded: unterminated"),
    ],
    ids=["tokenizers", "an expression"],
)
def test_what_the_libraries_raise_is_one_line(copy_of, make, message):
    checkpoint = copy_of("lora")
    make(checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_configuration_of_other_types_is_one_line(copy_of):
    checkpoint = copy_of("full")
    edit_json(checkpoint / "config.json", tie_word_embeddings="5.23.0")
    # transformers 4 takes any text for true
    _refused(checkpoint, r"Validation error for field 'tie_word_embeddings'|16 \+ 11 entries .* to fit, none does")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lora", _rename_one, r"expected 28 tensors, 1 missing \[.*layers\.0.*1 unknown \[.*layers\.7"),
        ("lora", _drop_half, "expected 28 tensors, 14 missing"),
        ("lora", _nan, "expected finite values, got NaN"),
        ("lora", _eight_bits, r"weights in torch\.float8_e4m3fn; save them in float32"),
        ("full", _complex, r"weights in torch\.complex64; save them in float32"),
        ("lora", _extra, r"0 missing \[\], 1 unknown \['stranger"),
        ("lora", _transpose, r"lora_A.*: expected shape \[4, 64\], got \[64, 4\]"),
        ("full", _rename_one, r"expected weights for exactly the model .* 1 missing keys \['model\.layers\.0"),
        ("full", _drop_half, "14 missing keys"),
        ("full", _nan, "expected finite values, got NaN"),
        ("full", _extra, "1 unexpected keys"),
    ],
)
def test_damaged_weights_are_refused(copy_of, name, change, message):
    checkpoint = copy_of(name)
    file = checkpoint / ("adapter_model.safetensors" if name == "lora" else "model.safetensors")
    edit_tensors(file, change)
    _refused(checkpoint, message)


def _refused(checkpoint, message, base=None):
    """Loading raises one line, and inspecting gives the same line as the reason."""
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(checkpoint, base)
    assert "\n" not in str(caught.value)
    report = inspect_checkpoint(checkpoint, base)
    assert (report.verdict, report.reasons) == ("unusable", (str(caught.value),))
    assert report.groups  # what could be read is still reported


def test_cut_weights_are_refused(copy_of):
    checkpoint = copy_of("lora")
    file = checkpoint / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    _refused(checkpoint, "expected safetensors, got")


def test_pickled_weights_are_not_read(copy_of):
    checkpoint = copy_of("lora")
    (checkpoint / "adapter_model.safetensors").rename(checkpoint / "adapter_model.bin")
    _refused(checkpoint, r"weights saved as pickles \(\.bin\) are not read")


def test_tied_weights_that_differ_in_the_file_are_refused(copy_of):
    checkpoint = copy_of("tied")
    edit_tensors(
        checkpoint / "model.safetensors",
        lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"] + 1}),
    )
    unties = r"15 \+ 11 entries .* to fit, none does; tried hf-trainer-patterns \(16 \+ 11\)"
    ties = r"lm_head\.weight: expected the model to hold these values"  # transformers 4, noticed once loaded
    with pytest.raises(CheckpointError, match=f"{unties}|{ties}") as caught:
        load_checkpoint(checkpoint)
    if "none does" in str(caught.value):
        _refused(checkpoint, unties)


def test_the_wrong_tie_flag_is_refused_or_has_no_effect(copy_of):
    checkpoint = copy_of("tied")
    edit_json(checkpoint / "config.json", tie_word_embeddings=False)
    _refused(checkpoint, r"1 missing keys \['lm_head\.weight'\]")
    checkpoint = copy_of("full")
    edit_json(checkpoint / "config.json", tie_word_embeddings=True)
    tensors = load_file(checkpoint / "model.safetensors")
    try:
        model = load_checkpoint(checkpoint).model
    except CheckpointError:  # transformers 4 ties them
        _refused(checkpoint, r"16 \+ 11 entries .* to fit, none does; tried hf-trainer-patterns \(15 \+ 11\)")
        return
    assert torch.equal(model.get_output_embeddings().weight, tensors["lm_head.weight"])
    assert torch.equal(model.get_input_embeddings().weight, tensors["model.embed_tokens.weight"])


def test_a_base_model_of_another_size_is_refused(copy_of, runs, tmp_path):
    base = shutil.copytree(runs("lora").directory / "base", tmp_path / "base")
    edit_json(base / "config.json", hidden_size=32, head_dim=8)
    checkpoint = copy_of("lora")
    _refused(checkpoint, r"expected weights for exactly the model .* mismatched keys", base)
    (base / "model.safetensors").unlink()
    _refused(checkpoint, r"lora_A.*expected shape \[4, 32\], got \[4, 64\]", base)


def test_a_base_model_without_a_tensor_is_refused(copy_of, runs, tmp_path):
    base = shutil.copytree(runs("lora").directory / "base", tmp_path / "base")
    edit_tensors(base / "model.safetensors", lambda x: x.pop("lm_head.weight"))
    _refused(copy_of("lora"), r"1 missing keys \['lm_head\.weight'\]", base)


def test_a_base_model_that_is_not_finite_is_refused(copy_of, runs, tmp_path):
    base = shutil.copytree(runs("lora").directory / "base", tmp_path / "base")
    edit_tensors(base / "model.safetensors", _nan)
    with pytest.raises(CheckpointError, match="expected finite values"):
        load_checkpoint(copy_of("lora"), base)


def test_an_adapter_as_base_model_is_refused(copy_of, runs):
    with pytest.raises(CheckpointError, match="expected a base model, got an adapter"):
        load_checkpoint(copy_of("lora"), runs("lora").checkpoint(1))


def test_a_missing_base_model_is_refused(copy_of, tmp_path):
    checkpoint = copy_of("lora")
    edit_json(checkpoint / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    _refused(checkpoint, "gone: expected the base model's directory, found no config.json")
    edit_json(checkpoint / "adapter_config.json", base_model_name_or_path=None)
    _refused(checkpoint, "base_model_name_or_path: expected a name, got None; pass base_model")


def test_another_adapter_type_is_refused(copy_of):
    checkpoint = copy_of("lora")
    edit_json(checkpoint / "adapter_config.json", peft_type="IA3")
    _refused(checkpoint, "expected 'LORA', got 'IA3'")


def test_code_in_a_checkpoint_is_not_run(copy_of):
    checkpoint = copy_of("full")
    (checkpoint / "evil.py").write_text("raise SystemExit('ran')\n")
    edit_json(
        checkpoint / "config.json",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        model_type="evil",
    )
    with pytest.raises(CheckpointError, match="remote code is never run"):
        load_checkpoint(checkpoint)


def test_an_unknown_precision_is_refused(runs):
    with pytest.raises(CheckpointError, match="dtype: expected one of float32, bfloat16, float64, got 'int8'"):
        load_checkpoint(runs("lora").checkpoint(2), dtype="int8")


def test_what_is_no_checkpoint_raises(runs, tmp_path):
    for function in (load_checkpoint, inspect_checkpoint):
        with pytest.raises(CheckpointError, match="nowhere: expected a checkpoint directory"):
            function(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match="pass a checkpoint-N of the Trainer"):
            function(tmp_path)
        with pytest.raises(CheckpointError, match="pass one of checkpoint-2, checkpoint-3, checkpoint-4 inside it"):
            function(runs("lora").directory)


def test_a_model_that_does_not_hold_the_values_of_the_files_is_noticed(runs):
    checkpoint = runs("full").checkpoint(2)
    files = read_weights(checkpoint, "model")
    tensors = load_file(checkpoint / "model.safetensors")
    check_loaded(files, tensors, all_names=True)
    name = "model.layers.1.self_attn.o_proj.weight"
    with pytest.raises(CheckpointError, match=r"o_proj\.weight: expected the model to hold these values"):
        check_loaded(files, tensors | {name: tensors[name] * (1 + 1e-6)}, all_names=True)
    del tensors[name]
    check_loaded(files, tensors, all_names=False)
    with pytest.raises(CheckpointError, match=r"o_proj\.weight: expected the model to use it"):
        check_loaded(files, tensors, all_names=True)


# --- verdicts ---------------------------------------------------------------------------------------------------


def test_inspect_needs_no_base_weights(copy_of, runs, tmp_path):
    base = shutil.copytree(runs("lora").directory / "base", tmp_path / "base")
    (base / "model.safetensors").unlink()
    checkpoint = copy_of("lora")
    report = inspect_checkpoint(checkpoint, base)
    assert (report.verdict, report.reasons) == NO_OTHER_DOUBTS
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_checkpoint(checkpoint, base)


def test_a_healthy_report_in_full(runs):
    report = inspect_checkpoint(runs("tied").checkpoint(2))
    assert (report.kind, report.base_model, report.global_step) == ("full", None, 2)
    assert (report.optimizer, report.verdict, report.reasons) == ("AdamW", *NO_OTHER_DOUBTS)
    assert [(g.num_parameters, g.weight_decay, g.learning_rate) for g in report.groups] == [
        (15, 0.1, 1e-3),
        (11, 0.0, 1e-3),
    ]
    assert report.groups[0].flags["fused"] is None
    assert (report.num_with_exp_avg_sq, report.num_with_step) == (26, 26)
    state = report.optimizer_state
    assert state is not None
    assert (state.num_parameters, state.coverage, state.steps) == (26, 1.0, (2, 2))
    assert state.mapping == "rule:hf-trainer-patterns + shapes (26 tensors)"
    v = torch.cat([e["exp_avg_sq"].reshape(-1) for e in _saved(runs("tied").checkpoint(2))["state"].values()])
    scale = 1 / ((v.double() / (1 - 0.999**2)).sqrt() + 1e-8)
    assert state.scale_min == pytest.approx(scale.min().item(), rel=1e-12)
    assert state.scale_max == pytest.approx(scale.max().item(), rel=1e-12)
    assert state.num_elements == v.numel()
    assert report.num_zero_elements == int((v == 0).sum())


def _saved(checkpoint):
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)


def test_a_finished_schedule_loads_and_is_reported(runs):
    state = load_checkpoint(runs("full").checkpoint(4))
    assert state.report.verdict == "suspicious"
    assert any("learning rate is 0" in reason for reason in state.report.reasons)


def test_lora_a_has_no_second_moment_after_the_first_step(runs):
    report = inspect_checkpoint(runs("lora").checkpoint(1))
    assert report.optimizer_state is not None
    assert 0 < report.optimizer_state.coverage < 1
    assert report.verdict == "suspicious"
    assert "exp_avg_sq is all zero" in report.reasons[0]
    assert report.reasons[1:] == UNDECIDED


def test_files_of_two_saves_and_an_incomplete_save_are_suspicious(copy_of, runs):
    checkpoint = copy_of("lora")
    shutil.copy(runs("lora").checkpoint(3) / "optimizer.pt", checkpoint)
    assert inspect_checkpoint(checkpoint).reasons == (
        "optimizer.pt is at step 3, trainer_state.json at 2; files of two saves?",
        *UNDECIDED,
    )
    (checkpoint / "trainer_state.json").unlink()
    assert inspect_checkpoint(checkpoint).reasons == (
        "trainer_state.json, written last, is missing; the save may be incomplete",
        *UNDECIDED,
    )
    (checkpoint / "trainer_state.json").write_text('{"global_step": "2"')
    with pytest.raises(CheckpointError, match=r"trainer_state\.json: expected JSON"):
        load_checkpoint(checkpoint)
