"""Load or inspect a checkpoint: a LoRA adapter or full weights, with the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from entropy_probe.checkpoints.adapters import Quantization
from entropy_probe.checkpoints.directory import open_directory
from entropy_probe.checkpoints.doubts import UNUSABLE, doubts_about, remarks_on
from entropy_probe.checkpoints.errors import CheckpointError, MismatchError, UnsupportedError
from entropy_probe.checkpoints.examine import Examined, Request, examine, stored_base
from entropy_probe.checkpoints.libraries import random_state_kept
from entropy_probe.checkpoints.manifest import verify_base
from entropy_probe.checkpoints.mapping import StatedMapping
from entropy_probe.checkpoints.masters import Copy, copy_masters
from entropy_probe.checkpoints.models import full_skeleton, load_full, load_lora
from entropy_probe.checkpoints.models_sharded import shard_full, shard_lora
from entropy_probe.checkpoints.optimizer_state import build_optimizer
from entropy_probe.checkpoints.tokenizer import load_tokenizer
from entropy_probe.checkpoints.weights import check_finite, has_weights, read_weights
from entropy_probe.results.checkpoint import CheckpointReport
from entropy_probe.results.record import file_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class CheckpointState:
    """A policy in training, ready to be probed.

    Attributes:
        model: the policy in eval mode; exactly the parameters that were trained require a gradient.
        tokenizer: the checkpoint's tokenizer, else the base model's; None when neither has one (only sampling
            and scoring of text need it).
        optimizer: the checkpoint's optimizer over the model's parameters, holding their state.
        loss: the settings of the trainer's loss, as ``ProbeConfig(loss=...)`` takes them; None where the files do not
            tell them.
        settings: the trainer's settings that the loss, the step and the samples depend on, by its own names; empty
            where there is no file of them.
        report: what was found and how state was matched to parameters.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    optimizer: torch.optim.Optimizer
    loss: dict[str, Any] | None
    settings: Mapping[str, Any]
    report: CheckpointReport


@file_errors(CheckpointError)
def load_checkpoint(
    path: str | Path,
    base_model: str | Path | None = None,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    adapter: str | None = None,
    quantization: Quantization | None = None,
    mapping: StatedMapping | None = None,
    shard: bool = False,
    weights: Copy = "masters",
    policy: str | None = None,
    any_trainer: bool = False,
    trainer_config: str | Path | None = None,
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
        mapping: for an optimizer file without names whose groups are of no known rule, which parameters its entries
            belong to: a file with a name on each line in the optimizer's order, or for regular expressions the group
            of the parameters that they match first (``{"lora_A": 0, "lora_B": 1}``), which are in the model's order.
        shard: spread model and optimizer state over the ranks of torch's default process group (FSDP2), for a model
            that does not fit one device. To be called on all ranks.
        weights: of a checkpoint whose optimizer keeps float32 copies of rounded weights (DeepSpeed in bfloat16): those,
            which the optimizer steps, or ``rounded``, which the policy samples with. The mapping in the report says
            which.
        policy: where one optimizer stepped a value model or head too (PPO), the policy's name in the module that both
            are in (``policy``, ``pretrained_model``). The others' entries are set aside, and counted in the mapping.
        any_trainer: load the checkpoint of a trainer whose loss is none of those that are modelled (DPO, SFT …) too,
            for a gradient from outside.
        trainer_config: the trainer's own config (verl, OpenRLHF, prime-rl …: YAML, JSON, TOML, or the script with its
            command), where it does not lie beside the checkpoint.

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
    facts: dict[str, Any] = {}
    with random_state_kept(), torch.device("cpu"):  # whatever default device the caller has set
        place = open_directory(Path(path))
        request = Request(
            place, base_model, adapter, quantization, mapping, weights, policy, any_trainer, trainer_config
        )
        examined = examine(request, facts)
        model = _load_model(examined, getattr(torch, dtype), torch.device(device), shard=shard)
        files = examined.model.adapter
        tokenizer = load_tokenizer(request.tokenizer_home, base_model if files is None else files.base)
        parameters = _trained(model, examined)
        if examined.masters:
            copy_masters(examined.masters, parameters)
        optimizer = build_optimizer(examined.saved, examined.mapping, parameters)
    run = examined.run
    return CheckpointState(model, tokenizer, optimizer, run.loss, run.values, report_on(examined, facts))


