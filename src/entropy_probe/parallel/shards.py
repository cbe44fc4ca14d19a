"""Tensors that FSDP2 shards over ranks: this rank's shard of them, and sums over the shards.

Sharded parameters are ``DTensor``; arithmetic on them, element by element, is torch's own. What torch has no operation
for is here. Everything is called by all ranks together, and does nothing to tensors that are not sharded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, in the same memory; the tensor itself if it is not sharded."""
    if not _is_shard(tensor):
        return tensor
    shard: Any = tensor.detach()
    return shard.to_local()


def sum_of_shards(values: Tensor, of: Iterable[Tensor]) -> Tensor:
    """The sum of what each rank found on its shards of some tensors.

    Torch's own sums of sharded tensors are not used: ``item()`` of one gives what this rank has.

    Args:
        values: what this rank found.
        of: the tensors, all sharded over the same ranks, or none of them.
    """
    return _reduced(values, of, "sum")


def count(where: Tensor) -> int:
    """How many elements are true."""
    return int(sum_of_shards(local(where).sum()[None], [where]))


def extremes(tensor: Tensor) -> tuple[float, float]:
    """The smallest and the largest element."""
    shard = local(tensor)
    own = torch.full((2,), -torch.inf, dtype=torch.float64)
    if shard.numel():
        smallest, largest = shard.aminmax()
        own = torch.tensor([-smallest.item(), largest.item()], dtype=torch.float64)
    smallest, largest = _reduced(own, [tensor], "max").tolist()
    return -smallest, largest


def _reduced(values: Tensor, of: Iterable[Tensor], how: str) -> Tensor:
    sharded: Any = next((tensor for tensor in of if _is_shard(tensor)), None)
    if sharded is None or not values.numel():
        return values
    from torch.distributed.tensor import DTensor, Partial, Replicate

    # replicas, of which a mesh with two dimensions has some, all found the same
    placements = [Partial(how) if placement.is_shard() else Replicate() for placement in sharded.placements]
    there = values.to(sharded.device)
    return DTensor.from_local(there, sharded.device_mesh, placements, run_check=False).full_tensor().to(values.device)


def sharded_as(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that all ranks have whole, sharded as another of its shape is."""
    if not _is_shard(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    target: Any = like
    mesh = target.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    # a copy, for a view would keep the memory of the whole
    return from_shard(local(everywhere.redistribute(placements=target.placements)).clone(), like)


def same_shards(tensor: Tensor, like: Tensor) -> bool:
    """Whether a tensor is sharded as another is, or neither is."""
    if not (_is_shard(tensor) and _is_shard(like)):
        return _is_shard(tensor) == _is_shard(like)
    a: Any = tensor
    b: Any = like
    return a.device_mesh == b.device_mesh and a.placements == b.placements


def from_shard(shard: Tensor, like: Tensor) -> Tensor:
    """The sharded tensor of which every rank has a shard, as :func:`local` gives it of one like it."""
    if not _is_shard(like):
        return shard
    from torch.distributed.tensor import DTensor

    target: Any = like
    return DTensor.from_local(
        shard, target.device_mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model."""
    return bool(_sharded_modules(model))


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that a forward pass left, so that the next one gathers them anew.

    Until then the model's parameters are other objects than those the optimizer holds, with their values as of then.
    """
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called on; it changes their classes."""
    return [m for m in model.modules() if any(kind.__name__ == "FSDPModule" for kind in type(m).__mro__)]


def check_shards(model: nn.Module, trained: Iterable[tuple[str, Tensor]]) -> None:
    """Make sure that a model is whole, or sharded in a way whose numbers are the model's.

    Raises:
        ValueError: for FSDP of the first version, tensor parallelism, a part of the trained parameters sharded, or
            shards kept in host memory.
    """
    kinds = {type(module).__name__ for module in model.modules()}
    if "FullyShardedDataParallel" in kinds:
        raise ValueError(
            "model: expected whole parameters or those of fully_shard, got FullyShardedDataParallel, which is not "
            "supported; save it with torch.distributed.checkpoint and load that checkpoint"
        )
    shards: list[tuple[str, Any]] = [(name, p) for name, p in trained if _is_shard(p)]
    whole = [name for name, p in trained if not _is_shard(p)]
    if shards and not is_sharded(model):
        raise ValueError(
            f"model: expected whole parameters or those of fully_shard, got a DTensor in {shards[0][0]} without it "
            "(tensor parallelism?), which is not supported; pass a model on one device"
        )
    if is_sharded(model) and whole:
        raise ValueError(
            f"model: expected all trained parameters to be sharded, got {whole[0]} whole; call fully_shard on the "
            "whole model, after its parts"
        )
    meshes = {str(p.device_mesh) for _, p in shards}
    if len(meshes) > 1:
        raise ValueError(f"model: expected one device mesh for all trained parameters, got {len(meshes)}")
    for name, p in shards:
        if p.device.type != p.device_mesh.device_type:
            raise ValueError(
                f"model: {name}: expected shards on the device of the mesh ({p.device_mesh.device_type}), got them on "
                f"{p.device}; call fully_shard without an offload policy"
            )
