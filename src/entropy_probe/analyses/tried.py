"""What was tried on earlier batches of the same policy, so that a live run need not try it at every step.

How a model may be called and how gradients are read off its layers depends on its code and on the lengths of what it is
called on, and not on the values of its parameters.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from entropy_probe.gradients.hooks import Hooks
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.calls import Layout
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.layout import Reach

_TRAINED: WeakKeyDictionary[nn.Module, Tried] = WeakKeyDictionary()


@dataclass(eq=False)
class Tried:
    """What held for a model on the batches that it was tried on; empty at first.

    Attributes:
        state: what may change how the model has to be called.
        reach: the lengths that were tried.
        layout: how it is called.
        hooks: how gradients are read off its layers, or why they are not; ``None`` where that was not asked.
    """

    state: Hashable = None
    reach: Reach | None = None
    layout: Layout | None = None
    hooks: Hooks | str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Tried:
        """What is known of a model that is being trained: a step changes its values, and not how it may be called."""
        return _TRAINED.setdefault(model, cls())

    def prepare(self, scorer: Scorer, batches: Sequence[Rollouts]) -> None:
        """Prepare a scorer for batches, by what is known if that holds for them; see :meth:`Scorer.prepare`."""
        state, reach = _state(scorer), Reach.of(scorer, batches)
        if self.layout is not None and self.reach is not None and state == self.state and self.reach.covers(reach):
            for batch in batches:
                scorer.check_fits(batch)
            scorer.layout = self.layout
            return
        scorer.prepare(*batches)
        if self.reach is not None and state == self.state and scorer.layout == self.layout:
            reach = self.reach.joined(reach)
        self.state, self.reach, self.layout, self.hooks = state, reach, scorer.layout, None

    def keep(self, model: nn.Module, hooks: Hooks | str) -> None:
        """Remember how gradients are read, but from the model itself, which this must not keep alive."""
        if isinstance(hooks, str) or model not in hooks.layers:
            self.hooks = hooks


def _state(scorer: Scorer) -> Hashable:
    """What a model is called through: its modules and their hooks, and which parameters of what kind it trains."""
    model, device = scorer.model, scorer.device.type
    modules = [(id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    parameters = [(name, p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()]
    return (
        tuple(modules),
        tuple(parameters),
        str(getattr(model, "active_adapters", None)),
        getattr(getattr(model, "config", None), "_attn_implementation", None),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        scorer.temperature,
        scorer.max_tokens,
    )
