"""How trainers divide parameters into groups, which is the order of entries in a file without names.

A Hugging Face Trainer stores ``{state: {index: {step, exp_avg, …}}, param_groups}``. Indices count the trainable
parameters of the first group in ``named_parameters()`` order, then those of the next. Every known rule is replayed, and
exactly one distinct assignment must fit all group sizes and all shapes. Where several do, or the rule is a loop's own,
the direction in which the weights have moved decides. Nothing is ever filled in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import NamedTuple

from entropy_probe.checkpoints.errors import MappingError
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer
from entropy_probe.checkpoints.parameters import Layout

Names = tuple[str, ...]
Moved = Callable[[Names], str]
"""The status of the movement check for an assignment; ``inconclusive`` too where there is nothing to compare."""

IN_ORDER = "groups-in-order"
_BY = "groups-by-"
_LAYER = re.compile(r".*?\.\d+(?=\.)")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|lm_head|embed_in|embed_out|wte)\.weight$")
RECORD = (
    "record the names while training, with integrations.trl.ManifestCallback or an optimizer made from "
    "named_parameters(), or state them: mapping: FILE with a name on each line in the optimizer's order, or mapping: "
    "{'lora_A': 0, 'lora_B': 1}, for parameters that match an expression the number of their group"
)


class Rule(NamedTuple):
    """The parameters of each group in order, and which group does not decay, if one does not."""

    groups: tuple[Names, ...]
    undecayed: int | None = None

    @property
    def names(self) -> Names:
        """Those of all groups."""
        return tuple(name for group in self.groups for name in group)


def grouping_rules(layout: Layout) -> dict[str, Rule]:
    """The trainable parameters that decay and those that do not, in order, by each known rule of the Trainer.

    * ``hf-trainer-patterns``, today's: no decay in ``nn.LayerNorm`` and for names that match bias or norm.
    * ``hf-trainer-layer-types``, before: no decay in ``nn.LayerNorm`` and for names that contain bias.
    * ``hf-trainer-registered-norms``, before: the same, with the model's own norm class registered as one.
    * ``named-parameters``: one group in the model's order, as ``AdamW(model.parameters())`` makes.
    """
    patterns = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
    names = layout.parameters
    in_layer_norm = {name for name, facts in names.items() if facts.in_layer_norm}
    in_any_norm = {name for name, facts in names.items() if facts.in_norm}
    undecayed = {
        "hf-trainer-patterns": {n for n in names if n in in_layer_norm or patterns.search(n.lower())},
        "hf-trainer-layer-types": {n for n in names if n in in_layer_norm or "bias" in n},
        "hf-trainer-registered-norms": {n for n in names if n in in_any_norm or "bias" in n},
    }
    rules = {
        rule: Rule((tuple(n for n in names if n not in no_decay), tuple(n for n in names if n in no_decay)), 1)
        for rule, no_decay in undecayed.items()
    }
    return rules | {"named-parameters": Rule((tuple(names),))}


def other_rules(saved: SavedOptimizer, layout: Layout) -> dict[str, Rule]:
    """The groups of other recipes, tried where the Trainer's do not fit.

    * ``loraplus``: peft's ``create_loraplus_optimizer``: ``lora_A``, embeddings, ``lora_B``, what does not decay.
    * ``loraplus-embeddings-last``: LLaMA-Factory's, with embeddings last.
    * ``embeddings-apart``: as of Unsloth's ``embedding_learning_rate``: all, then embeddings and modules saved whole.
    * ``groups-in-order``: groups of any sizes in the model's order, as for a rate for each layer.
    """
    names, facts = list(layout.parameters), layout.parameters
    embeddings = tuple(n for n in names if "lora_embedding_" in n)
    second = [n for n in names if n not in embeddings and ("lora_B" in n or len(facts[n].shape) == 1)]
    first = tuple(n for n in names if n not in embeddings and n not in second)
    still = tuple(n for n in second if facts[n].in_layer_norm or "bias" in n)
    moving = tuple(n for n in second if n not in still)
    whole = tuple(n for n in names if ".modules_to_save." in n or _EMBEDDING.search(n))
    ends = list(accumulate(saved.sizes))
    cut = tuple(tuple(names[end - size : end]) for size, end in zip(saved.sizes, ends, strict=True))
    return {
        "loraplus": Rule((first, embeddings, moving, still), 3),
        "loraplus-embeddings-last": Rule((first, moving, still, embeddings), 2),
        "embeddings-apart": Rule((tuple(n for n in names if n not in whole), whole)),
        IN_ORDER: Rule(cut if ends[-1] == len(names) else (tuple(names),)),
    }


def kind_rules(saved: SavedOptimizer, layout: Layout) -> dict[str, Rule]:
    """Groups of one kind of parameter each, all of which fit; those of equal shapes in the model's order or backwards.

    Kinds are layers and what decays, as for a rate for each layer, with what is outside layers apart or together; and
    embeddings and what decays. Nothing but the movement of the weights tells layers of equal shapes apart.
    """
    shapes = layout.shapes
    decays = {name: len(shape) > 1 for name, shape in shapes.items()}
    layers = {name: match[0] if (match := _LAYER.match(name)) else "" for name in shapes}
    modules = {name: layer or name.rpartition(".")[0] for name, layer in layers.items()}
    embeddings = {name: bool(".modules_to_save." in name or _EMBEDDING.search(name)) for name in shapes}
    kinds = {"layer": (layers,), "layer-and-decay": (layers, decays), "module": (modules,)}
    kinds |= {"module-and-decay": (modules, decays), "decay": (decays,), "embedding-and-decay": (embeddings, decays)}
    rules = {}
    for what, keys in kinds.items():
        cells: dict[tuple[object, ...], list[str]] = {}
        for name in shapes:
            cells.setdefault(tuple(key[name] for key in keys), []).append(name)
        for order, left in (("", list(cells.values())), (", backwards", list(cells.values())[::-1])):
            groups = _in_groups(saved, left, shapes)
            if groups is not None:
                rules[f"{_BY}{what}{order}"] = Rule(groups)
    return rules


def _in_groups(
    saved: SavedOptimizer, cells: list[list[str]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Names, ...] | None:
    """For each group of the file the first of some cells, not taken yet, that has its shapes; None if one has none."""
    groups: list[Names] = []
    for group in saved.groups:
        expected = [saved.shape(index) for index in group["params"]]
        names = next(
            (
                cell
                for cell in cells
                if len(cell) == len(expected)
                and all(got in (None, shapes[name]) for got, name in zip(expected, cell, strict=True))
            ),
            None if expected else [],
        )
        if names is None:
            return None
        cells = [cell for cell in cells if cell is not names]
        groups.append(tuple(names))
    return None if cells else tuple(groups)


def match_rules(saved: SavedOptimizer, layout: Layout, moved: Moved) -> tuple[Names, str]:
    """The one assignment of entries to parameters that a rule gives, and which rule and evidence it was."""
    rules = grouping_rules(layout)
    misfits = {name: misfit(saved, rule, layout.shapes) for name, rule in rules.items()}
    fitting = _distinct(rules, misfits)
    proof = "shapes" if any(saved.state.values()) else "group sizes, nothing is kept for parameters"
    if len(saved.sizes) == 1 and fitting:
        # the Trainer's two groups merged into one, as a hand might do, must not pass for the model's order
        for name, rule in rules.items():
            if len(rule.names) == saved.num_parameters and not wrong_shape(saved, rule.names, layout.shapes):
                fitting.setdefault(rule.names, f"{name}, merged")
    if not fitting:
        others = other_rules(saved, layout) | kind_rules(saved, layout)
        misfits |= {name: misfit(saved, rule, layout.shapes) for name, rule in others.items()}
        rules, fitting = rules | others, _distinct(others, misfits)
    elif len(fitting) == 1:
        ((names, name),) = fitting.items()
        return names, f"rule:{name} + {proof} ({len(names)} tensors)"
    status = {names: moved(names) for names in fitting}
    agreeing = [names for names in fitting if status[names] == "consistent"]
    if len(agreeing) == 1:
        return agreeing[0], f"rule:{fitting[agreeing[0]]} + {proof} + movement ({saved.num_parameters} tensors)"
    if len(fitting) == 1:
        ((names, name),) = fitting.items()
        if name in others and not name.startswith((IN_ORDER, _BY)) and status[names] != "exchanged":
            return names, f"rule:{name} + {proof} ({len(names)} tensors)"
    tried = "; ".join(
        f"{name} ({' + '.join(str(len(g)) for g in rules[name].groups[:8])}): {problem or 'fits'}"
        for name, problem in misfits.items()
    )
    got = {0: "none does", 1: "one does that nothing but movement can prove"}.get(len(fitting))
    got = got or f"{len(fitting)} different ones do"
    sizes = " + ".join(map(str, saved.sizes)) if len(saved.sizes) <= 8 else f"{len(saved.sizes)} groups of"
    raise MappingError(
        f"{saved.path}: expected one assignment of its {sizes} entries to the model's parameters to fit, {got}; tried "
        f"{tried}; {_what_to_do(saved, len(layout.parameters), status)}"
    )


def _distinct(rules: Mapping[str, Rule], misfits: Mapping[str, str | None]) -> dict[Names, str]:
    """The assignments that fit, each with the first rule that gives it."""
    fitting: dict[Names, str] = {}
    for name, rule in rules.items():
        if misfits[name] is None:
            fitting.setdefault(rule.names, name)
    return fitting


def _what_to_do(saved: SavedOptimizer, trainable: int, status: Mapping[Names, str]) -> str:
    """What the numbers of entries and of parameters suggest, as a remedy."""
    if status:
        told = "contradicts it" if set(status.values()) == {"exchanged"} else "does not tell either (pass base_model)"
        return f"the movement of the weights {told}, and the names are not in the file: {RECORD}"
    if saved.num_parameters == trainable:
        return (
            "as many entries as trainable parameters, so its groups are of a rule that is not known, and their names "
            f"are not in the file: {RECORD}"
        )
    if saved.num_parameters > trainable:
        return (
            f"{saved.num_parameters - trainable} entries more than the {trainable} trainable parameters: with PPO, one "
            "optimizer over policy and value model, pass base_model, the model that training started from, since they "
            "are told apart by how the policy's weights have moved, or pass policy, the policy's name in the module "
            "that both are in (policy: policy); otherwise pass the model this state was trained with, unedited"
        )
    return (
        f"{trainable - saved.num_parameters} entries fewer than the {trainable} trainable parameters: if a part was "
        f"frozen, pass base_model, the model that training started from, or {RECORD}"
    )


def misfit(saved: SavedOptimizer, rule: Rule, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why the groups of one rule cannot be those of the file; None when they fit. Empty groups may be left out."""
    if [n for n in saved.sizes if n] != [len(group) for group in rule.groups if group]:
        return "group sizes differ"
    if rule.undecayed is not None and len(saved.groups) == len(rule.groups):
        decay = saved.groups[rule.undecayed]["weight_decay"]
        if decay != 0:
            return f"group {rule.undecayed} must not decay, has weight decay {decay}"
    return wrong_shape(saved, rule.names, shapes)


def wrong_shape(saved: SavedOptimizer, names: Names, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first entry whose moments do not have its parameter's shape."""
    for index, name in enumerate(names):
        got = saved.shape(index)
        if got is not None and got != shapes[name]:
            return f"index {index} is {list(got)}, {name} is {list(shapes[name])}"
    return None
