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
    callbacks: Sequence[Any] = (),
    **overrides: Any,
) -> Path:
    """Train a tiny random policy with TRL's GRPO and return the last checkpoint, ``checkpoint-{steps}``.

    The base model and tokenizer are saved in ``directory/base``. ``capture[k]`` receives the clipped
    gradients of optimizer step ``k`` (1-based: from ``checkpoint-{k-1}`` to ``checkpoint-{k}``) by the names
    of the trained model's ``named_parameters()``. ``overrides`` go to ``GRPOConfig``.
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
        model.name_or_path = str(base)
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
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=lora_targets or LORA_TARGETS) if lora else None,
            callbacks=[*callbacks, *([] if capture is None else [_capture_gradients(capture)])],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return directory / f"checkpoint-{steps}"


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
