"""A model with every kind of layer, some of which no formula knows."""

from types import SimpleNamespace

import torch
from torch import nn

VOCABULARY = 12


class Scale(nn.Module):
    """No layer that anyone knows: a gain per feature, a bias per position modulo two, and a keyword argument."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.steps = nn.Parameter(torch.zeros(2, width))

    def forward(self, hidden, *, mask):
        odd = torch.arange(hidden.shape[1]) % 2
        return torch.sin(hidden * self.gain) * mask[..., None] + self.steps[odd]


class ShiftedRMSNorm(nn.Module):
    """As Gemma has it: the weight is an offset from one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return (1 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class OddRMSNorm(nn.RMSNorm):
    """Named like a norm, but its weight acts squared."""

    def forward(self, x):
        return super().forward(x) * self.weight


class Mixed(nn.Module):
    """A causal model of every kind of layer, in a plain module."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.first_norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 3)
        self.heads = nn.Linear(width // 2, width // 2)
        self.act = nn.LeakyReLU(inplace=True)
        self.head_norm = ShiftedRMSNorm(width // 2)
        self.scale = Scale(width)
        self.norm = OddRMSNorm(width)
        self.out = nn.Linear(width, VOCABULARY)
        g = torch.Generator().manual_seed(3)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.to(self.out.weight.dtype)
        x = self.first_norm(self.embed(input_ids)) * mask[..., None]
        x = x + self.conv(nn.functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
        x = x.cumsum(1) / mask.cumsum(1).clamp(min=1)[..., None]
        heads = self.head_norm(self.act(self.heads(x.unflatten(-1, (2, -1)))))
        return SimpleNamespace(logits=self.out(self.norm(self.scale(heads.flatten(-2), mask=mask))))
