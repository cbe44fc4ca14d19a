"""Optimizer files that must be refused, with the reason in one line, and the mapping of those that load."""

from __future__ import annotations

import os
import shutil
import zipfile

import pytest
import torch
from torch import nn

from entropy_probe.checkpoints import CheckpointError, inspect_checkpoint, load_checkpoint
from entropy_probe.checkpoints.grouping import grouping_rules
from entropy_probe.checkpoints.mapping import map_parameters
from entropy_probe.checkpoints.optimizer_file import read_optimizer
from entropy_probe.checkpoints.parameters import layout_of
from tests.checkpoints.conftest import edit_optimizer
from tests.tiny import tiny_policy


def refused(checkpoint, message):
    """Loading raises one line, and inspecting gives the same line as the reason."""
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)
    report = inspect_checkpoint(checkpoint)
    assert (report.verdict, report.reasons) == ("unusable", (str(caught.value),))


# --- the file ---------------------------------------------------------------------------------------------------


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit(path):
    """In the data of the largest tensor, found through the archive's directory."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 200 + largest.file_size // 2] ^= 64
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"optimizer\.pt: expected the optimizer's state, found no such file"),
        (lambda path: path.write_bytes(b""), "got 0 bytes that are none"),
        (lambda path: path.write_bytes(os.urandom(5000)), "got 5000 bytes that are none"),
        (_truncate, "expected an archive written by torch.save"),
        (_flip_a_bit, "got a wrong checksum in"),
        (lambda path: torch.save([1, 2], path), "expected 'state' and 'param_groups', got list"),
        (lambda path: torch.save({"state": {}}, path), r"expected 'state' and 'param_groups', got \['state'\]"),
        (lambda path: torch.save({"state": {}, "param_groups": []}, path), "expected a list of parameter groups"),
        (lambda path: torch.save({"state": {}}, path, _use_new_zipfile_serialization=False), "another format"),
    ],
)
@pytest.mark.parametrize("name", ["lora", "full"])
def test_missing_and_damaged_files(copy_of, name, damage, message):
    checkpoint = copy_of(name)
    damage(checkpoint / "optimizer.pt")
    refused(checkpoint, message)


class _MakesDirectory:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("forced", [True, False])
def test_a_malicious_pickle_is_refused_and_runs_nothing(copy_of, tmp_path, monkeypatch, forced, new_format):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    checkpoint = copy_of("lora")
    payload = {"state": {0: _MakesDirectory(tmp_path / "ran")}, "param_groups": []}
    torch.save(payload, checkpoint / "optimizer.pt", _use_new_zipfile_serialization=new_format)
    refused(checkpoint, "nothing in it was run" if new_format else "another format")
    assert not (tmp_path / "ran").exists()
    torch.load(checkpoint / "optimizer.pt", weights_only=False)  # the payload does work when it is let
    assert (tmp_path / "ran").exists()


# --- other optimizers and settings --------------------------------------------------------------------------------


def _set_state(saved, **entries):
    for entry in saved["state"].values():
        entry.clear()
        entry.update(entries)


def _adafactor(saved):
    for entry in saved["state"].values():
        entry["exp_avg_sq_row"] = entry.pop("exp_avg_sq")[0].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_adafactor, r"parameter 0: expected AdamW's \['exp_avg', 'exp_avg_sq', 'step'\], got .*'exp_avg_sq_row'"),
        (lambda s: _set_state(s, state1=torch.zeros(2), qmap1=torch.zeros(2)), "bitsandbytes that keeps no second"),
        (lambda s: _set_state(s, momentum_buffer=torch.zeros(2)), r"expected AdamW's .*, got \['momentum_buffer'\]"),
        (
            lambda s: s["param_groups"][0].update(ns_steps=5),
            r"group 0: not supp.* AdamW is nearest.*\['ns_steps",
        ),
        (lambda s: s["param_groups"][1].update(dampening=0), r"group 1: not supported: .*unknown \['dampening'\]"),
        (lambda s: s["param_groups"][0].update(novel=1), r"missing \[\], unknown \['novel'\]"),
        (lambda s: s["param_groups"][0].pop("amsgrad"), r"nearest; missing \['amsgrad'\], unknown \[\]"),
        (lambda s: s["param_groups"][0].update(maximize=True), "not supported: maximize=True"),
        (lambda s: s["param_groups"][0].update(lr=float("nan")), "lr: expected a finite number, got nan"),
        (lambda s: s["param_groups"][0].update(lr=-1e-3), "lr: expected at least 0, got -0.001"),
        (lambda s: s["param_groups"][0].update(betas=(0.9, 1.0)), r"expected betas in \[0, 1\)"),
        (
            lambda s: s["param_groups"][0].update(decoupled_weight_decay=torch.ones(2)),
            "decoupled_weight_decay: expected true, false or nothing",
        ),
        (lambda s: s["param_groups"][0].update(betas=0.9), "betas: expected two numbers, got 0.9"),
        (lambda s: s["param_groups"][0].update(fused="yes"), "fused: expected true, false or nothing, got 'yes'"),
        (lambda s: s["param_groups"][0].update(decoupled_weight_decay=False), "groups that mix Adam and AdamW"),
    ],
)
def test_other_optimizers_and_settings_are_refused(copy_of, change, message):
    checkpoint = copy_of("full")
    edit_optimizer(checkpoint, change)
    refused(checkpoint, message)


def _bitsandbytes(name):
    module = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: qlora)")
    return lambda p: getattr(module.optim, name)(p)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: torch.optim.ASGD(p), "looks like ASGD .* only Adam, AdamW, .* load from files"),
        (lambda p: torch.optim.Rprop(p), "looks like Rprop .* only Adam, AdamW, .* load from files"),
        (lambda p: _bitsandbytes("Lion")(p), "an optimizer of bitsandbytes that keeps no second moment"),
    ],
)
def test_files_of_other_optimizers_are_refused_by_name(tmp_path, build, message):
    parameter = nn.Parameter(torch.ones(64, 80))
    optimizer = build([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=message):
        read_optimizer(tmp_path / "optimizer.pt")


# --- entries ----------------------------------------------------------------------------------------------------


def _swap_group_order(saved):
    saved["param_groups"].reverse()


def _renumber_swapped_groups(saved):
    """Swapped groups with indices and state renumbered, as if the no-decay group had come first."""
    order = [i for group in reversed(saved["param_groups"]) for i in group["params"]]
    _swap_group_order(saved)
    saved["state"] = {new: saved["state"][old] for new, old in enumerate(order)}
    for group, start in zip(saved["param_groups"], (0, 11), strict=True):
        group["params"] = list(range(start, start + len(group["params"])))


def _merge_groups(saved):
    first, second = saved["param_groups"]
    first["params"] += second["params"]
    saved["param_groups"] = [first]


def _shape(saved, index=3):
    for key in ("exp_avg", "exp_avg_sq"):
        saved["state"][index][key] = saved["state"][index][key][:-1].clone()


def _one_moment(saved):
    saved["state"][3]["exp_avg_sq"] = saved["state"][3]["exp_avg_sq"].T.contiguous()[:-1]


def _drop_last(saved):
    del saved["state"][26]


def _drop_parameter(saved):
    """A whole parameter less, with indices still without a gap."""
    del saved["state"][26]
    saved["param_groups"][1]["params"].pop()


def _fill(key, value):
    def change(saved):
        saved["state"][5][key].view(-1)[0] = value

    return change


def _huge_without_storage(saved):
    for key in ("exp_avg", "exp_avg_sq"):
        saved["state"][2][key] = torch.zeros(1).expand(10**9)


def _shared_storage(saved):
    """All entries of a shape share one tensor, which torch saves once."""
    first = {}
    for entry in saved["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            entry[key] = first.setdefault(entry[key].shape, entry[key])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap_group_order, "expected the groups to number parameters 0, 1, 2"),
        (
            _renumber_swapped_groups,
            r"11 \+ 16 entries .* one does that nothing but movement can prove; .*pass base_model",
        ),
        (_merge_groups, r"its 27 entries .* none does; tried hf-trainer-patterns \(16 \+ 11\): group sizes differ"),
        (_drop_last, r"got none for 1 \(index \[26\]\).*a fresh state is never substituted"),
        (_drop_parameter, r"16 \+ 10 entries .* none does"),
        (lambda s: s["state"].clear(), "got none for 27"),
        (lambda s: s["state"].update({27: s["state"][0]}), r"1 entries that belong to no parameter \(\[27\]\)"),
        (_shape, r"index 3 is \[31, 64\], model\.layers\.0\.self_attn\.v_proj\.weight is \[32, 64\]"),
        (_one_moment, r"parameter 3: exp_avg_sq: expected the shape \[32, 64\]"),
        (_huge_without_storage, "parameter 2: exp_avg: expected data for each of 1,000,000,000 elements"),
        (_shared_storage, r"expected moments of at most the file's .* tensors that share their data"),
        (_fill("exp_avg", float("nan")), r"parameter 5 \(model\..*\): exp_avg: expected finite values"),
        (_fill("exp_avg", float("-inf")), "exp_avg: expected finite values"),
        (_fill("exp_avg_sq", float("inf")), "exp_avg_sq: expected finite values"),
        (_fill("exp_avg_sq", -1e-9), "exp_avg_sq: expected values of at least 0, got -1e-09"),
        (lambda s: s["state"][0].pop("step"), r"expected AdamW's \['exp_avg', 'exp_avg_sq', 'step'\], got"),
        (lambda s: s["state"][0].update(step=torch.tensor(0.0)), "expected a whole number of steps, at least 1, got 0"),
        (lambda s: s["state"][0].update(step=torch.tensor(1.5)), "expected a whole number of steps"),
        (lambda s: s["state"][0].update(step=torch.tensor(float("nan"))), "step: expected a finite number, got nan"),
        (lambda s: s["state"][0].update(step="two"), "step: expected a finite number, got 'two'"),
        (lambda s: s["state"][0].update(exp_avg=1.0), "exp_avg: expected a dense floating-point tensor, got float"),
        (
            lambda s: s["state"][0].update(exp_avg=s["state"][0]["exp_avg"].to(torch.int32)),
            r"expected a dense floating-point tensor, got torch\.int32",
        ),
        (lambda s: s["param_groups"][1].update(weight_decay=0.1), "group 1 must not decay, has weight decay 0.1"),
    ],
)
def test_entries_that_do_not_fit_are_refused(copy_of, change, message):
    checkpoint = copy_of("full")
    edit_optimizer(checkpoint, change)
    refused(checkpoint, message)


@pytest.mark.parametrize(("name", "other"), [("full", "tied"), ("tied", "full"), ("lora", "full"), ("full", "lora")])
def test_the_state_of_another_model_is_refused(copy_of, runs, name, other):
    checkpoint = copy_of(name)
    shutil.copy(runs(other).checkpoint(2) / "optimizer.pt", checkpoint)
    refused(checkpoint, "none does; tried")


# --- the mapping ------------------------------------------------------------------------------------------------


def test_one_group_is_accepted_where_order_leaves_no_choice(copy_of):
    checkpoint = copy_of("lora")
    expected = load_checkpoint(checkpoint)
    edit_optimizer(checkpoint, _merge_groups)
    got = load_checkpoint(checkpoint)
    assert got.report.optimizer_state == expected.report.optimizer_state.model_copy(update={"learning_rates": (1e-3,)})


def test_the_rule_differs_from_naive_orders_at_parameters_of_equal_shape(runs):
    """Taking the merged groups in ``named_parameters()`` order raises nothing in torch, and is wrong."""
    state = load_checkpoint(runs("full").checkpoint(2))
    shapes = {n: tuple(p.shape) for n, p in state.model.named_parameters()}
    ours = map_parameters(read_optimizer(runs("full").checkpoint(2) / "optimizer.pt"), layout_of(state.model)).names
    wrong = [(a, b) for a, b in zip(ours, shapes, strict=True) if a != b]
    assert len(wrong) == 25
    assert len([1 for a, b in wrong if shapes[a] == shapes[b]]) == 4
    by_name = dict(state.model.named_parameters())
    saved = torch.load(runs("full").checkpoint(2) / "optimizer.pt", weights_only=True)["state"]
    for index, name in enumerate(ours):
        assert torch.equal(state.optimizer.state[by_name[name]]["exp_avg"], saved[index]["exp_avg"])


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("rule", ["hf-trainer-patterns", "hf-trainer-layer-types", "hf-trainer-registered-norms"])
def test_files_of_every_version_of_the_rule_load(tmp_path, architecture, rule):
    model, _ = tiny_policy(architecture)
    decay, no_decay = grouping_rules(layout_of(model))[rule].groups
    assert len(decay) + len(no_decay) == len(list(model.parameters()))
    assert ("model.norm.weight" in no_decay) == (rule != "hf-trainer-layer-types")
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[n] for n in decay], "weight_decay": 0.1},
            {"params": [named[n] for n in no_decay], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 0.1 * (i + 1))
    optimizer.step()
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    state = load_checkpoint(tmp_path)
    for name, parameter in state.model.named_parameters():
        assert torch.equal(state.optimizer.state[parameter]["exp_avg"], optimizer.state[named[name]]["exp_avg"])


def test_plain_adam_stays_adam(copy_of):
    checkpoint = copy_of("full")
    edit_optimizer(checkpoint, lambda s: [g.update(decoupled_weight_decay=False) for g in s["param_groups"]])
    state = load_checkpoint(checkpoint)
    assert type(state.optimizer) is torch.optim.Adam
    assert state.report.optimizer == "Adam"
    assert not any(g["decoupled_weight_decay"] for g in state.optimizer.param_groups)


def test_amsgrad_keeps_its_maximum(copy_of):
    def amsgrad(saved):
        for group in saved["param_groups"]:
            group["amsgrad"] = True
        for entry in saved["state"].values():
            entry["max_exp_avg_sq"] = 4 * entry["exp_avg_sq"]

    checkpoint = copy_of("tied")
    before = inspect_checkpoint(checkpoint).optimizer_state
    edit_optimizer(checkpoint, amsgrad)
    state = load_checkpoint(checkpoint)
    for entry in state.optimizer.state.values():
        assert torch.equal(entry["max_exp_avg_sq"], 4 * entry["exp_avg_sq"])
    assert state.report.optimizer_state.scale_min == pytest.approx(before.scale_min / 2, rel=1e-4)


class MyRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Plain(MyRMSNorm):
    pass


class Ambiguous(nn.Module):
    """One rule keeps the first parameter from decay, another the second, and both have one shape."""

    def __init__(self):
        super().__init__()
        self.first = MyRMSNorm()
        self.second_norm = Plain()


def test_two_assignments_that_both_fit_are_refused(tmp_path):
    model = Ambiguous()
    first, second = model.parameters()
    optimizer = torch.optim.AdamW([{"params": [first]}, {"params": [second], "weight_decay": 0.0}])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = read_optimizer(tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"2 different ones do; tried hf-trainer-patterns .*fits.*layer-types"):
        map_parameters(saved, layout_of(model))


def test_todays_rule_goes_by_layer_type_and_lower_cased_names():
    model = nn.ModuleDict({"LayerNorm": Plain(), "proj": nn.Linear(2, 2), "normal": Plain(), "ln": nn.LayerNorm(4)})
    decay, no_decay = grouping_rules(layout_of(model))["hf-trainer-patterns"].groups
    assert decay == ("proj.weight", "normal.weight")
    assert no_decay == ("LayerNorm.weight", "proj.bias", "ln.weight", "ln.bias")
