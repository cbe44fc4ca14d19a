"""The model of a checkpoint in shards over ranks (FSDP2), for one that does not fit one device.

It is built in host memory that nothing touches, sharded layer by layer, and filled tensor by tensor, so that no rank
ever holds more than its shards, one layer and one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from entropy_probe.checkpoints.embeddings import resize_embeddings
from entropy_probe.checkpoints.errors import InvalidValueError, MismatchError, UnsupportedError
from entropy_probe.checkpoints.formats import Weights
from entropy_probe.checkpoints.models import AdapterFiles, attach_adapter, read_config, untouched_of_rows
from entropy_probe.checkpoints.weights import read_weights
from entropy_probe.parallel.shards import local, sharded_as


def shard_full(name: str, weights: Weights, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model with full weights, sharded over all ranks, in eval mode; arguments as of ``load_full``."""
    model = _host_model(name, weights, dtype)
    _shard(model, model, device)
    _fill(weights, dict(model.named_parameters(remove_duplicate=False)))
    return model.eval()


def shard_lora(adapter: AdapterFiles, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A base model with a trainable adapter, sharded over all ranks, in eval mode; arguments as of ``load_lora``."""
    base_name, directory = adapter.base, adapter.directory
    base_weights = adapter.base_weights or read_weights(Path(base_name), "model")
    base: Any = _host_model(base_name, base_weights, dtype)
    resized = resize_embeddings(base, adapter.weights)
    names = {id(p): name for name, p in base.named_parameters()}
    everywhere = {name: id(p) for name, p in base.named_parameters(remove_duplicate=False)}
    model = attach_adapter(base, adapter, dtype, torch.device("cpu"))
    kinds = {p.dtype for p in model.parameters()}
    if len(kinds) > 1:
        raise UnsupportedError(
            f"{directory}: not supported: a sharded model whose adapter is not in the base model's precision "
            f"({', '.join(sorted(map(str, kinds)))}); use dtype float32"
        )
    in_model = {names[id(p)]: name for name, p in model.named_parameters() if id(p) in names}
    _shard(model, base, device)
    parameters = dict(model.named_parameters())
    own = adapter.weights.tensors  # embeddings among them are the adapter's already
    places = {name: in_model[names[key]] for name, key in everywhere.items() if in_model[names[key]] not in own}
    others = {name: x for name, x in base_weights.tensors.items() if name in places or name not in everywhere}
    # below copies of the adapter's own the base's embeddings keep their rows, and of new ones NaN, as unsharded
    rows = {name: parameters[place].shape[0] for name, place in places.items() if everywhere[name] in resized}
    _fill(replace(base_weights, tensors=others), {name: parameters[place] for name, place in places.items()}, rows)
    return model.eval()


def _host_model(name: str, weights: Weights, dtype: torch.dtype) -> nn.Module:
    config = read_config(name, weights.shapes)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedError(f"{name}: not supported: quantised weights in shards; load them on one device")
    return untouched_of_rows(name, weights, dtype)


def _shard(model: nn.Module, base: Any, device: torch.device) -> None:
    """Shard each layer, then what remains."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    kinds = set(base._no_split_modules or ())
    for layer in [module for module in model.modules() if type(module).__name__ in kinds]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _fill(weights: Weights, parameters: Mapping[str, Parameter], rows: Mapping[str, int] | None = None) -> None:
    """Write every tensor into the shards; ``parameters`` by the names of the files, tied ones by each.

    Those of other ``rows`` than the files have are cut, or filled up with NaN.
    """
    filled: set[int] = set()
    where = weights.files[0]
    for name, stored in weights.tensors.items():
        if name not in parameters:
            raise MismatchError(
                f"{where}: {name}: expected the model's own names for a model in shards, got one it does not have; "
                "save the weights again with the installed transformers"
            )
        p = parameters[name]
        value = stored.read()
        if not torch.isfinite(value).all():
            raise InvalidValueError(f"{where}: {name}: expected finite values, got NaN or infinity; pass another copy")
        if rows and name in rows:
            more = value.new_full((max(rows[name] - len(value), 0), *value.shape[1:]), torch.nan)
            value = torch.cat([value[: rows[name]], more])
        if value.shape != p.shape:
            raise MismatchError(f"{where}: {name}: expected shape {list(p.shape)}, got {list(value.shape)}")
        own = local(sharded_as(value.to(p.device, p.dtype), p))
        if id(p) in filled and not torch.equal(local(p), own):
            raise MismatchError(f"{where}: {name}: expected tied weights to be equal, got others; save them again")
        local(p).copy_(own)
        filled.add(id(p))
    missing = [name for name, p in parameters.items() if id(p) not in filled]
    if missing:
        raise MismatchError(f"{where}: expected weights for all parameters, got none for {missing[0]}")
