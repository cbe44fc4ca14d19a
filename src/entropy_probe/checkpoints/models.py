"""The model of a checkpoint: first without storage, to check files against, then with its weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entropy_probe.checkpoints.adapters import FourBit, Quantization, load_arguments, quantization_of, set_precision
from entropy_probe.checkpoints.embeddings import check_covered, resize_embeddings
from entropy_probe.checkpoints.errors import InvalidValueError, MismatchError, UnsafeFileError, UnsupportedError
from entropy_probe.checkpoints.formats import Weights
from entropy_probe.checkpoints.libraries import WithoutInitialization, one_line_errors, quiet
from entropy_probe.checkpoints.parameters import Layout, layout_of, repeat_layers, thin_out, treats_layers_alike
from entropy_probe.checkpoints.peft_names import name_in_base
from entropy_probe.checkpoints.safe_read import read_json
from entropy_probe.checkpoints.weights import Shape, check_loaded, check_shapes, has_weights, read_weights

MAX_LAYERS = 10_000
"""Bound on the layers of a configuration whose weight files are not there to compare with."""


def full_skeleton(name: str, weights: Weights) -> nn.Module:
    """The model of full weights, on the meta device, the weights' names and shapes checked against it."""
    shapes = weights.shapes
    config = read_config(name, shapes)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedError(f"{name}: not supported: quantised weights; pass unquantised ones")
    if weights.pretrained:
        return _skeleton(name, config, shapes, complete=True)
    with torch.device("meta"):
        model = untouched_of_rows(name, weights, torch.float32)
    # these are of the model's state as it was, in which a tied tensor may be under each of its names
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = every - {name for name, _ in model.named_parameters()}
    expected = {key: tuple(x.shape) for key, x in model.state_dict().items() if key in shapes or key not in tied}
    check_shapes(weights.files[0], shapes, expected)
    return model


def embedding_names(model: Any) -> set[str]:
    """The names of the embedding and of the output layer, which are one tensor where they are tied."""
    weights = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    return {name for name, parameter in model.named_parameters() if id(parameter) in weights}


def base_skeleton(
    name: str, given: Quantization | None, trained: Quantization | None = None
) -> tuple[nn.Module, FourBit | None]:
    """The base model of an adapter, on the meta device, and how it is quantised.

    Its weight files are checked against it where they are local, except 4-bit ones: codes have other names and shapes,
    and are checked when they are loaded.
    """
    weights = read_weights(Path(name), "model") if has_weights(Path(name), "model") else None
    if weights is not None and not weights.pretrained:
        raise UnsupportedError(
            f"{weights.files[0].parent}: not supported: a base model in shards of torch.distributed.checkpoint; save "
            "its weights as safetensors (save_pretrained) and pass that"
        )
    shapes = weights.shapes if weights is not None else None
    config = read_config(name, shapes)
    # quantisation changes how weights are stored, not which there are
    recorded = vars(config).pop("quantization_config", None)
    with one_line_errors(f"{name}: quantization"):
        quantization = quantization_of(name, recorded, given, trained)
    stored = quantization is not None and quantization.stored
    return _skeleton(name, config, None if stored else shapes, complete=False), quantization


def read_config(name: str, shapes: dict[str, Shape] | None) -> Any:
    """The configuration, of no more layers than there are tensors."""
    from transformers import CONFIG_MAPPING, AutoConfig

    file = Path(name) / "config.json"
    if file.is_file():
        _check_config(file, CONFIG_MAPPING, len(shapes) if shapes else MAX_LAYERS)
    with one_line_errors(name), quiet():
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def _check_config(file: Path, known_types: Container[Any], most: int) -> None:
    """Refuse a ``config.json`` whose model needs code from its directory or the hub, or has too many layers.

    Where the library knows the model type itself, it uses its own class and not ``auto_map``. A model of more layers
    than its weight files have tensors (``most``) could take forever to build.
    """
    config = read_json(file)
    if "auto_map" in config and config.get("model_type") not in known_types:
        raise UnsafeFileError(
            f"{file}: auto_map: expected a model type that transformers implements, got "
            f"{config.get('model_type')!r:.60} with code of its own; remote code is never run"
        )
    for key, value in _items(config):
        names = value.values() if isinstance(value, dict) else [value]
        code = key.removesuffix("_internal").endswith("_implementation")
        if code and any(isinstance(name, str) and "/" in name for name in names):
            raise UnsafeFileError(
                f"{file}: {key}: expected a built-in implementation, got {value!r:.80}, code to be fetched "
                "from the hub; remove the key"
            )
        layers = key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers") and value is not None
        if layers and not (type(value) is int and 0 < value <= most):
            raise MismatchError(
                f"{file}: {key}: expected a number up to {most}, the tensors of the weights, got {str(value)[:60]}; "
                "pass intact weights with their own configuration"
            )


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            yield from node.items()
            waiting += node.values()


