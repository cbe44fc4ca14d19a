"""Sampling from the full softmax with Hugging Face ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from entropy_probe.sampling.prompts import Prompt

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["Completion", "Progress", "encode_prompts", "generate_completions", "generate_from_tokens"]

Progress = Callable[[int, int], None]
"""Called with the sequences done and the sequences in all."""


@dataclass(frozen=True)
class Completion:
    """A prompt and a response sampled to it.

    Attributes:
        prompt_token_ids: the tokens of the prompt.
        token_ids: the response tokens, the first end-of-sequence token included and nothing after it.
        truncated: whether the response was cut off before an end-of-sequence token.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    truncated: bool


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, without padding.

    Text is tokenized with the tokenizer's default special tokens. Messages go through its chat template, with
    the generation prompt added.

    Raises:
        ValueError: if a prompt has messages and the tokenizer no chat template, or a prompt has no tokens.
    """
    return [_encode(tokenizer, prompt) for prompt in prompts]


def _encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    if isinstance(prompt.prompt, str):
        token_ids = tokenizer(prompt.prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise ValueError(
            f"prompt {prompt.id}: expected a tokenizer with a chat template for a prompt of messages, got "
            "none; set tokenizer.chat_template or give the prompt as text"
        )
    else:
        token_ids = tokenizer.apply_chat_template(
            [dict(message) for message in prompt.prompt],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"]
    if not token_ids:
        raise ValueError(f"prompt {prompt.id}: expected at least one token, got none from {prompt.prompt!r}")
    return list(token_ids)


def generate_completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    temperature: float,
    max_completion_length: int,
    batch_size: int,
    seed: int,
    progress: Progress | None = None,
) -> list[Completion]:
    """Encode each prompt and sample one response to it; see :func:`generate_from_tokens`.

    Returns:
        One completion per prompt, in the order of ``prompts``. Repeat a prompt to get several responses to it.

    Raises:
        ValueError: as of :func:`encode_prompts` and :func:`generate_from_tokens`.
    """
    return generate_from_tokens(
        model,
        tokenizer,
        encode_prompts(tokenizer, prompts),
        [prompt.id for prompt in prompts],
        temperature=temperature,
        max_completion_length=max_completion_length,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )


@torch.no_grad()
def generate_from_tokens(
    model: Any,
    tokenizer: Any,
    token_ids: Sequence[list[int]],
    prompt_ids: Sequence[int],
    *,
    temperature: float,
    max_completion_length: int,
    batch_size: int,
    seed: int,
    progress: Progress | None = None,
) -> list[Completion]:
    """Sample one response to each prompt from ``softmax(logits / temperature)`` over the full vocabulary.

    Nothing else shapes the distribution: no top-k, no top-p, no penalty, and none of the settings in the
    model's own generation config. A response ends with the first of the tokenizer's end token and the end
    tokens of that config, as in TRL. The model is in eval mode meanwhile; its generation config, its
    train/eval flags and the random state of the CPU and of the model's CUDA devices are left as found, also
    after an error. The same seed and batch size give the same responses.

    Args:
        model: a Hugging Face causal language model, or a PEFT model around one.
        tokenizer: its tokenizer, with a pad token and an end-of-sequence token.
        token_ids: the tokens of each prompt, without padding.
        prompt_ids: the id of each prompt, for messages.
        temperature: the sampling temperature, above 0.
        max_completion_length: the longest response, in tokens.
        batch_size: sequences generated at a time (sorted by length, left-padded).
        seed: of the random numbers.
        progress: called after each batch.

    Returns:
        One completion per prompt, in their order.

    Raises:
        ValueError: if the model cannot generate, the tokenizer lacks a token, a prompt does not fit the
            model's context, or the temperature or a length is not positive.
    """
    _check(model, tokenizer, temperature, max_completion_length, batch_size)
    _check_context(model, prompt_ids, token_ids, max_completion_length)

    eos_token_ids = _end_tokens(model, tokenizer)
    config = _full_softmax_config(tokenizer, temperature, max_completion_length, eos_token_ids)
    order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
    completions: dict[int, Completion] = {}
    with _sampling_mode(model, config, seed):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            sampled = _generate_batch(model, tokenizer.pad_token_id, [token_ids[i] for i in rows], config)
            for i, tokens in zip(rows, sampled, strict=True):
                completions[i] = _until_end(token_ids[i], tokens, eos_token_ids)
            if progress is not None:
                progress(len(completions), len(token_ids))
    return [completions[i] for i in range(len(token_ids))]


def _generate_batch(
    model: Any, pad_token_id: int, prompts: list[list[int]], config: GenerationConfig
) -> list[list[int]]:
    """The tokens after each prompt, as ``generate`` pads them."""
    length = max(map(len, prompts))
    input_ids = torch.tensor([[pad_token_id] * (length - len(p)) + p for p in prompts], device=model.device)
    lengths = torch.tensor([len(p) for p in prompts], device=model.device)
    attention_mask = (torch.arange(length, device=model.device) >= length - lengths[:, None]).long()
    output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
    return output[:, length:].tolist()


def _until_end(prompt: list[int], tokens: list[int], eos_token_ids: list[int]) -> Completion:
    """Cut at the first end token by position: the pad token may be the same token."""
    end = next((t for t, token in enumerate(tokens) if token in eos_token_ids), None)
    return Completion(tuple(prompt), tuple(tokens if end is None else tokens[: end + 1]), truncated=end is None)


def _full_softmax_config(
    tokenizer: Any, temperature: float, max_completion_length: int, eos_token_ids: list[int]
) -> GenerationConfig:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        temperature=float(temperature),
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_completion_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos_token_ids,
        pad_token_id=tokenizer.pad_token_id,
    )


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    of_model = getattr(model.generation_config, "eos_token_id", None)
    of_model = [] if of_model is None else [of_model] if isinstance(of_model, int) else list(of_model)
    return sorted({tokenizer.eos_token_id, *of_model})


@contextmanager
def _sampling_mode(model: Any, config: GenerationConfig, seed: int) -> Iterator[None]:
    """Eval mode, own random numbers, and ``config`` in place of every generation config inside the model.

    ``generate`` fills what a given config leaves unset from ``model.generation_config``, so that one is
    replaced too.
    """
    from transformers import GenerationConfig

    training = [(module, module.training) for module in model.modules()]
    own = [(m, vars(m)["generation_config"]) for m in model.modules() if "generation_config" in vars(m)]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        try:
            model.eval()
            for module, found in own:
                if isinstance(found, GenerationConfig):
                    module.generation_config = config
            torch.default_generator.manual_seed(seed)
            for index in cuda:
                torch.cuda.default_generators[index].manual_seed(seed)
            yield
        finally:
            for module, flag in training:
                module.training = flag
            for module, found in own:
                module.generation_config = found


def _check(model: Any, tokenizer: Any, temperature: float, max_completion_length: int, batch_size: int) -> None:
    if not callable(getattr(model, "generate", None)):
        raise ValueError(
            "model: expected a Hugging Face causal language model with generate, got "
            f"{type(model).__name__}; sample elsewhere and pass Rollouts"
        )
    for name, remedy in (
        ("pad_token", "for example tokenizer.pad_token = tokenizer.eos_token"),
        ("eos_token", ""),
    ):
        if getattr(tokenizer, f"{name}_id") is None:
            raise ValueError(f"tokenizer: expected a {name}, got none; set tokenizer.{name} {remedy}".rstrip())
    numbers = {
        "temperature": temperature,
        "max_completion_length": max_completion_length,
        "batch_size": batch_size,
    }
    for name, value in numbers.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a positive number, got {value}")


def _check_context(
    model: Any, prompt_ids: Sequence[int], token_ids: Sequence[list[int]], max_completion_length: int
) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for prompt, tokens in zip(prompt_ids, token_ids, strict=True):
        if limit is not None and len(tokens) + max_completion_length > limit:
            raise ValueError(
                f"prompt {prompt}: expected prompt and response within the model's context of {limit} "
                f"tokens, got {len(tokens)} + {max_completion_length}; drop the prompt or lower "
                "max_completion_length"
            )
