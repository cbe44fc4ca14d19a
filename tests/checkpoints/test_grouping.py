"""Groups of parameters that are not the Trainer's two: each rule is proven by shapes and movement, or stated."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from entropy_probe.checkpoints import CheckpointError, MappingError, inspect_checkpoint, load_checkpoint
from entropy_probe.checkpoints.manifest import MANIFEST_FILE
from tests.checkpoints.conftest import assert_same, edit_optimizer, edit_tensors, parameter_names
from tests.cli.conftest import invoke

Names = Sequence[str]
Grouping = Callable[[Names], Sequence[Names]]


@pytest.fixture
def grouped(copy_of, runs) -> Callable[[str, Grouping], Path]:
    """A copy of a run's checkpoint, its optimizer's parameters in other groups."""

    def make(name: str, grouping: Grouping) -> Path:
        original = runs(name).load(2)
        index = {n: i for i, n in enumerate(parameter_names(original))}
        in_order = [n for n, _ in original.model.named_parameters()]
        groups = grouping(in_order)
        place = copy_of(name)

        def change(saved: dict[str, Any]) -> None:
            state, group = saved["state"], saved["param_groups"][0]
            order = [n for names in groups for n in names]
            saved["state"] = {i: state[index[n]] for i, n in enumerate(order) if n in index}
            ends = [sum(map(len, groups[: i + 1])) for i in range(len(groups))]
            spans = [list(range(end - len(names), end)) for names, end in zip(groups, ends, strict=True)]
            saved["param_groups"] = [group | {"params": span, "weight_decay": 0.0} for span in spans]

        edit_optimizer(place, change)
        return place

    return make


def trained(names: Names) -> list[str]:
    return [n for n in names if "lora_" in n or "modules_to_save" in n]


def apart(*words: str) -> Grouping:
    """A group for each word, of the trained parameters with it in their names."""
    return lambda names: [[n for n in trained(names) if word in n] for word in words]


def whole_apart(names: Names) -> Sequence[Names]:
    return [[n for n in names if "lora_" in n], [n for n in names if "modules_to_save" in n]]


def embeddings_apart(names: Names) -> Sequence[Names]:
    whole = ("model.embed_tokens.weight", "lm_head.weight")
    return [[n for n in names if n not in whole], list(whole)]


def each_layer(names: Names) -> Sequence[Names]:
    return [[n for n in trained(names) if f"layers.{i}." in n] for i in (0, 1)]


def backwards(names: Names) -> Sequence[Names]:
    return list(reversed(each_layer(names)))


def by_kind(names: Names) -> Sequence[Names]:
    """What does not decay first, and embeddings last."""
    whole, flat = ("model.embed_tokens.weight", "lm_head.weight"), [n for n in names if "norm" in n or "bias" in n]
    return [flat, [n for n in names if n not in flat and n not in whole], list(whole)]


def by_layer_and_kind(names: Names) -> Sequence[Names]:
    """What is outside layers together."""
    inside = [[n for n in names if f"layers.{i}." in n] for i in (1, 0)] + [[n for n in names if "layers" not in n]]
    flat = [[n for n in own if "norm" in n or "bias" in n] for own in inside]
    return [part for own, rest in zip(inside, flat, strict=True) for part in ([n for n in own if n not in rest], rest)]


@pytest.mark.parametrize(
    ("run", "grouping", "rule"),
    [
        ("lora", apart("lora_A", "lora_B"), "loraplus + shapes + movement"),
        ("lora", apart("lora_A", "nothing", "lora_B", "nothing"), "loraplus + shapes + movement"),
        ("modules_to_save", whole_apart, "embeddings-apart + shapes + movement"),
        ("lora", each_layer, "groups-in-order + shapes + movement"),
        ("lora", lambda names: [[n] for n in trained(names)], "groups-in-order + shapes + movement"),
        ("lora", lambda names: [trained(names)], "hf-trainer-patterns + shapes"),
        ("lora", lambda names: [names], "hf-trainer-patterns + shapes"),  # the frozen ones in the list too
        ("full", lambda names: [names], "named-parameters + shapes"),
        ("full", embeddings_apart, "embeddings-apart + shapes + movement"),
        ("full", lambda names: [[n] for n in names], "groups-in-order + shapes + movement"),
        ("lora", backwards, "groups-by-layer, backwards + shapes + movement"),
        ("full", by_kind, "groups-by-embedding-and-decay + shapes + movement"),
        ("full", by_layer_and_kind, "groups-by-layer-and-decay, backwards + shapes + movement"),
    ],
)
def test_a_rule_is_found_and_proven(runs, grouped, run, grouping, rule):
    place = grouped(run, grouping)
    state = load_checkpoint(place, runs(run).directory / "base")
    assert_same(state, runs(run).load(2))
    assert f"rule:{rule} (" in state.report.optimizer_state.mapping
    assert state.report.movement.status == "consistent"


@pytest.mark.parametrize("named", [False, True], ids=["in order", "by name"])
def test_a_list_of_all_parameters_has_the_frozen_ones(runs, grouped, named):
    """They have no entry, and are as in the model that training started from."""
    base = runs("full").directory / "base"
    start = load_file(base / "model.safetensors")
    place = grouped("full", lambda names: [names])
    names = [n for n, _ in runs("full").load(2).model.named_parameters()]
    frozen = [n for n in names if ".layers.0." in n]
    edit_tensors(place / "model.safetensors", lambda tensors: tensors.update({n: start[n] for n in frozen}))
    edit_optimizer(place, lambda saved: [saved["state"].pop(names.index(n)) for n in frozen])
    if named:
        edit_optimizer(place, lambda saved: saved["param_groups"][0].update(param_names=names))
    state = load_checkpoint(place, base)
    assert [n for n, p in state.model.named_parameters() if not p.requires_grad] == frozen
    assert len(state.optimizer.state) == len(names) - len(frozen)
    assert f"{len(frozen)} tensors without state, that are as in {base}, were frozen" in (
        state.report.optimizer_state.mapping
    )
    with pytest.raises(MappingError, match="pass base_model"):
        load_checkpoint(place)


def mixed(names: Names) -> Sequence[Names]:
    one, other = each_layer(names)
    mlps = [[n for n in layer if ".mlp." in n] for layer in (one, other)]
    first = [n for n in one if n not in mlps[0]]
    return [[*first, *mlps[1]], [n for n in other if n not in mlps[1]], mlps[0]]


MIXED = {r"layers\.1\.mlp|layers\.0\.self_attn": 0, r"layers\.1\.": 1, r"layers\.0\.": 2}


@pytest.mark.parametrize("stated", [MIXED, "file"])
def test_an_order_that_movement_contradicts_has_to_be_stated(runs, grouped, tmp_path, stated):
    place = grouped("lora", mixed)
    with pytest.raises(MappingError, match=r"the movement of the weights contradicts it.* mapping: FILE"):
        load_checkpoint(place)
    if stated == "file":
        names = trained([n for n, _ in runs("lora").load(2).model.named_parameters()])
        stated = tmp_path / "names.txt"
        stated.write_text("\n".join(n for group in mixed(names) for n in group))
    state = load_checkpoint(place, mapping=stated)
    assert_same(state, runs("lora").load(2))
    assert state.report.optimizer_state.mapping == "stated + shapes + movement (28 tensors)"


def test_without_the_starting_point_a_loops_own_groups_are_not_guessed(runs, grouped):
    place = grouped("full", lambda names: [[n] for n in names])
    with pytest.raises(MappingError, match=r"does not tell either \(pass base_model\)"):
        load_checkpoint(place)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (
            {"lora_A": 0, "lora_B": 1},
            r"contradicts|moved along the moments that it assigns|expected every entry to have",
        ),
        ({r"layers\.0\.": 0, r"layers\.1\.": 1}, "expected the weights to have moved along the moments"),
        ({r"layers\.0\.": 0}, r"expected groups of the file's sizes \[14, 14\], got \[14, 0\]"),
        ({r"layers\.0\.": 0, r"layers\.1\.": 2}, "expected groups 0 to 1 of the file"),
        ({"(": 0}, "expected regular expressions"),
        ("nowhere.txt", "expected a file with a parameter's name on each line, found none"),
    ],
)
def test_a_mapping_that_is_wrong_is_refused(grouped, stated, message):
    place = grouped("lora", backwards)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(place, mapping=stated)


def test_names_that_are_there_are_not_stated_again(runs, copy_of):
    place = copy_of("lora")
    names = parameter_names(runs("lora").load(2))
    edit_optimizer(
        place,
        lambda saved: [g.update(param_names=[names[i] for i in g["params"]]) for g in saved["param_groups"]],
    )
    with pytest.raises(MappingError, match=r"mapping: expected none, as the names are names \(28 tensors\); leave it"):
        load_checkpoint(place, mapping={"lora": 0})


def test_the_commands_take_a_mapping(grouped):
    place = grouped("lora", mixed)
    stated = json.dumps(MIXED)
    assert invoke("inspect", place).exit_code == 2
    assert invoke("inspect", place, "--mapping", stated).exit_code == 0
    assert invoke("inspect", place, "--mapping", '{"lora": "first"}').exit_code == 2
    assert invoke("manifest", place, "--mapping", stated).exit_code == 0
    assert (place / MANIFEST_FILE).is_file()
    assert inspect_checkpoint(place).optimizer_state.mapping.startswith("manifest (by inspection: stated + shapes")


def test_entries_of_frozen_parameters_are_not_dropped(copy_of, runs):
    """A list over all parameters, in which one that is frozen here has an entry: trained with another configuration."""
    place = copy_of("lora")
    count = len(list(runs("lora").load(2).model.named_parameters()))

    def change(saved: dict[str, Any]) -> None:
        saved["param_groups"] = [saved["param_groups"][0] | {"params": list(range(count))}]
        saved["state"][40] = {key: torch.ones(1) for key in ("step", "exp_avg", "exp_avg_sq")}

    edit_optimizer(place, change)
    with pytest.raises(MappingError, match="entries more than the 28 trainable parameters"):
        load_checkpoint(place)


# --- a value model beside the policy --------------------------------------------------------------------------------


def with_value_model(place: Path, *, first: bool) -> None:
    """The optimizer steps a value model too: a backbone as the policy's and a head of one row, in the same groups."""

    def change(saved: dict[str, Any]) -> None:
        value, state, at = [], {}, 0
        for group in saved["param_groups"]:
            entries = [saved["state"][i] for i in group["params"]]
            other = [{**e, "exp_avg": e["exp_avg"].flip(0), "exp_avg_sq": e["exp_avg_sq"].flip(0)} for e in entries]
            if not value:
                other[-1] = {key: x[:1] if x.dim() else x for key, x in other[-1].items()}
                value = other
            both = [*other, *entries] if first else [*entries, *other]
            group["params"] = list(range(at, at + len(both)))
            state |= dict(enumerate(both, at))
            at += len(both)
        saved["state"] = state

    edit_optimizer(place, change)


@pytest.mark.parametrize("run", ["full", "lora"])
@pytest.mark.parametrize("first", [True, False])
def test_a_value_model_beside_the_policy_is_set_aside(runs, copy_of, run, first):
    place = copy_of(run)
    with_value_model(place, first=first)
    state = load_checkpoint(place, runs(run).directory / "base")
    assert_same(state, runs(run).load(2))
    (note,) = state.report.notes
    assert (note.code, note.numbers["count"]) == ("other_model_in_optimizer", 27 if run == "full" else 28)
    assert state.report.verdict == "suspicious"
    assert state.report.num_with_step == state.report.optimizer_state.num_parameters
    assert "entries of another model are set aside" in state.report.optimizer_state.mapping


def test_a_value_model_is_not_guessed_without_the_starting_point(copy_of):
    place = copy_of("full")
    with_value_model(place, first=False)
    with pytest.raises(MappingError, match=r"27 entries more than the 27 .*pass base_model"):
        load_checkpoint(place)