def _trained(model: nn.Module, examined: Examined) -> dict[str, nn.Parameter]:
    """The parameters that were trained, and after this require a gradient, by name."""
    names = examined.mapping.names
    if examined.mapping.others_frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != set(names):
        raise MismatchError(
            f"{examined.path}: expected {len(names)} trainable parameters, the loaded model has {len(parameters)} that "
            "differ; the installed peft or transformers builds another model"
        )
    return parameters


def _load_model(examined: Examined, dtype: torch.dtype, device: torch.device, *, shard: bool) -> nn.Module:
    stored, adapter = examined.model, examined.model.adapter
    if adapter is None:
        load = shard_full if shard else load_full
        return load(stored.configuration, stored.weights, dtype, device)
    if shard and adapter.quantization is not None:
        raise UnsupportedError(f"{adapter.base}: not supported: a quantised base in shards; load it on one device")
    if examined.manifest is not None:
        verify_base(Path(adapter.base), examined.manifest)
    return shard_lora(adapter, dtype, device) if shard else load_lora(adapter, dtype, device)


@file_errors(CheckpointError)
def load_reference(path: str | Path, *, dtype: str = "float32", device: str | torch.device = "cpu") -> nn.Module:
    """The full weights of a directory, as the reference policy of a KL term: in eval mode, nothing trains.

    Args:
        path: the directory: a model, or a checkpoint of full weights.
        dtype: precision of the weights, as in :func:`load_checkpoint`.
        device: where they go.

    Raises:
        CheckpointError: as :func:`load_checkpoint`.
    """
    directory = Path(path)
    if not has_weights(directory, "model"):
        raise CheckpointError(
            f"{directory}: expected full weights of the reference (model.safetensors), found none; pass the directory "
            "of the model that training started from"
        )
    with random_state_kept():
        weights = read_weights(directory, "model")
        check_finite(weights)
        full_skeleton(str(directory), weights)
        return load_full(str(directory), weights, getattr(torch, dtype), torch.device(device)).requires_grad_(False)


def report_on(examined: Examined, facts: Mapping[str, Any]) -> CheckpointReport:
    """The report on a checkpoint that can be loaded; ``facts`` as :func:`examine` left them."""
    doubts = tuple(doubts_about(examined))
    return CheckpointReport(
        path=str(examined.path),
        verdict="suspicious" if doubts else "healthy",
        notes=(*doubts, *remarks_on(examined), *examined.run.notes()),
        **facts,
    )


def base_model_of(
    path: Path,
    base_model: str | Path | None = None,
    *,
    adapter: str | None = None,
    quantization: Quantization | None = None,
) -> str | None:
    """The directory or name of the model under an adapter, which :func:`load_checkpoint` takes; None for full weights.

    Only the adapter's own files are read, of its weights names and shapes. Also None where they do not say it: loading
    then says what is wrong, with what the other files tell.

    Raises:
        CheckpointError: if ``path`` is not a checkpoint directory at all.
    """
    request = Request(open_directory(path), base_model, adapter, quantization)
    try:
        return stored_base(request)
    except CheckpointError:
        return None


@file_errors(CheckpointError)
def inspect_checkpoint(
    path: str | Path,
    base_model: str | Path | None = None,
    *,
    adapter: str | None = None,
    quantization: Quantization | None = None,
    mapping: StatedMapping | None = None,
    weights: Copy = "masters",
    policy: str | None = None,
    trainer_config: str | Path | None = None,
) -> CheckpointReport:
    """Examine a checkpoint without loading the base model's weights and without a forward pass.

    Everything :func:`load_checkpoint` checks before loading is checked here, with the same arguments, on a skeleton of
    the model that has no storage; of the base model's weights only names and shapes, where they are local and not
    stored in 4 bits. A checkpoint that would not load gets the verdict ``unusable`` with the reason.

    Raises:
        CheckpointError: if ``path`` is not a checkpoint directory at all.
    """
    directory = open_directory(Path(path))
    facts: dict[str, Any] = {}
    try:
        with random_state_kept():
            request = Request(
                directory, base_model, adapter, quantization, mapping, weights, policy, False, trainer_config
            )
            examined = examine(request, facts)
    except CheckpointError as error:
        return CheckpointReport(path=str(directory), verdict="unusable", notes=(UNUSABLE(reason=str(error)),), **facts)
    return report_on(examined, facts)
