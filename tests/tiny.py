"""Tiny policies and tiny real training runs for tests, all on the CPU and without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from entropy_probe.demo.policy import Architecture, build_model, build_tokenizer
from entropy_probe.demo.train import CPU_ARGUMENTS, LORA_TARGETS, quiet_single_thread


def tiny_policy(architecture: Architecture = "qwen2", *, initializer_range: float = 0.2, **config: Any):
    """A random model whose next-token distributions are far from uniform, and its tokenizer."""
    return build_model(architecture, initializer_range=initializer_range, **config), build_tokenizer()


def train_grpo(
    directory: Path,
    *,
    lora: bool,
    architecture: Architecture = "qwen2",
    tie_word_embeddings: bool = False,
    steps: int = 3,
    save_steps: int = 1,
    capture: dict[int, dict[str, torch.Tensor]] | None = None,
    optim: str = "adamw_torch",
    lora_targets: list[str] | None = None,
    adapter: dict[str, Any] | None = None,
    prepare: str | None = None,
    optimizer: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    **overrides: Any,
) -> Path:
    """Train a tiny random policy with TRL's GRPO and return the last checkpoint, ``checkpoint-{steps}``.

    The base model and tokenizer are saved in ``directory/base``. ``capture[k]`` receives the clipped
    gradients of optimizer step ``k`` (1-based: from ``checkpoint-{k-1}`` to ``checkpoint-{k}``) by the names
    of the trained model's ``named_parameters()``. ``overrides`` go to ``GRPOConfig``, ``adapter`` to ``LoraConfig``;
    ``prepare`` and ``quantization`` change the model (:func:`_prepared`, ``BitsAndBytesConfig``), ``optimizer`` makes
    an AdamW of one's own (a pair in ``lr`` gives the Trainer's two groups their rates).
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    with quiet_single_thread():
        model, tokenizer = tiny_policy(architecture, tie_word_embeddings=tie_word_embeddings)
        base = directory / "base"
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        if quantization is not None:
            model = _quantised(base, quantization)
        model.name_or_path = str(base)
        if prepare is not None:
            model = _prepared(model, prepare)
        arguments = {
            "max_steps": steps,
            "save_steps": save_steps,
            "optim": optim,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 8,
            "learning_rate": 1e-3,
            "seed": 0,
        }
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=_odd_tokens,
            args=GRPOConfig(str(directory), **(CPU_ARGUMENTS | arguments | overrides)),
            train_dataset=Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(10) for b in range(10)]),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                **({"r": 4, "lora_alpha": 8, "target_modules": lora_targets or LORA_TARGETS} | (adapter or {}))
            )
            if lora
            else None,
            callbacks=[*callbacks, *([] if capture is None else [_capture_gradients(capture)])],
        )
        trainer.remove_callback(PrinterCallback)
        if optimizer is not None:
            _replace_optimizer(trainer, **optimizer)
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    return directory / f"checkpoint-{steps}"


def _quantised(base: Path, settings: dict[str, Any]):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"}
    )


def _prepared(model: Any, how: str) -> Any:
    """``bfloat16``: weights in that; ``frozen``: the first layer and the embeddings do not train; ``adapter``: one that
    exists before training; ``adapters``: two of one shape, of which ``policy`` trains.
    """
    from peft import LoraConfig, get_peft_model

    if how == "bfloat16":
        return model.bfloat16()
    if how == "frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.0" not in name and "embed" not in name)
        return model
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    if how == "adapter":
        return get_peft_model(model, config)
    wrapped = get_peft_model(model, config, adapter_name="other")
    wrapped.add_adapter("policy", config)
    wrapped.set_adapter("policy")
    return wrapped


def _replace_optimizer(trainer: Any, lr: Any = 1e-3, **options: Any) -> None:
    """Before training: an AdamW over the Trainer's own two groups."""
    decay = trainer.get_decay_parameter_names(trainer.model)
    named = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
    groups = [[p for n, p in named if n in decay], [p for n, p in named if n not in decay]]
    rates = lr if isinstance(lr, tuple) else (lr, lr)
    trainer.optimizer = torch.optim.AdamW(
        [
            {"params": g, "lr": rate, "weight_decay": d}
            for g, rate, d in zip(groups, rates, (trainer.args.weight_decay, 0.0), strict=True)
        ],
        **options,
    )


def _odd_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs within a group: the share of odd token ids."""
    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]


def _capture_gradients(into: dict[int, dict[str, torch.Tensor]]):
    from transformers import TrainerCallback

    class Capture(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            into[state.global_step + 1] = {
                name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None
            }

    return Capture()
