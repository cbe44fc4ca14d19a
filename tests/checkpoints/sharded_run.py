"""One of two ranks that train a tiny policy under ``fully_shard`` and save sharded checkpoints; run by a fixture.

For ``full`` and ``tied``, in its directory: ``base``,
``hf/checkpoint-k`` as accelerate lays it out, ``plain/checkpoint-k`` and ``nested/checkpoint-k`` in one directory, each
for k of 2 and 3, ``step-3.pt`` with the clipped gradients of step 3, and ``whole-k.pt`` with the unsharded state.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from tests.tiny import tiny_policy


def train(directory: Path, rank: int, *, tied: bool) -> None:
    model, tokenizer = tiny_policy(tie_word_embeddings=tied)
    if rank == 0:
        model.save_pretrained(directory / "base")
        tokenizer.save_pretrained(directory / "base")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    named = dict(model.named_parameters())
    decay = [p for n, p in named.items() if p.dim() > 1]
    rest = [p for n, p in named.items() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "lr": 3e-4, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, foreach=False)
    for step in (1, 2, 3):
        ids = torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(10 * step + rank))
        model(input_ids=ids, labels=ids).loss.backward()
        gradients = {name: p.grad.full_tensor() for name, p in named.items()}
        if rank == 0 and step == 3:
            torch.save(gradients, directory / "step-3.pt")
        optimizer.step()
        optimizer.zero_grad()
        if step > 1:
            save(directory, rank, step, model, optimizer)


def save(directory: Path, rank: int, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, state = get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)
    checkpoint = directory / "hf" / f"checkpoint-{step}"
    dcp.save({"model": weights}, checkpoint_id=checkpoint / "pytorch_model_fsdp_0")
    dcp.save({"optimizer": state}, checkpoint_id=checkpoint / "optimizer_0")
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=directory / "plain" / f"checkpoint-{step}")
    dcp.save({"app": {"model": weights, "optim": state}}, checkpoint_id=directory / "nested" / f"checkpoint-{step}")
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    moments = {
        name: {key: optimizer.state[p][key].full_tensor() for key in ("exp_avg", "exp_avg_sq")}
        for name, p in model.named_parameters()
    }
    if rank == 0:
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        torch.save({}, checkpoint / "scheduler.pt")
        torch.save({"model": whole, "moments": moments}, directory / f"whole-{step}.pt")


def one_rank(directory: Path, rank: int) -> None:
    """In a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2)
    for name in ("full", "tied"):
        (directory / name).mkdir(exist_ok=True)
        train(directory / name, rank, tied=name == "tied")
        dist.barrier()
    dist.destroy_process_group()
