"""Checkpoints of the Hugging Face Trainer and TRL: a LoRA adapter or full weights, with Adam state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from entropy_probe.checkpoints.adapters import adapters_of, find_base, read_adapter_config, trained_adapter
from entropy_probe.checkpoints.errors import CheckpointError
from entropy_probe.checkpoints.libraries import one_line_errors, quiet, random_state_kept
from entropy_probe.checkpoints.optimizer_file import SavedOptimizer, check_entries, read_optimizer
from entropy_probe.checkpoints.optimizer_state import ParameterMapping, build_optimizer, map_parameters, summarize
from entropy_probe.checkpoints.quantization import (
    Quantization,
    load_arguments,
    quantization_of,
    refuse_unmentioned,
    set_precision,
)
from entropy_probe.checkpoints.weights import (
    check_finite,
    check_loaded,
    check_shapes,
    read_dtypes,
    read_json,
    read_shapes,
    unchanged,
    weight_files,
)
from entropy_probe.results import CheckpointReport, OptimizerStateReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CheckpointState", "inspect_checkpoint", "load_checkpoint"]

DTYPES = ("float32", "bfloat16", "float64")
LARGE_LEARNING_RATE = 0.1


@dataclass(frozen=True)
class CheckpointState:
    """A policy in training, ready to be probed.

    Attributes:
        model: the policy in eval mode; exactly the parameters that were trained require a gradient.
        tokenizer: the checkpoint's tokenizer, else the base model's; None when neither has one (only sampling
            and scoring of text need it).
        optimizer: ``torch.optim.AdamW`` or ``Adam`` over the model's parameters, holding their moments.
        loss: what the checkpoint records about its loss. A Trainer's directory records it only in
            ``training_args.bin``, a pickle that is never loaded, so this is None and the loss comes from the
            config.
        report: what was found and how state was matched to parameters.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    optimizer: torch.optim.AdamW | torch.optim.Adam
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
) -> CheckpointState:
    """Load a checkpoint directory of the Hugging Face Trainer or TRL.

    Weights come from safetensors only, the optimizer's state with ``weights_only=True``; no code in the
    directory runs. Every tensor of the weight files is checked to be in the model afterwards, and every trained
    parameter to have its own moments. Global random states are left as they were.

    Args:
        path: the ``checkpoint-N`` directory.
        base_model: directory or hub name of the model under a LoRA adapter; by default the one the adapter
            names, looked for relative to the working directory, the checkpoint and its parents. For full weights
            the model that training started from: where part of it was frozen, its tensors say which, and its
            tokenizer is used where the checkpoint has none.
        dtype: precision of the model's weights: ``float32``, ``bfloat16`` or ``float64``. Moments and adapters are
            never kept in a lower precision than the file's. With a 4-bit base model, of everything that is not
            quantised and of all arithmetic (not ``float64``).
        device: where model and optimizer state go.
        adapter: which adapter was trained, where the checkpoint has several besides reference copies.
        quantization: settings of the ``BitsAndBytesConfig`` with which training quantised the base model while loading
            it (``{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", ...}``). Not needed for a base model that is
            stored in 4 bits.

    Raises:
        CheckpointError: if anything is missing, damaged, of another model or not supported. A learning rate of 0
            is not an error here; the report says so.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}; choose one of these")
    examination = _Examination(_open_directory(Path(path)), base_model, adapter, quantization)
    with random_state_kept():
        examination.run()
        assert examination.saved is not None
        assert examination.mapping is not None
        model = _load_model(examination, getattr(torch, dtype), torch.device(device))
        tokenizer = _load_tokenizer(examination)
        if examination.kind == "full":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in examination.mapping.names)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if parameters.keys() != set(examination.mapping.names):
            raise CheckpointError(
                f"{path}: expected {len(examination.mapping.names)} trainable parameters, the loaded model has "
                f"{len(parameters)} that differ; the installed peft or transformers builds another model"
            )
        optimizer = build_optimizer(examination.saved, examination.mapping, parameters)
    return CheckpointState(model, tokenizer, optimizer, None, examination.report())


def inspect_checkpoint(
    path: str | Path, base_model: str | Path | None = None, adapter: str | None = None
) -> CheckpointReport:
    """Examine a checkpoint without loading the base model's weights and without a forward pass.

    Everything :func:`load_checkpoint` checks before loading is checked here, on a skeleton of the model that
    has no storage. A checkpoint that would not load gets the verdict ``unusable`` with the reason.

    Args:
        path: the ``checkpoint-N`` directory.
        base_model: as in :func:`load_checkpoint`; only its configuration is read.
        adapter: as there.

    Raises:
        CheckpointError: if ``path`` is not a checkpoint directory at all.
    """
    examination = _Examination(_open_directory(Path(path)), base_model, adapter)
    try:
        with random_state_kept():
            examination.run()
    except CheckpointError as error:
        return examination.report(unusable=str(error))
    return examination.report()


def _open_directory(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint directory, found none; check the path")
    if not (adapters_of(path) or (path / "config.json").is_file()):
        inside = sorted(p.name for p in path.glob("checkpoint-*") if p.is_dir())
        hint = f"pass one of {', '.join(inside[-3:])} inside it" if inside else "pass a checkpoint-N of the Trainer"
        raise CheckpointError(f"{path}: expected adapter_config.json or config.json, found neither; {hint}")
    return path


@dataclass
class _Examination:
    """What has been established about a directory so far; ``run`` goes from cheap to dear and stops at errors."""

    path: Path
    base_model: str | Path | None
    adapter: str | None = None
    quantization: Quantization | None = None
    kind: Literal["lora", "full"] = field(init=False)
    base: str | None = None
    global_step: int | None = None
    saved: SavedOptimizer | None = None
    files: list[Path] = field(default_factory=list)
    mapping: ParameterMapping | None = None
    summary: tuple[OptimizerStateReport, int] | None = None
    frozen: int = 0

    def __post_init__(self) -> None:
        whole = (self.path / "config.json").is_file() and not (self.path / "adapter_config.json").is_file()
        self.kind = "full" if whole else "lora"
        self.directory = self.path

    def run(self) -> None:
        self.global_step = _read_global_step(self.path)
        self.saved = read_optimizer(self.path / "optimizer.pt")
        check_entries(self.saved)
        if self.kind == "lora":
            self.adapter, self.directory = trained_adapter(self.path, self.adapter)
            adapter = read_adapter_config(self.directory)
            self.base = find_base(self.path, self.base_model or adapter.get("base_model_name_or_path"))
            self.files = weight_files(self.directory, "adapter_model")
            skeleton = _lora_skeleton(self.directory, self.base, self.adapter)
            check_shapes(self.files[0], read_shapes(self.files), _adapter_shapes(skeleton, self.adapter))
        else:
            self.files = weight_files(self.path, "model")
            read_shapes(self.files)
            skeleton = _from_pretrained(str(self.path), torch.float32, torch.device("meta"), complete=True)
            self._leave_out_frozen(skeleton)
        check_finite(self.files)
        self.mapping = map_parameters(self.saved, skeleton)
        if self.frozen:
            how = f"{self.mapping.how}; {self.frozen} tensors that are as in {self.base_model} were frozen"
            self.mapping = replace(self.mapping, how=how)
        self.summary = summarize(self.saved, self.mapping)

    def _leave_out_frozen(self, skeleton: nn.Module) -> None:
        """Parameters that did not move since the base model were not trained, where the file has too few entries."""
        assert self.saved is not None
        named = dict(skeleton.named_parameters())
        if self.base_model is None or self.saved.num_parameters >= len(named):
            return
        for name in unchanged(self.files, weight_files(Path(self.base_model), "model")) & named.keys():
            named[name].requires_grad_(False)
            self.frozen += 1

    def report(self, unusable: str | None = None) -> CheckpointReport:
        reasons = (unusable,) if unusable else tuple(self._doubts())
        saved = self.saved
        state, num_zero = self.summary or (None, None)
        return CheckpointReport(
            path=str(self.path),
            kind=self.kind,
            base_model=self.base,
            global_step=self.global_step,
            optimizer=saved.kind if saved else None,
            groups=saved.group_reports() if saved else (),
            num_with_exp_avg_sq=saved.count("exp_avg_sq") if saved else None,
            num_with_step=saved.count("step") if saved else None,
            num_zero_elements=num_zero,
            optimizer_state=state,
            verdict="unusable" if unusable else "suspicious" if reasons else "healthy",
            reasons=reasons,
        )

    def _doubts(self) -> Iterator[str]:
        """What does not keep the checkpoint from loading but should be read before its numbers are used."""
        assert self.saved is not None
        assert self.summary is not None
        state, _ = self.summary
        rates = [group["lr"] for group in self.saved.groups if group["params"]]
        if not any(rates):
            yield "learning rate is 0, as after a finished schedule; give one with --learning-rate"
        if max(rates) > LARGE_LEARNING_RATE:
            yield f"learning rate {max(rates):g} is above {LARGE_LEARNING_RATE:g}; check it"
        if state.coverage < 1:
            yield (
                f"exp_avg_sq is all zero for {1 - state.coverage:.0%} of the elements; normal for lora_A after "
                "the first step, otherwise these parameters were not trained"
            )
        low, high = state.steps
        if low != high:
            yield f"step counts differ between parameters ({low} to {high}); some were not always trained"
        if self.global_step is None:
            yield "trainer_state.json, written last, is missing; the save may be incomplete"
        elif self.global_step != high:
            yield f"optimizer.pt is at step {high}, trainer_state.json at {self.global_step}; files of two saves?"
        if any(g["weight_decay"] and "decoupled_weight_decay" not in g for g in self.saved.groups):
            yield "the file does not say whether weight decay is decoupled; taken as AdamW, the Trainer's"


def _read_global_step(path: Path) -> int | None:
    """Optimizer steps taken; None when the file is not there."""
    file = path / "trainer_state.json"
    if not file.is_file():
        return None
    step = read_json(file).get("global_step")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{file}: global_step: expected a whole number, got {step!r}; copy the checkpoint again")
    return step


def _lora_skeleton(path: Path, base: str, name: str) -> nn.Module:
    """The model with its adapter, without storage."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    with one_line_errors(f"{base} with the adapter of {path}"), quiet():
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        # quantisation changes how weights are stored, not which there are
        quantization_of(base, vars(config).pop("quantization_config", None), None)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        adapter = PeftConfig.from_pretrained(str(path))
        adapter.inference_mode = False
        return PeftModel(model, adapter, name, low_cpu_mem_usage=True)


