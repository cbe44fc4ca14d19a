"""An optimizer of a user's own."""

import torch
from torch import optim


class Lion(optim.Optimizer):
    """A class of a user's own, with a plain attribute."""

    def __init__(self, params, lr=1e-3, scale=2.0):
        super().__init__(params, {"lr": lr})
        self.scale = scale

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                moment = self.state[p].setdefault("moment", torch.zeros_like(p))
                p.sub_(torch.sign(0.9 * moment + 0.1 * p.grad), alpha=self.scale * group["lr"])
                moment.mul_(0.99).add_(p.grad, alpha=0.01)
