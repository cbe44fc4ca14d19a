"""One of several ranks that hold a policy in shards, under a launcher's environment.

Each of the cases is probed in shards, and what came of it, bitwise traces included, is written to ``OUT/RANK.json``.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.integrations.live import probe_actor
from tests.invariants.hf_problems import policy, rollouts

RATES = (1e-4, 1e-3)


def probe(case: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """What the case asks for, of a whole or a sharded model."""
    subject = EntropyProbe(model, optimizer, ProbeConfig(**{"learning_rate": 1e-3} | case["config"]))
    update, evaluation = rollouts(9, group=3), rollouts(8, seed=2, group=1)
    if case["what"] == "run":
        return subject.run(update=update, evaluation=evaluation).model_dump(mode="json")
    if case["what"] == "gradient":
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        given = {"gradient": {name: torch.ones_like(p) for name, p in trained.items()}, "evaluation": evaluation}
        if case.get("gathered_gradient"):
            given["gradient"] = {name: torch.ones(p.shape) for name, p in trained.items()}
        return subject.run(update=update, **given).model_dump(mode="json")
    if case["what"] == "ahead":
        return ahead(case, model, optimizer, update, None if case["own"] else evaluation)
    if case["what"] == "one_batch":
        return subject.one_batch(update).model_dump(mode="json")
    if case["what"] == "sweep":
        found = subject.sweep(
            update=update, evaluation=evaluation, learning_rates=RATES, direct_curvature=True
        ).model_dump(mode="json")
        return {key: value for key, value in found.items() if key != "notes"}
    if case["what"] == "question":
        ids = update.prompt_ids.unique().tolist()
        asked = {"prompts": [ids[:1], ids[1:]]}
        answer = subject.ask("without_prompts", update=update, evaluation=evaluation, **asked)
        return answer.model_dump(mode="json")
    return subject.attribute(update=update, evaluation=evaluation)


def ahead(
    case: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, batch: Rollouts, evaluation: Any
) -> Any:
    """A live step with ones in ``.grad``, predicted, taken and measured; then undone."""
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    config = ProbeConfig(**case["config"])
    step = probe_actor(model, optimizer, batch if evaluation is None else None, config, evaluation=evaluation)
    states = [x for state in optimizer.state.values() for x in state.values()]
    kept = [(x, x.detach().clone()) for x in (*model.parameters(), *states)]
    optimizer.step()
    result = step.taken()
    with torch.no_grad():
        for x, before in kept:
            x.copy_(before)
    return result.model_dump(mode="json")


def subject_of(case: dict[str, Any]) -> tuple[nn.Module, torch.optim.AdamW]:
    """The policy in float64 (unless the case says float32) and an optimizer with a history, whole."""
    model, optimizer = policy(case["kind"], **case.get("model", {}))
    if case["config"].get("dtype") == "float64":
        model.double()
        for state in optimizer.state.values():
            state.update({key: x.double() for key, x in state.items() if key != "step"})
    if case.get("kept"):  # as a checkpoint is loaded whose weights and moments are in bfloat16
        for p in model.parameters():
            p.data = p.data.bfloat16().to(p.dtype)
        for state in optimizer.state.values():
            state.update({key: x.bfloat16() for key, x in state.items() if key != "step"})
    return model, optimizer


def sharded(model: nn.Module, optimizer: torch.optim.Optimizer, case: dict[str, Any]) -> Any:
    """The same with ``fully_shard``, and every tensor of the optimizer's in shards like its parameter."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor

    lowered = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if case.get("mixed") else {}
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [{**g, "params": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
    state = {names[id(p)]: dict(s) for p, s in optimizer.state.items()}
    for layer in model.get_decoder().layers:
        fully_shard(layer, **lowered)
    fully_shard(model, reshard_after_forward=case.get("reshard"), **lowered)
    if "gradients_times" in case:  # as a divide factor of the trainer's own would do
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(case["gradients_times"]))
    new = dict(model.named_parameters())
    kind = torch.optim.SGD if case.get("optimizer") == "SGD" else torch.optim.AdamW
    keep = ("lr",) if kind is torch.optim.SGD else groups[0].keys()
    again = kind([{**{k: g[k] for k in keep}, "params": [new[n] for n in g["params"]]} for g in groups])
    if kind is torch.optim.AdamW:
        for name, of_parameter in state.items():
            like = new[name]
            again.state[like] = {
                key: x if key == "step" else distribute_tensor(x, like.device_mesh, like.placements)
                for key, x in of_parameter.items()
            }
    return again


def trace(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Copies of everything that must not change."""
    parameters = list(model.parameters())
    states = [x for p in parameters for x in optimizer.state.get(p, {}).values()]
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None), *states]
    return [(x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone() for x in tensors]


def one_rank(cases: Path, out: Path) -> None:
    """In a process of its own."""
    distributed.init_process_group("gloo")
    found = {}
    for name, case in json.loads(cases.read_text()).items():
        model, optimizer = subject_of(case)
        optimizer = sharded(model, optimizer, case)
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None  # of the trainer, to be left alone
        if case.get("gathered"):  # as a forward pass of the trainer leaves the model
            with torch.no_grad():
                model(input_ids=torch.tensor([[3, 4, 5]]))
            before = None
        else:
            before = trace(model, optimizer)
        try:
            found[name] = {"result": probe(case, model, optimizer)}
        except ValueError as error:
            found[name] = {"error": str(error)}
        except Exception:
            found[name] = {"crash": traceback.format_exc()}
        after = trace(model, optimizer)
        if before is not None:
            found[name]["untouched"] = len(before) == len(after) and all(map(torch.equal, before, after))
        model.train()
        found[name]["trains"] = bool(model(input_ids=torch.tensor([[3, 4, 5]])).logits.isfinite().all())
    (out / f"{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()