def _adapter_shapes(model: nn.Module, name: str) -> dict[str, tuple[int, ...]]:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: tuple(x.shape) for key, x in state.items()}


def _load_model(found: _Examination, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model in eval mode, checked to hold every tensor of the weight files."""
    if found.kind == "full":
        model = _from_pretrained(str(found.path), dtype, device, complete=True)
        check_loaded(found.files, model.state_dict(), all_names=False)
        return model.eval()
    from peft import PeftModel, get_peft_model_state_dict

    assert found.base is not None
    assert found.adapter is not None
    base = _from_pretrained(found.base, dtype, device, found=found)
    numbers = ((name, p) for name, p in base.named_parameters() if not hasattr(p, "quant_state"))
    bad = [name for name, p in numbers if not torch.isfinite(p).all()]
    if bad:
        raise CheckpointError(f"{found.base}: {bad[0]}: expected finite values, got NaN or infinity; pass another copy")
    with one_line_errors(str(found.path)), quiet():
        model = PeftModel.from_pretrained(
            base, str(found.directory), adapter_name=found.adapter, is_trainable=True, torch_device=str(device)
        )
    if dtype == torch.bfloat16 and read_dtypes(found.files) == {dtype}:
        for parameter in model.parameters():  # peft made float32 of what was trained in bfloat16
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    state = get_peft_model_state_dict(model, adapter_name=found.adapter, save_embedding_layers=False)
    check_loaded(found.files, state, all_names=True)
    return model.eval()


def _from_pretrained(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    complete: bool = False,
    found: _Examination | None = None,
) -> Any:
    """A causal language model whose every parameter came from the files; on ``meta`` without their values.

    ``complete`` also refuses tensors of the files that the model does not use. Only the base model of the adapter
    ``found`` may be quantised.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    with one_line_errors(name), quiet():
        recorded = getattr(AutoConfig.from_pretrained(name, trust_remote_code=False), "quantization_config", None)
        if recorded is not None and found is None:
            raise CheckpointError(f"{name}: not supported: quantised weights; pass unquantised ones")
        quantization = quantization_of(name, recorded, found.quantization) if found else None
        if found:
            refuse_unmentioned(found.directory, quantization)
        model, info = factory.from_pretrained(
            name,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **load_arguments(name, quantization, recorded is not None, dtype),
        )
    wrong = ("missing_keys", "mismatched_keys", *(("unexpected_keys",) if complete else ()))
    for what in wrong:
        if info[what]:
            shown = sorted(map(str, info[what]))
            raise CheckpointError(
                f"{name}: expected weights for exactly the model of config.json, got {len(shown)} "
                f"{what.replace('_', ' ')} {shown[:2]}; pass intact weights with their own configuration"
            )
    if quantization is not None:
        set_precision(model, dtype)
    return model


def _load_tokenizer(found: _Examination) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the checkpoint, else of the base model; None when neither directory has one."""
    base = found.base or (str(found.base_model) if found.base_model else None)
    for name in (str(found.path), base):
        if name is None:
            continue
        config = Path(name) / "tokenizer_config.json"
        if Path(name).is_dir() and not config.is_file():
            continue
        with one_line_errors(f"{name}: tokenizer"):
            return _tokenizer_class(config).from_pretrained(name, trust_remote_code=False)
    return None


def _tokenizer_class(config: Path) -> Any:
    """The class a tokenizer was saved from.

    ``AutoTokenizer`` goes by the ``model_type`` of a ``config.json`` in the same directory: it opened a generic
    tokenizer beside a Qwen2 model as Qwen2's, which splits the same text into other tokens.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    generic = ("PreTrainedTokenizerFast", "TokenizersBackend")
    if config.is_file() and read_json(config).get("tokenizer_class") in generic:
        return PreTrainedTokenizerFast
    return AutoTokenizer
