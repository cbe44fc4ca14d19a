"""The demo's training run: a supervised warm start in plain torch, then TRL's GRPO on a LoRA adapter.

The task is running totals: ``4+7+9=`` is answered by ``4,11,20``, and the reward is 1 for an exact match. The
warm start stops while the policy still makes mistakes, and its examples put a space after some commas. What
reinforcement learning does first is to drop the spaces, so each step lowers entropy by far more than the noise.
"""

from __future__ import annotations

import json
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from entropy_probe.demo.policy import EOS, build_model, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


logger = logging.getLogger(__name__)

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_COMPLETION_LENGTH = 32
STRAY_SPACES = 0.2
"""Share of commas that the warm start's examples follow with a space, which the reward does not accept."""
CPU_ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "lr_scheduler_type": "constant",
    "temperature": 1.0,
    "beta": 0.0,
    "max_grad_norm": 1.0,
    "loss_type": "dapo",
    "logging_steps": 1,
}
"""Arguments of ``GRPOConfig`` that make it fast and quiet on a CPU, and the update a plain DAPO step."""


def train_demo(
    directory: Path,
    *,
    warm_start_steps: int = 900,
    steps: int = 20,
    save_steps: int = 5,
    prompts_per_step: int = 16,
    generations_per_prompt: int = 8,
    learning_rate: float = 3e-4,
    num_prompts: int = 256,
    seed: int = 0,
    on_progress: Callable[[str], None] = logger.info,
    callbacks: Sequence[Any] = (),
    **arguments: Any,
) -> Path:
    """Train a tiny policy into ``directory`` and return the checkpoint to probe; at once if it exists.

    The directory then holds ``base/`` (the warm-started model and its tokenizer), ``prompts.jsonl`` (fields
    ``prompt`` and ``answer``) and TRL's ``checkpoint-N/`` (adapter, optimizer, trainer state). It is built
    under a temporary name beside its place and appears whole or not at all. Training runs on one torch thread
    and seeds the global random state; the adapter names its base model by absolute path.

    Args:
        directory: where to put it; absent, empty, or complete.
        warm_start_steps: supervised steps of 32 sequences.
        steps: GRPO steps.
        save_steps: steps between checkpoints; divides ``steps``.
        prompts_per_step: distinct prompts of one step.
        generations_per_prompt: responses sampled for each.
        learning_rate: of GRPO, constant.
        num_prompts: distinct prompts in ``prompts.jsonl``, on which GRPO trains.
        seed: seed of the data, the initial weights and the sampling.
        on_progress: called with one line of text per phase and per checkpoint.
        callbacks: of the trainer.
        **arguments: further ones of ``GRPOConfig``.

    Raises:
        ValueError: if ``save_steps`` does not divide ``steps``, or if the directory holds something else.
    """
    if steps % save_steps:
        raise ValueError(f"save_steps: expected a divisor of steps = {steps}, got {save_steps}; change one of them")
    directory = Path(directory).resolve()
    checkpoint = directory / f"checkpoint-{steps}"
    if (checkpoint / "trainer_state.json").is_file():
        return checkpoint
    with built_beside(directory, f"a demo with {checkpoint.name}") as building, quiet_single_thread():
        problems = _problems(random.Random(f"prompts {seed}"), num_prompts)
        on_progress(f"demo: supervised warm start, {warm_start_steps} steps")
        model, tokenizer = _base_model(building / "base", warm_start_steps, seed)
        model.name_or_path = str(directory / "base")  # where the adapter will look for it
        lines = (json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in problems)
        (building / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        on_progress(f"demo: GRPO, {steps} steps of {prompts_per_step} x {generations_per_prompt} responses")
        arguments |= {
            "max_steps": steps,
            "save_steps": save_steps,
            "per_device_train_batch_size": prompts_per_step * generations_per_prompt,
            "num_generations": generations_per_prompt,
            "learning_rate": learning_rate,
            "max_completion_length": MAX_COMPLETION_LENGTH,
            "seed": seed,
        }
        records = [{"prompt": prompt, "answer": answer} for prompt, answer in problems]
        reinforce(building, model, tokenizer, records, _exact_match, arguments, on_progress, save_steps, callbacks)
    return checkpoint


@contextmanager
def built_beside(directory: Path, what: str) -> Iterator[Path]:
    """A temporary name beside a directory's place, from which it moves there whole if no error is raised.

    Raises:
        ValueError: if anything but an empty directory is there already, instead of ``what``.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(
            f"{directory}: expected {what}, or nothing, got something else; delete it or choose another directory"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
        building = Path(temporary) / directory.name
        yield building
        building.rename(directory)


def quiet_single_thread() -> AbstractContextManager[None]:
    """:func:`quiet` on one torch thread: two can be a hundred times slower on models as small as the tiny policy."""
    return quiet(1)


@contextmanager
def quiet(threads: int) -> Iterator[None]:
    """So many torch threads and no progress bars of transformers, both restored on leaving."""
    from transformers.utils import logging as transformers_logging

    before, bars = torch.get_num_threads(), transformers_logging.is_progress_bar_enabled()
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # TRL and peft still use the name that transformers 5.23 deprecates
            warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        torch.set_num_threads(before)
        if bars:
            transformers_logging.enable_progress_bar()


def _exact_match(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    return [float(completion == expected) for completion, expected in zip(completions, answer, strict=True)]


def _problems(source: random.Random, count: int, stray_spaces: float = 0.0) -> list[tuple[str, str]]:
    """``count`` distinct prompts of 2 to 6 digits, with their answers.

    With probability ``stray_spaces`` a comma of an answer is followed by a space.
    """
    problems: dict[str, str] = {}
    while len(problems) < count:
        digits = [source.randint(0, 9) for _ in range(source.randint(2, 6))]
        first, *rest = accumulate(digits)
        separated = (f"{', ' if source.random() < stray_spaces else ','}{total}" for total in rest)
        problems["+".join(map(str, digits)) + "="] = str(first) + "".join(separated)
    return list(problems.items())


def _base_model(directory: Path, warm_start_steps: int, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A warm-started model and its tokenizer, saved in ``directory``."""
    model, tokenizer = build_model(num_heads=2, initializer_range=0.05, seed=seed), build_tokenizer()
    _warm_start(model, tokenizer, warm_start_steps, random.Random(f"warm start {seed}"))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model, tokenizer


def _warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    source: random.Random,
    peak: float = 3e-3,
) -> None:
    """Maximum likelihood on fresh problems, 32 per step, with a warm-up and a linear decay to a tenth."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 50) * (1 - 0.9 * i / steps))
    for _ in range(steps):
        problems = _problems(source, 32, STRAY_SPACES)
        encoded = tokenizer(
            [prompt + answer + EOS for prompt, answer in problems],
            padding=True,
            return_tensors="pt",
        )
        labels = encoded["input_ids"].clone()
        for row, (_, answer) in zip(labels, problems, strict=True):
            row[: -len(answer) - 1] = -100  # one token per character, and padding is on the left
        optimizer.zero_grad()
        model(**encoded, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.zero_grad()
    model.eval()


def reinforce(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    records: list[dict[str, Any]],
    reward: Callable[..., list[float | None]],
    arguments: dict[str, Any],
    on_progress: Callable[[str], None],
    say_every: int,
    callbacks: Sequence[Any] = (),
) -> None:
    """Train a LoRA adapter on every linear layer with GRPO, writing checkpoints into ``directory``.

    Goes on from the last complete checkpoint that is there. ``records`` are rows of the data set, with ``prompt`` and
    what the reward asks for, which is called as by TRL. ``arguments`` are those of ``GRPOConfig`` besides or in place
    of :data:`CPU_ARGUMENTS`, ``callbacks`` the trainer's besides the one that calls ``on_progress`` with a line every
    ``say_every`` steps.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback, set_seed
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    class Progress(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            self.begun, self.done_before = time.monotonic(), state.global_step

        def on_log(self, args, state, control, logs, **_):
            if "reward" not in logs or state.global_step % say_every:
                return
            done, left = state.global_step - self.done_before, state.max_steps - state.global_step
            seconds = round((time.monotonic() - self.begun) / done * left)
            on_progress(
                f"demo: step {state.global_step} of {state.max_steps}, reward {logs['reward']:.2f}, "
                f"entropy {logs['entropy']:.4f} nats/token" + (f", {timedelta(seconds=seconds)} left" if left else "")
            )

    set_seed(arguments["seed"])  # not every version of TRL does before it draws the weights of the adapter
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(str(directory), **(CPU_ARGUMENTS | arguments)),
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"),
        callbacks=[Progress(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    last = max(complete_checkpoints(directory), default=None)
    if last is not None:
        on_progress(f"demo: goes on from checkpoint-{last}")
    with warnings.catch_warnings():
        # peft looks for the base model's vocabulary where the base model will be once all is complete
        warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)
        trainer.train(resume_from_checkpoint=None if last is None else str(directory / f"checkpoint-{last}"))


def complete_checkpoints(directory: Path) -> list[int]:
    """The steps of the checkpoints in a directory that were written to the end: the Trainer's own record comes last."""
    states = (path / "trainer_state.json" for path in directory.glob("checkpoint-*"))
    return sorted(int(state.parent.name.partition("-")[2]) for state in states if _is_json(state))


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return True
