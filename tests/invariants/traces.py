"""Everything about a model and its optimizer that a probe must leave as it was, bitwise."""

import numpy as np
import torch
from torch import nn

from entropy_probe.scoring.isolation import _precision_switches
from tests.reference.enumeration import TinyPolicy


class WithState(TinyPolicy):
    """A policy with dropout, a buffer, and a mixture of train and eval flags."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("count", torch.tensor(3.0))

    def forward(self, input_ids, attention_mask):  # type: ignore[no-untyped-def]
        self.dropout(torch.ones(3))
        self.count += 1
        return super().forward(input_ids, attention_mask)


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    tensors = {f"p.{n}": p for n, p in model.named_parameters()} | {f"b.{n}": b for n, b in model.named_buffers()}
    out: dict[str, object] = {n: (t.detach().clone(), t.data_ptr()) for n, t in tensors.items()}
    out |= {f"grad.{n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    out |= {f"flag.{n}": p.requires_grad for n, p in model.named_parameters()}
    out |= {f"mode.{n}": m.training for n, m in model.named_modules()}
    out |= {f"hooks.{n}": len(m._forward_hooks) for n, m in model.named_modules()}
    for i, (p, s) in enumerate(optimizer.state.items()):
        out |= {f"o.{i}.{k}": (v.clone() if isinstance(v, torch.Tensor) else v, id(p)) for k, v in s.items()}
    out["groups"] = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    out["rng"] = (torch.get_rng_state(), np.random.get_state()[1].copy())  # noqa: NPY002
    out["precision"] = [switch.fp32_precision for switch in _precision_switches()]
    return out


def assert_same(a: object, b: object, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor), where
        assert torch.equal(a, b), where
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict), where
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):  # type: ignore[arg-type]
            assert_same(x, y, where)
    else:
        assert a == b, where
