"""Checkpoints of the Hugging Face Trainer and TRL: a LoRA adapter or full weights, with the optimizer's state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from entropy_probe.checkpoints.directory import open_directory
from entropy_probe.checkpoints.errors import CheckpointError, MismatchError, UnsupportedError
from entropy_probe.checkpoints.examine import Examination
from entropy_probe.checkpoints.libraries import random_state_kept
from entropy_probe.checkpoints.manifest import verify_base
from entropy_probe.checkpoints.models import load_full, load_lora
from entropy_probe.checkpoints.models_sharded import shard_full, shard_lora
from entropy_probe.checkpoints.optimizer_state import build_optimizer
from entropy_probe.checkpoints.quantization import Quantization
from entropy_probe.checkpoints.tokenizer import load_tokenizer
from entropy_probe.results.checkpoint import CheckpointReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CheckpointState", "inspect_checkpoint", "load_checkpoint"]

DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class CheckpointState:
    """A policy in training, ready to be probed.

    Attributes:
        model: the policy in eval mode; exactly the parameters that were trained require a gradient.
        tokenizer: the checkpoint's tokenizer, else the base model's; None when neither has one (only sampling
            and scoring of text need it).
        optimizer: the checkpoint's optimizer over the model's parameters, holding their state.
        loss: what the checkpoint records about its loss. A Trainer's directory records it only in
            ``training_args.bin``, a pickle that is never loaded, so this is None and the loss comes from the
            config.
        report: what was found and how state was matched to parameters.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    optimizer: torch.optim.Optimizer
    loss: str | None
    report: CheckpointReport


def load_checkpoint(
    path: str | Path,
    base_model: str | Path | None = None,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    adapter: str | None = None,
    quantization: Quantization | None = None,
    shard: bool = False,
) -> CheckpointState:
    """Load a checkpoint directory of the Hugging Face Trainer or TRL.

    Weights come from safetensors only, the optimizer's state with ``weights_only=True``; no code in the
    directory runs. Every tensor of the weight files is checked to be in the model afterwards, and every trained
    parameter to have its own moments. Global random states are left as they were.

    Args:
        path: the ``checkpoint-N`` directory.
        base_model: directory or hub name of the model under a LoRA adapter; by default the one the adapter
            names, looked for relative to the working directory, the checkpoint and its parents. For full weights,
            the model that training started from: the movement of the weights away from it is compared with the
            moments, where part of it was frozen its tensors say which, and its tokenizer is used where the checkpoint
            has none.
        dtype: precision of the model's weights: ``float32``, ``bfloat16`` or ``float64``. Moments and adapters are
            never kept in a lower precision than the file's. With a 4-bit base model, of everything that is not
            quantised and of all arithmetic (not ``float64``).
        device: where model and optimizer state go.
        adapter: which adapter was trained, where the checkpoint has several besides reference copies and no manifest
            that says it.
        quantization: settings of the ``BitsAndBytesConfig`` with which training quantised the base model while loading
            it (``{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", ...}``). Not needed for a base model that is
            stored in 4 bits.
        shard: spread model and optimizer state over the ranks of torch's default process group (FSDP2), for a model
            that does not fit one device. To be called on all ranks.

    Raises:
        CheckpointError: if anything is missing, damaged, of another model, unsafe or not supported, as one of its
            subclasses in :mod:`entropy_probe.checkpoints`. A learning rate of 0 is not an error here; the report
            says so.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}; choose one of these")
    if shard and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise CheckpointError(
            "shard: expected a process group to spread the model over, found none; start several processes with "
            "torchrun"
        )
    examination = Examination(open_directory(Path(path)), base_model, adapter, quantization)
    with random_state_kept():
        examination.run()
        load = _shard_model if shard else _load_model
        model = load(examination, getattr(torch, dtype), torch.device(device))
        tokenizer = load_tokenizer(examination.path, examination.base or base_model)
        assert examination.saved is not None
        assert examination.mapping is not None
        if examination.mapping.others_frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in examination.mapping.names)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if parameters.keys() != set(examination.mapping.names):
            raise MismatchError(
                f"{path}: expected {len(examination.mapping.names)} trainable parameters, the loaded model has "
                f"{len(parameters)} that differ; the installed peft or transformers builds another model"
            )
        optimizer = build_optimizer(examination.saved, examination.mapping, parameters)
    return CheckpointState(model, tokenizer, optimizer, None, examination.report())


def _load_model(found: Examination, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if found.kind == "full":
        return load_full(found.configuration, found.files, dtype, device)
    assert found.base is not None
    assert found.adapter is not None
    if found.manifest is not None:
        verify_base(Path(found.base), found.manifest)
    return load_lora(found.directory, found.adapter, found.files, found.base, found.quantization, dtype, device)


def _shard_model(found: Examination, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if found.kind == "full":
        return shard_full(found.configuration, found.files, dtype, device)
    assert found.base is not None
    assert found.adapter is not None
    if found.quantization is not None:
        raise UnsupportedError(f"{found.base}: not supported: a quantised base in shards; load it on one device")
    if found.manifest is not None:
        verify_base(Path(found.base), found.manifest)
    return shard_lora(found.directory, found.adapter, found.files, found.base, dtype, device)


def inspect_checkpoint(
    path: str | Path,
    base_model: str | Path | None = None,
    *,
    adapter: str | None = None,
    quantization: Quantization | None = None,
) -> CheckpointReport:
    """Examine a checkpoint without loading the base model's weights and without a forward pass.

    Everything :func:`load_checkpoint` checks before loading is checked here, on a skeleton of the model that
    has no storage; of the base model's weights only names and shapes, where they are local and not stored in 4 bits. A
    checkpoint that would not load gets the verdict ``unusable`` with the reason.

    Args:
        path: the ``checkpoint-N`` directory.
        base_model: as in :func:`load_checkpoint`.
        adapter: as there.
        quantization: as there.

    Raises:
        CheckpointError: if ``path`` is not a checkpoint directory at all.
    """
    examination = Examination(open_directory(Path(path)), base_model, adapter, quantization)
    try:
        with random_state_kept():
            examination.run()
    except CheckpointError as error:
        return examination.report(unusable=str(error))
    return examination.report()
