"""How a policy is called agrees with the whole model on each sequence alone, or the policy is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    FalconConfig,
    FalconForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.gradients.per_sample import cluster_backward
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.isolation import evaluating
from entropy_probe.scoring.packing import row_tokens, shared_groups
from entropy_probe.types import TokenCoefficients
from tests.tiny import tiny_policy

VOCABULARY, PROMPT, RESPONSE = 32, 18, 10
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def batch(seed: int = 0, prompts: int = 3, group: int = 4, invoked: bool = False) -> Rollouts:
    """Left-padded prompts with responses of 3 to 10 tokens; the shortest sequence has neither a long prompt."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randint(5, VOCABULARY, (prompts, PROMPT), generator=g).repeat_interleave(group, 0)
    if invoked:
        shared[:, -3] = 4
    ids = torch.cat([shared, torch.randint(5, VOCABULARY, (prompts * group, RESPONSE), generator=g)], 1)
    lengths = torch.randint(3, RESPONSE + 1, (prompts * group,), generator=g)
    lengths[:3] = torch.tensor([3, 3, RESPONSE])
    left = torch.randint(0, 4, (prompts,), generator=g).repeat_interleave(group)
    column = torch.arange(PROMPT + RESPONSE)
    attention = (column >= left[:, None]) & (column < PROMPT + lengths[:, None])
    return Rollouts(
        ids,
        attention,
        attention & (column >= PROMPT),
        torch.arange(prompts).repeat_interleave(group),
        advantages=torch.randn(prompts * group, generator=g),
    )