def untouched(name: str, config: Any, dtype: torch.dtype) -> nn.Module:
    """A model, its buffers computed and its parameters never written, which in host memory takes none yet."""
    from transformers import AutoModelForCausalLM

    with one_line_errors(name), quiet(), WithoutInitialization():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def untouched_of_rows(name: str, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """The same for full weights, of the vocabulary that they have, whatever the configuration says."""
    model = untouched(name, read_config(name, weights.shapes), dtype)
    with quiet():
        resize_embeddings(model, weights)
    return model


def _skeleton(name: str, config: Any, shapes: dict[str, Shape] | None, *, complete: bool) -> nn.Module:
    """The model without storage, checked against the tensors of its files; ``complete`` as in ``_from_pretrained``."""
    with torch.device("meta"):
        model = untouched(name, config, torch.float32)
    if shapes is not None and shapes != {name: tuple(p.shape) for name, p in model.named_parameters()}:
        # The library knows names that changed between versions; what it still misses is an error.
        model = _from_pretrained(name, torch.float32, torch.device("meta"), complete=complete)
    return model


def adapter_layout(
    base: nn.Module,
    directory: Path,
    name: str,
    config: dict[str, Any],
    weights: Weights,
    resized: Collection[int] = (),
) -> tuple[Layout, dict[str, Shape]]:
    """What trains with the adapter of a directory under its name, and the tensors that its file must hold.

    peft builds the adapter, on one layer of each kind where its configuration cannot tell equal layers apart; the
    skeleton of the base model is changed. ``weights`` are those of the adapter's file, where peft may have saved
    embeddings along; ``resized`` the base's parameters that were resized for these, by their ``id``.
    """
    from peft import PeftConfig, PeftModel

    below = set(base.state_dict())
    stacks = thin_out(base, config) if treats_layers_alike(config) else {}
    with one_line_errors(f"the adapter of {directory}"), quiet():
        adapter = PeftConfig.from_peft_type(**config)
        adapter.inference_mode = False
        model = PeftModel(base, adapter, name, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    in_file = {key: tuple(x.shape) for key, x in _adapter_state(model, name, False).items()}
    check_covered(model, resized, weights)
    along = {key: x for key, x in _adapter_state(model, name, True).items() if key in weights.tensors}
    if not (weights.pretrained or resized):  # a whole model's, of which the base's own are there once more
        along = {key: x for key, x in along.items() if name_in_base(key) not in below}
    in_file |= {key: tuple(x.shape) for key, x in along.items()}
    layout = layout_of(model)
    trained = layout.parameters
    lost = [key for key in trained if key.endswith(".base_layer.bias") and key not in in_file]
    if lost:  # peft before 0.21 with bias="lora_only"
        raise UnsupportedError(
            f"{directory}: not supported: trained biases that the installed peft does not save ({lost[0]}); upgrade "
            "peft, and train again if the file was saved without them"
        )
    prefix = "base_model.model."
    whole = Layout(
        repeat_layers(trained, stacks, prefix), tuple(repeat_layers(dict.fromkeys(layout.names), stacks, prefix))
    )
    return whole, repeat_layers(in_file, stacks, prefix)


def _adapter_state(model: nn.Module, name: str, embeddings: bool) -> dict[str, torch.Tensor]:
    """What peft saves of an adapter, with or without the embeddings that it can save along."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings)


def load_full(name: str, weights: Weights, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model with full weights, in eval mode, checked to hold every tensor of its files."""
    if not weights.pretrained:
        return _filled(name, weights, dtype, device).eval()
    model = _from_pretrained(name, dtype, device, complete=True)
    check_loaded(weights, model.state_dict(), all_names=False)
    return model.eval()


def _filled(name: str, weights: Weights, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model built from its configuration, every tensor of the weights copied into it."""
    with device:
        model = untouched_of_rows(name, weights, dtype)
    state = model.state_dict()
    for key, tensor in weights.tensors.items():
        state[key].copy_(tensor.read())
    check_loaded(weights, state, all_names=True)
    return model


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter that can be loaded, and what it is put on."""

    directory: Path  # where it is
    name: str  # its name
    config: dict[str, Any]  # its configuration
    weights: Weights  # its tensors, by their names in a file of peft
    base: str  # the base model's directory or hub name
    # the base model's weights, where they are beside the adapter's and not in ``base``
    base_weights: Weights | None = None
    quantization: FourBit | None = None  # how the base model is quantised; None for plain weights


def load_lora(adapter: AdapterFiles, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A base model with a trainable adapter, in eval mode, checked to hold every tensor of the adapter's file.

    Adapters are never held in a lower precision than their file's, and in bfloat16 only if ``dtype`` and the file are.
    """
    base_name, own = adapter.base, adapter.base_weights
    if own is None:
        base = _from_pretrained(base_name, dtype, device, quantization=adapter.quantization)
    else:
        base = _filled(base_name, own, dtype, device)
    numbers = ((name, p) for name, p in base.named_parameters() if not hasattr(p, "quant_state"))
    bad = [name for name, p in numbers if not torch.isfinite(p).all()]
    if bad:
        raise InvalidValueError(
            f"{base_name}: {bad[0]}: expected finite values, got NaN or infinity; pass another copy"
        )
    return attach_adapter(base, adapter, dtype, device).eval()


def attach_adapter(base: Any, adapter: AdapterFiles, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The base model with the trainable adapter, checked to hold every tensor of the adapter's file."""
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict

    weights, where = adapter.weights, str(adapter.directory)
    with one_line_errors(where), quiet():
        resize_embeddings(base, weights)
        if weights.pretrained:
            model = PeftModel.from_pretrained(
                base, where, adapter_name=adapter.name, is_trainable=True, torch_device=str(device)
            )
        else:
            config = PeftConfig.from_peft_type(**adapter.config)
            config.inference_mode = False
            model = PeftModel(base, config, adapter.name)  # type: ignore[arg-type]
            state = {name: tensor.read() for name, tensor in weights.tensors.items()}
            set_peft_model_state_dict(model, state, adapter_name=adapter.name)
    if dtype == torch.bfloat16 and {tensor.read().dtype for tensor in weights.tensors.values()} == {dtype}:
        for parameter in model.parameters():  # peft made float32 of what was trained in bfloat16
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    check_loaded(weights, _adapter_state(model, adapter.name, True), all_names=True)
    return model


def _from_pretrained(
    name: str, dtype: torch.dtype, device: torch.device, *, complete: bool = False, quantization: FourBit | None = None
) -> Any:
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
            **load_arguments(name, quantization, dtype),
        )
    wrong = ("missing_keys", "mismatched_keys", *(("unexpected_keys",) if complete else ()))
    for what in wrong:
        if info[what]:
            shown = sorted(map(str, info[what]))
            heads = [key for key in shown if re.match(r"(v_head|value_head|score|summary)\b", key)]
            if what == "unexpected_keys" and heads == shown:
                raise UnsupportedError(
                    f"{name}: not supported: a value head ({shown[0]}) beside the policy, whose entries the "
                    "optimizer's state holds too; pass policy, the policy's name in the module that both are in "
                    "(policy: pretrained_model)"
                )
            raise MismatchError(
                f"{name}: expected weights for exactly the model of config.json, got {len(shown)} "
                f"{what.replace('_', ' ')} {shown[:2]}; pass intact weights with their own configuration"
            )
    if quantization is not None:
        set_precision(model, dtype)
    elif getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedError(f"{name}: not supported: quantised weights; pass unquantised ones")
    return model
