"""Next-token logits of growing sequences: by the model's own cache, or by calling it anew on all tokens.

No cache is believed: its class says neither whether rows can be selected rightly (mixed layers inherit a method that
moves the keys and leaves the recurrent states), nor whether states run over left padding, nor whether the model reads
it at all. :data:`WAYS` are tried on a few sequences, in this order, and the first that agrees with plain calls is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

FAULTS = (AttributeError, TypeError, ValueError, LookupError, RuntimeError, AssertionError)
"""What foreign code raises where a model or a cache does not do what is asked of it."""


HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Way:
    """How a batch is decoded.

    Attributes:
        select: the cache's method that keeps, drops and repeats rows; ``None`` to do without a cache.
        pads: whether prompts of different lengths share a batch, padded on the left.
        masks: whether the attention mask is given with every token, or with the prompts only: Mamba, whose states know
            what was masked, would take its length for that of the new tokens.
    """

    select: str | None
    pads: bool
    masks: bool = True

    def __str__(self) -> str:
        if self.select is None:
            return "recomputing whole sequences at every token, which is slow"
        return "with the model's cache" + ("" if self.pads else " and prompts of one length to a batch")


# Mixed layers have both methods, the second wrong; MiniMax has both, the first wrong; most caches have either right.
WAYS = (
    Way("reorder_cache", pads=True),
    Way("batch_select_indices", pads=True),
    Way("reorder_cache", pads=True, masks=False),
    Way("reorder_cache", pads=False),
    Way("batch_select_indices", pads=False),
    Way("reorder_cache", pads=False, masks=False),
    Way(None, pads=False),
)


class ModelCall:
    """A causal language model, called with what its signature has.

    Args:
        model: of transformers, or a PEFT model around one.
    """

    def __init__(self, model: Any) -> None:
        get_base_model = getattr(model, "get_base_model", None)
        base: Any = get_base_model() if callable(get_base_model) else model
        self.model = model
        self._takes = frozenset(inspect.signature(base.forward).parameters)
        # `cache` since transformers 5.24, `past_key_values` before it, `cache_params` in the state-space models of old
        self.cache_name = next((n for n in ("cache", "past_key_values", "cache_params") if n in self._takes), None)

    @property
    def half(self) -> bool:
        """Whether anything in it is held or computed in half precision, as by layers with 4-bit weights."""
        held = (x.dtype for x in self.model.parameters())
        return any(dtype in HALF for dtype in (*held, *(getattr(m, "compute_dtype", 0) for m in self.model.modules())))

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return self.model.device

    def __call__(self, input_ids: Int[Tensor, "n l"], keep: int, **more: Any) -> Any:
        """The model's output; its logits are of the last ``keep`` tokens if it can leave the others out.

        ``more`` is given where the signature has the name.
        """
        more["logits_to_keep"] = keep
        return self.model(input_ids=input_ids, **{name: x for name, x in more.items() if name in self._takes})


class Decoding:
    """A batch on its way.

    Attributes:
        logits: of the next token, ``[n, V]``.

    Args:
        call: the model.
        prompts: the tokens of each sequence so far, of one length unless ``way.pads``. With a cache, equal ones are
            computed once.
        way: how.

    Raises:
        TypeError: if there is no cache to decode with.
    """

    logits: Float[Tensor, "n V"]

    def __init__(self, call: ModelCall, prompts: Sequence[tuple[int, ...]], way: Way) -> None:
        self._call, self._way, self._cache = call, way, None
        distinct = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
        length = max(map(len, distinct))
        self._ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in distinct], device=call.device)
        lengths = torch.tensor([len(p) for p in distinct], device=call.device)
        self._mask = (torch.arange(length, device=call.device) >= length - lengths[:, None]).long()
        if way.select is not None and call.cache_name is None:
            raise TypeError("its forward takes no cache")
        self._forward(self._ids, (self._mask.cumsum(1) - 1).clamp(min=0))
        if len(distinct) < len(prompts):
            self.select(torch.tensor([distinct[p] for p in prompts], device=call.device))

    def select(self, rows: Int[Tensor, " m"]) -> None:
        """Keep, drop or repeat sequences."""
        self.logits, self._mask, self._ids = self.logits[rows], self._mask[rows], self._ids[rows]
        if self._way.select is not None:
            getattr(self._cache, self._way.select)(rows)

    def advance(self, tokens: Int[Tensor, " n"]) -> None:
        """Append a token to every sequence."""
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        if self._way.select is None:
            self._ids = torch.cat([self._ids, tokens[:, None]], 1)
            self._forward(self._ids, None)
        else:
            self._ids = tokens[:, None]
            self._forward(self._ids, self._mask.sum(1, keepdim=True) - 1)

    def _forward(self, input_ids: Tensor, position_ids: Tensor | None) -> None:
        if self._way.select is None:
            output = self._call(input_ids, 1, attention_mask=self._mask, use_cache=False)
        else:
            name = self._call.cache_name
            assert name is not None
            # on the first call the model makes a cache of the class that it needs
            given = {} if self._cache is None else {name: self._cache}
            if self._cache is None or self._way.masks:
                given["attention_mask"] = self._mask
            output = self._call(input_ids, 1, position_ids=position_ids, use_cache=True, **given)
            if self._cache is None:
                self._cache = getattr(output, name, None)
            if self._cache is None:
                raise TypeError("it returns no cache")
        self.logits = output.logits[:, -1]


@torch.no_grad()
def plain_logprobs(
    call: ModelCall, prompt: Sequence[int], response: Sequence[int], temperature: float, most: int
) -> tuple[Float[Tensor, " t"], torch.dtype]:
    """Log-probabilities of a response's last tokens as the scorer has them: one call on the sequence alone, no cache.

    Returns:
        Those of the last ``min(most, len(response))`` tokens, in nats, and the type that the model gives logits in.
    """
    keep = min(most, len(response))
    ids = torch.tensor([[*prompt, *response]], device=call.device)
    logits = call(ids, keep + 1, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -keep - 1 : -1]
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
    return log_p.gather(-1, ids[0, -keep:, None])[:, 0], logits.dtype