def compare(model: nn.Module, rollouts: Rollouts, max_tokens: int = 300) -> Scorer:
    """Scores and a gradient against the whole model called on one sequence after the other."""
    scorer = Scorer(model, 0.9, max_tokens)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    g = torch.Generator().manual_seed(3)
    weights = torch.randn(rollouts.input_ids.shape, dtype=torch.float64, generator=g)
    with evaluating(model):
        scorer.prepare(rollouts)
        scores = scorer.score(rollouts)
        rows = torch.arange(len(rollouts))
        (got,) = cluster_backward(scorer, trained, rollouts, rows, [TokenCoefficients(weights, weights)])
        total = torch.zeros((), dtype=torch.float64)
        for row in rows:
            real, response = rollouts.attention_mask[row], rollouts.response_mask[row]
            ids = rollouts.input_ids[row, real][None]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
            log_p = (logits / 0.9).log_softmax(-1)[response[real][1:]]
            s = log_p.gather(-1, rollouts.input_ids[row, response][:, None])[:, 0]
            h = -(log_p.exp() * log_p).sum(-1)
            torch.testing.assert_close(scores.logprobs[row, response], s.detach(), rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(scores.entropies[row, response], h.detach(), rtol=1e-4, atol=2e-5)
            total = total + ((s + h).double() * weights[row, response]).sum()
        expected = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    for (name, p), e in zip(trained.items(), expected, strict=True):
        a, b = (torch.zeros_like(p) if x is None else x for x in (got.get(name), e))
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-5, name
    return scorer


class Plain(nn.Module):
    """A causal mean of embeddings; ``change`` is what a kind of model does differently."""

    def __init__(self, change: Callable[..., torch.Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, VOCABULARY)
        self.change = change
        self.longest = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        x = self.embed(input_ids) * attention_mask[..., None]
        x = x.cumsum(1) / attention_mask.cumsum(1).clamp(min=1)[..., None]
        x = x + torch.tanh(self.inner(x))
        if self.change:
            x = self.change(self, x, attention_mask)
        return SimpleNamespace(logits=self.out(3 * x))


def by_neighbours(self: Plain, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0, keepdim=True) * (len(x) - 1) / len(x)


def by_padding(self: Plain, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x * (1 + 0.1 * (1 - mask.float().mean()))


def alone_only(self: Plain, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if len(x) > 1:
        raise NotImplementedError("one sequence at a time, please")
    return x


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (by_neighbours, "scores of a sequence change by"),
        (by_padding, "scores of a sequence change by"),
        (alone_only, "NotImplementedError: one sequence at a time, please"),
    ],
)
def test_sequences_that_change_each_other_get_calls_of_their_own(change, why):
    scorer = compare(Plain(change), batch())
    assert scorer.prefix_sharing.startswith(f"off (one sequence per call: {why}")
    assert [len(b.rows) for b in scorer.microbatches(batch())] == [1] * 12
    assert compare(Plain(), batch()).prefix_sharing == "off (the model's logits are computed as a whole)"


def looking_ahead(self: Plain, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x + 0.1 * x[:, -1:]


def by_history(self: Plain, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    self.longest = max(self.longest, x.shape[1])
    return x * (1 + 0.01 * self.longest)


def writing(self: Plain, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        self.inner.bias.mul_(1.0 if self.longest else 0.5)
    self.longest = 1
    return x


def broken(self: Plain, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel\nfor this device")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (looking_ahead, r"do not depend on later ones, but those of sequence \d+ change by .* Plain looks ahead"),
        (by_history, "do not depend on earlier calls, but scores of a sequence change by .* once Plain was called"),
        (writing, "leaves parameters as they are, but that of Plain changes inner.bias"),
        (broken, "to differentiate, but Plain raises RuntimeError: no kernel for this device"),
    ],
)
def test_what_is_no_policy_is_refused_by_name(change, why):
    model = Plain(change)
    with pytest.raises(ValueError, match=why), evaluating(model):
        Scorer(model, 1.0, 300).prepare(batch())


def test_weights_divided_for_inference_are_not_those_that_are_trained():
    """RWKV divides them in place when it is evaluated, and gradients would be twice as large."""
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, rescale_every=1))
    rows, trained = batch(), [p.detach().clone() for p in model.parameters()]
    model.eval()(input_ids=rows.input_ids)
    with pytest.raises(ValueError, match="got those that RwkvModel divided when it was evaluated"), evaluating(model):
        Scorer(model, 1.0, 300).prepare(rows)
    model.train()(input_ids=rows.input_ids)
    with evaluating(model):
        Scorer(model, 1.0, 300).prepare(rows)
    assert all(torch.equal(p, before) for p, before in zip(model.parameters(), trained, strict=True))
    assert not model.rwkv.layers_are_rescaled


def test_bidirectional_attention_is_refused():
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(**TOKENS, **SIZES, initializer_range=0.2))
    with pytest.raises(ValueError, match="BertLMHeadModel looks ahead"), evaluating(model):
        Scorer(model, 1.0, 300).prepare(batch())


def test_a_window_counts_in_the_row_that_is_used():
    """Every sequence fits the window by itself, and so do the two shortest in one row."""
    torch.manual_seed(0)
    kinds: Any = [[["local"], 2]]
    model = GPTNeoForCausalLM(
        GPTNeoConfig(
            **TOKENS, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, window_size=PROMPT + RESPONSE,
            max_position_embeddings=128, attention_types=kinds, initializer_range=0.2,
        )
    )  # fmt: skip
    assert compare(model, batch()).prefix_sharing.startswith(
        "off (the model treats a shared prompt differently: scores"
    )
    for layer in model.transformer.h:
        layer.attn.attention.bias.copy_(torch.ones_like(layer.attn.attention.bias).tril())
    assert compare(model, batch()).prefix_sharing == "on"


@pytest.mark.parametrize("alibi", [True, False])
def test_a_model_that_takes_no_mask_of_four_dimensions_has_its_rows_unshared(alibi):
    torch.manual_seed(0)
    config = FalconConfig(
        **TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=alibi, multi_query=False,
        initializer_range=0.2,
    )  # fmt: skip
    sharing = compare(FalconForCausalLM(config), batch()).prefix_sharing
    assert sharing == "on" if not alibi else "differently: ValueError: " in sharing, sharing


@pytest.mark.parametrize(("original", "outcome"), [(10, "on"), (30, "alone"), (24, "refused"), (100, "on")])
def test_rotary_factors_that_switch_with_the_length(original, outcome):
    """All sequences on one side; padding alone crosses over; a sequence crosses over while it is sampled."""
    torch.manual_seed(0)
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 1.5]}
    sizes = {"original_max_position_embeddings": original}
    rope: dict[str, Any] = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **factors, **sizes}}
    if not hasattr(Phi3Config(), "rope_parameters"):  # transformers 4
        rope = {"rope_scaling": {"type": "longrope", **factors}}
    config = Phi3Config(**TOKENS, **SIZES, num_key_value_heads=2, max_position_embeddings=128, sliding_window=None,
                        initializer_range=0.3, **sizes, **rope)  # fmt: skip
    model = Phi3ForCausalLM(config)
    before = [(id(b), b.clone()) for b in model.buffers()]
    if outcome == "refused":
        with pytest.raises(ValueError, match="Phi3ForCausalLM looks ahead, or changes with the length"):
            compare(model, batch())
    else:
        sharing = compare(model, batch()).prefix_sharing
        assert sharing == "on" if outcome == "on" else sharing.startswith("off (one sequence per call")
    assert all(i == id(b) and torch.equal(b, x) for (i, x), b in zip(before, model.buffers(), strict=True))


