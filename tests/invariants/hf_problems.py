"""Batches and small Hugging Face models, with and without LoRA."""

import torch
from peft import LoraConfig, get_peft_model

from entropy_probe import Rollouts
from tests.tiny import tiny_policy


def rollouts(n: int = 24, seed: int = 0, group: int = 4) -> Rollouts:
    """Random prompts and responses of varied length, left-padded prompts and right-padded responses, as trainers do."""
    g = torch.Generator().manual_seed(seed)
    prompt, response = 6, 9
    ids = torch.randint(3, 12, (n, prompt + response), generator=g)
    column = torch.arange(prompt + response)
    prompts = torch.randint(2, prompt + 1, (n // group, 1), generator=g).repeat_interleave(group, 0)
    responses = torch.randint(1, response + 1, (n, 1), generator=g)
    attention = (column >= prompt - prompts) & (column < prompt + responses)
    answers = attention & (column >= prompt)
    return Rollouts(ids, attention, answers, torch.arange(n // group).repeat_interleave(group),
                    advantages=torch.randn(n, generator=g))  # fmt: skip


def policy(kind: str, architecture: str = "qwen2", rank: int = 4, **config):
    model, _ = tiny_policy(architecture, **config)
    if kind == "lora":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.05)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.01)
    g = torch.Generator().manual_seed(1)
    saved = [p.detach().clone() for p in trainable]
    for _ in range(2):
        for p in trainable:
            p.grad = 1e-2 * torch.randn(p.shape, generator=g)
        optimizer.step()
    for p, value in zip(trainable, saved, strict=True):
        p.data.copy_(value)
        p.grad = None
    return model, optimizer


KINDS = [("lora", {}), ("full", {}), ("full", {"tie_word_embeddings": True})]


IDS = ["lora", "full", "full-tied"]


def long_prompts(n: int = 24, group: int = 4, gaps: bool = False) -> Rollouts:
    """Responses of 1 to 9 tokens to long prompts, shared by groups; left-padded, optionally with gaps."""
    g = torch.Generator().manual_seed(5)
    prompt, response = 40, 9
    ids = torch.randint(3, 12, (n, prompt + response), generator=g)
    ids[:, :prompt] = ids[:, :prompt].view(-1, group, prompt)[:, :1].expand(-1, group, prompt).reshape(n, prompt)
    column = torch.arange(prompt + response)
    left = torch.randint(0, 8, (n // group, 1), generator=g).repeat_interleave(group, 0)
    responses = torch.randint(1, response + 1, (n, 1), generator=g)
    attention = (column >= left) & (column < prompt + responses)
    answers = attention & (column >= prompt)
    if gaps:
        answers[:, prompt + 2] = False
    return Rollouts(ids, attention, answers, torch.arange(n // group).repeat_interleave(group),
                    advantages=torch.randn(n, generator=g))  # fmt: skip
