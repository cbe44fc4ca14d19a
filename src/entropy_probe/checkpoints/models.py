"""The model of a checkpoint: first without storage, to check files against, then with its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from entropy_probe.checkpoints.directory import check_layers, refuse_remote_code
from entropy_probe.checkpoints.errors import InvalidValueError, MismatchError, UnsupportedError
from entropy_probe.checkpoints.libraries import WithoutInitialization, one_line_errors, quiet
from entropy_probe.checkpoints.weights import Shape, check_loaded, has_weights, read_shapes, weight_files

__all__ = ["adapter_shapes", "load_full", "load_lora", "model_skeleton", "with_adapter"]


MOST_LAYERS = 10_000
"""Bound on the layers of a configuration whose weight files are not there to compare with."""


def model_skeleton(name: str, *, complete: bool) -> nn.Module:
    """The model of a configuration, on the meta device, and its weight files checked against it where they are local.

    Args:
        name: directory or hub name.
        complete: whether tensors of the files that the model does not use are refused.

    Raises:
        CheckpointError: if the configuration cannot be used, or the files have not exactly its tensors.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    file = Path(name) / "config.json"
    if file.is_file():
        refuse_remote_code(file, CONFIG_MAPPING)
    shapes = read_shapes(weight_files(Path(name), "model")) if has_weights(Path(name), "model") else None
    if file.is_file():
        check_layers(file, len(shapes) if shapes else MOST_LAYERS)
    with one_line_errors(name), quiet():
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise UnsupportedError(f"{name}: not supported: quantised weights; pass unquantised ones")
        with torch.device("meta"), WithoutInitialization():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if shapes is not None and not _has_exactly(model, shapes):
        # The library knows names that changed between versions; what it still misses is an error.
        model = _from_pretrained(name, torch.float32, torch.device("meta"), complete=complete)
    return model


def _has_exactly(model: nn.Module, shapes: dict[str, Shape]) -> bool:
    """Whether files with these tensors are the model's own, name by name and shape by shape, tied ones once."""
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return expected == shapes


def with_adapter(model: nn.Module, path: Path) -> nn.Module:
    """The skeleton with the adapter of a checkpoint, still without storage."""
    from peft import PeftConfig, PeftModel

    with one_line_errors(f"the adapter of {path}"), quiet(), WithoutInitialization():
        adapter = PeftConfig.from_pretrained(str(path))
        adapter.inference_mode = False
        return PeftModel(model, adapter, low_cpu_mem_usage=True)  # type: ignore[arg-type]


def adapter_shapes(model: nn.Module) -> dict[str, Shape]:
    """The tensors that the adapter's file must hold."""
    from peft import get_peft_model_state_dict

    return {name: tuple(x.shape) for name, x in get_peft_model_state_dict(model, save_embedding_layers=False).items()}


def load_full(path: Path, files: list[Path], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model with full weights, in eval mode, checked to hold every tensor of its files."""
    model = _from_pretrained(str(path), dtype, device, complete=True)
    check_loaded(files, model.state_dict(), all_names=False)
    return model.eval()


def load_lora(path: Path, base_name: str, files: list[Path], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A base model with a trainable adapter, in eval mode, checked to hold every tensor of the adapter's file."""
    from peft import PeftModel, get_peft_model_state_dict

    base = _from_pretrained(base_name, dtype, device)
    bad = [name for name, p in base.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise InvalidValueError(
            f"{base_name}: {bad[0]}: expected finite values, got NaN or infinity; pass another copy"
        )
    with one_line_errors(str(path)), quiet():
        model = PeftModel.from_pretrained(base, str(path), is_trainable=True, torch_device=str(device))
    check_loaded(files, get_peft_model_state_dict(model, save_embedding_layers=False), all_names=True)
    return model.eval()


def _from_pretrained(name: str, dtype: torch.dtype, device: torch.device, *, complete: bool = False) -> Any:
    """A causal language model whose every parameter came from the files; on ``meta`` without their values.

    ``complete`` also refuses tensors of the files that the model does not use.
    """
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    with one_line_errors(name), quiet():
        model, info = factory.from_pretrained(
            name,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are listed instead of raised, and refused below
            output_loading_info=True,
        )
    wrong = ("missing_keys", "mismatched_keys", *(("unexpected_keys",) if complete else ()))
    for what in wrong:
        if info[what]:
            shown = sorted(map(str, info[what]))
            raise MismatchError(
                f"{name}: expected weights for exactly the model of config.json, got {len(shown)} "
                f"{what.replace('_', ' ')} {shown[:2]}; pass intact weights with their own configuration"
            )
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedError(f"{name}: not supported: quantised weights; pass unquantised ones")
    return model