class Outer(nn.Module):
    """Lets an adapter of the model act from a token on, which only this module's forward tells it; it starts at 0."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.down, self.up = model, nn.Linear(64, 2), nn.Linear(2, 64)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.active: torch.Tensor | None = None
        model.model.norm.register_forward_hook(self.adapt)
        self.config, self.base_model = model.config, model.model
        for p in model.parameters():
            p.requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def adapt(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out if self.active is None else out + self.active[..., None] * self.up(self.down(out))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self.active = ((input_ids == 4).cumsum(1) > 0).float()
        try:
            return self.model(input_ids=input_ids, attention_mask=attention_mask)
        finally:
            self.active = None


@pytest.mark.parametrize("trained", [False, True])
def test_an_adapter_of_the_outer_model_keeps_its_gradient(trained):
    """At 0 it changes no score, so only the gradient shows that the trunk leaves it out."""
    model = Outer(tiny_policy()[0])
    if trained:
        nn.init.normal_(model.up.weight, std=0.1)
    scorer = compare(model, batch(invoked=True))
    why = "scores of a sequence change" if trained else "the gradient of up.bias changes by 100.0%"
    assert scorer.head_path.startswith(f"logits (through trunk and output layer alone {why}")


def test_no_row_is_longer_than_the_models_context():
    rollouts, rows = batch(), torch.arange(12)
    free, _ = shared_groups(rollouts, rows, 64, 8192)
    held, _ = shared_groups(rollouts, rows, 64, 8192, context=30)
    assert max(row_tokens(rollouts, row) for row in free) > 30
    assert 20 < max(row_tokens(rollouts, row) for row in held) <= 30
    assert sorted(torch.cat(held).tolist()) == rows.tolist()


def trained_adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, g = torch.optim.AdamW(trained, lr=1e-4), torch.Generator().manual_seed(1)
    for _ in range(2):
        for p in trained:
            p.grad = 0.1 * torch.randn(p.shape, generator=g)
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def shared_layer() -> nn.Module:
    model = Plain(lambda self, x, mask: x + torch.tanh(self.second(x)))
    model.second = model.inner
    return model


def parametrized() -> nn.Module:
    model = Plain().train()
    nn.utils.parametrizations.spectral_norm(model.inner)
    nn.utils.parametrizations.weight_norm(model.out)
    return model


@pytest.mark.parametrize("make", [shared_layer, parametrized])
def test_parameters_and_buffers_are_the_same_objects_after_everything(make):
    model = make()
    optimizer = trained_adamw(model)
    model(input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 3, dtype=torch.long))
    held = [(module._parameters, module._buffers) for module in model.modules()]
    before = [[(name, id(x), None if x is None else x.detach().clone()) for kind in pair for name, x in kind.items()]
              for pair in held]  # fmt: skip
    probe = EntropyProbe(model, optimizer, ProbeConfig(measure_noise_floor=False, horizon=None))
    update, evaluation = batch(1), batch(2)
    probe.attribute(update=update, evaluation=evaluation)
    sweep = probe.sweep(update=update, evaluation=evaluation, learning_rates=[1e-5, 1e-4], direct_curvature=True)
    for pair, values in zip(held, before, strict=True):
        now = [(name, x) for kind in pair for name, x in kind.items()]
        for (name, x), (same, identity, value) in zip(now, values, strict=True):
            assert (name, id(x)) == (same, identity)
            assert x is None or torch.equal(x, value), name
    expected = probe.run(update=update, evaluation=evaluation)
    rate = {point.learning_rate: point.realized.value for point in sweep.points}[1e-4]
    assert rate == pytest.approx(expected.realized.value, rel=1e-6)


def test_what_a_forward_pass_binds_anew_is_put_back():
    """As rotary embeddings that grow do: a buffer registered again, an attribute set, one that was not there."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("table", torch.arange(3.0))
            self.known = 3

        def forward(self, n: int) -> None:
            self.register_buffer("table", torch.arange(float(n)))
            self.known, self.seen = n, True

    model = Growing()
    table = model.table
    with evaluating(model):
        model(5)
        assert (model.known, len(model.table)) == (5, 5)
    assert model.table is table
    assert model.known == 3
    assert not hasattr(model, "seen")
