"""Gradients read off layers against one backward pass per unit."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from entropy_probe.gradients.cross import cross_products
from entropy_probe.gradients.hooks import Hooks, hookable
from entropy_probe.gradients.per_sample import Side, sample_gradients
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.isolation import evaluating
from entropy_probe.types import TokenCoefficients
from tests.gradients.layers import VOCABULARY, Mixed
from tests.tiny import tiny_policy

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def rollouts(groups: int = 4, group: int = 3, prompt: int = 30, response: int = 6) -> Rollouts:
    """Left-padded prompts, right-padded responses; prompts long enough to be shared."""
    g = torch.Generator().manual_seed(0)
    n = groups * group
    ids = torch.randint(1, VOCABULARY, (n, prompt + response), generator=g)
    ids[:, :prompt] = ids[::group, :prompt].repeat_interleave(group, 0)
    column = torch.arange(prompt + response)
    left = torch.randint(0, 6, (groups, 1), generator=g).repeat_interleave(group, 0)
    lengths = torch.randint(1, response + 1, (n, 1), generator=g)
    attention = (column >= left) & (column < prompt + lengths)
    ids[:, prompt - 2] = 0  # the padding token is also a token of every prompt
    return Rollouts(ids, attention, attention & (column >= prompt), torch.arange(groups).repeat_interleave(group))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def coefficients(batch: Rollouts, seed: int) -> TokenCoefficients:
    g = torch.Generator().manual_seed(seed)
    return TokenCoefficients(*(torch.randn(batch.input_ids.shape, generator=g, dtype=torch.float64) for _ in range(2)))


def check(model: nn.Module, batch: Rollouts, tolerance: float, max_tokens: int = 300) -> Hooks:
    """Every unit's gradient of every parameter by taps and by a backward pass per unit, in three forms."""
    parameters = trained(model)
    scorer = Scorer(model, 0.8, max_tokens)
    with evaluating(model):
        scorer.prepare(batch)
        hooks = hookable(scorer, parameters, batch)
        assert isinstance(hooks, Hooks), hooks
        g = torch.Generator().manual_seed(7)
        direction = {n: torch.randn(p.shape, generator=g).to(p.dtype) for n, p in parameters.items()}
        for clusters in (batch.prompt_ids, torch.arange(len(batch)), batch.prompt_ids // 2):
            sides = [Side(coefficients(batch, 1), [direction], True), Side(coefficients(batch, 2), [direction], True)]
            fast, slow = (sample_gradients(scorer, parameters, batch, clusters, sides, hooks=t) for t in (hooks, None))
            for a, b in zip(fast, slow, strict=True):
                start = 0
                for name, p in parameters.items():
                    own = slice(start, start := start + p.numel())
                    size = b.stored[:, own].norm()
                    assert (a.stored[:, own] - b.stored[:, own]).norm() <= tolerance * size, name
                    assert size > 0, name
                    assert (a.total[name] - b.total[name]).norm() <= 3 * tolerance * size, name
                assert (a.dots - b.dots).norm() <= tolerance * b.stored.norm() * start**0.5
                side = Side(coefficients(batch, 2), pair_with=torch.stack([fast[0].stored, fast[1].stored]))
                pairs = sample_gradients(scorer, parameters, batch, clusters, [side], hooks=hooks)
                for paired, other in zip(pairs[0].paired, fast, strict=True):
                    expected = (other.stored.double() * fast[1].stored.double()).sum(1)
                    assert (paired - expected).norm() <= tolerance * other.stored.norm() * fast[1].stored.norm()
    return hooks


@pytest.fixture
def exact_norms(monkeypatch):
    """Hugging Face norms compute in float32 whatever the model; not here."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for kind in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_weights(architecture, tied, dtype, request):
    if dtype == torch.float64:
        request.getfixturevalue("exact_norms")
    model, _ = tiny_policy(architecture, tie_word_embeddings=tied, num_layers=2, hidden_size=32)
    hooks = check(model.to(dtype), rollouts(), 1e-9 if dtype == torch.float64 else 3e-6)
    assert str(hooks) == "hooks"
    assert set(hooks.head.values()) == {"model.embed_tokens.weight" if tied else "lm_head.weight"}


@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["norm"], ["embed_tokens", "lm_head", "norm"]], ids=len)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lora_with_modules_to_save(saved, dtype, request):
    if dtype == torch.float64:
        request.getfixturevalue("exact_norms")
    model, _ = tiny_policy(num_layers=2, hidden_size=32)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=saved, init_lora_weights=False)
    model = get_peft_model(model, config).to(dtype)
    names = {name for name in trained(model) if "modules_to_save" in name}
    assert {name.split(".modules_to_save")[0].split(".")[-1] for name in names} >= {*saved}
    hooks = check(model, rollouts(), 1e-9 if dtype == torch.float64 else 3e-6)
    assert str(hooks) == "hooks"


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 base", "autocast"])
def test_low_precision_around_adapters_in_float32(autocast):
    """Rounding is no reason for a backward pass per unit."""
    model, _ = tiny_policy(num_layers=2, hidden_size=32)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if not autocast:
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.bfloat16()
    scorer, batch = Scorer(model, 1.0, 300), rollouts()
    with evaluating(model, torch.bfloat16 if autocast else None):
        scorer.prepare(batch)
        hooks = hookable(scorer, trained(model), batch)
        assert isinstance(hooks, Hooks), hooks
        side = Side(coefficients(batch, 1), is_loss=True, store=True)
        fast, slow = (
            sample_gradients(scorer, trained(model), batch, batch.prompt_ids, [side], hooks=t)[0].stored
            for t in (hooks, None)
        )
    assert ((fast - slow).norm(dim=1) <= 2e-2 * slow.norm(dim=1)).all()


def test_a_head_with_a_bias(exact_norms):
    model, _ = tiny_policy(num_layers=1, hidden_size=32)
    model.lm_head = nn.Linear(32, model.lm_head.out_features)
    assert set(check(model.double(), rollouts(), 1e-9).head) == {"weight", "bias"}
    for p in model.parameters():
        p.requires_grad_(p is model.lm_head.bias)
    assert check(model, rollouts(), 1e-9).head == {"bias": "lm_head.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_without_a_formula(dtype):
    hooks = check(Mixed().to(dtype), rollouts(), 1e-9 if dtype == torch.float64 else 3e-6)
    assert str(hooks) == "hooks; by autograd: conv.bias, conv.weight, norm.weight and 2 more"


def test_the_padding_row_gets_no_gradient_of_the_loss():
    model = Mixed().double()
    batch = rollouts()
    assert bool((batch.input_ids[batch.attention_mask] == 0).any())
    scorer = Scorer(model, 1.0, 300)
    parameters = trained(model)
    hooks = hookable(scorer, parameters, batch)
    assert isinstance(hooks, Hooks)
    side = Side(coefficients(batch, 1), is_loss=True, store=True)
    (got,) = sample_gradients(scorer, parameters, batch, batch.prompt_ids, [side], hooks=hooks)
    embedding = got.stored[:, : model.embed.weight.numel()].view(-1, *model.embed.weight.shape)
    assert (embedding[:, 0] == 0).all()
    assert (embedding[:, 1:] != 0).any(-1).any(0).all()


def test_memory_bounds_do_not_change_the_numbers(monkeypatch):
    for bound in (1, 3000):
        monkeypatch.setattr("entropy_probe.gradients.layers._BLOCK_ELEMENTS", bound)
        monkeypatch.setattr("entropy_probe.gradients.per_sample._CACHED_ELEMENTS", bound)
        monkeypatch.setattr("entropy_probe.scoring.logits.OutputHead.chunk_tokens", lambda self, n=bound: n % 7)
        check(tiny_policy(num_layers=1, hidden_size=32)[0], rollouts(), 3e-6)


@pytest.mark.parametrize("kind", ["full", "tied", "mixed"])
def test_cross_products(kind, exact_norms):
    if kind == "mixed":
        model = Mixed().double()
    else:
        model = tiny_policy("qwen3", num_layers=2, hidden_size=32, tie_word_embeddings=kind == "tied")[0].double()
    batch, parameters = rollouts(), trained(model)
    scorer = Scorer(model, 1.0, 300)
    with evaluating(model):
        scorer.prepare(batch)
        hooks = hookable(scorer, parameters, batch)
        assert isinstance(hooks, Hooks)
        g = torch.Generator().manual_seed(2)
        scale = {n: torch.rand(p.shape, generator=g).double() for n, p in parameters.items()}
        x, y = coefficients(batch, 1), coefficients(batch, 2)
        sides = [Side(x, store=True), Side(y, is_loss=True, store=True)]
        xs, ys = (s.stored for s in sample_gradients(scorer, parameters, batch, batch.prompt_ids, sides))
        k = xs * torch.cat([s.reshape(-1) for s in scale.values()]) @ ys.T
        one_side = ys.numel() * 8
        for bound, how in ((2 * one_side, "one pass, gradients of 4"), (2 * one_side - 1, "two passes, one side's"),
                           (one_side, "two passes, one side's"), (one_side - 1, "two passes, since")):  # fmt: skip
            for path in (hooks, None):
                got = cross_products(scorer, parameters, batch, batch.prompt_ids, 4, x, y, scale, hooks=path,
                                     max_bytes=float(bound), progress=lambda done, total: None)  # fmt: skip
                assert got.how.startswith(how)
                for found, expected in ((got.left, k.sum(1)), (got.right, k.sum(0)), (got.diagonal, k.diagonal())):
                    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * k.abs().max().item())
                assert got.unscaled_total == pytest.approx((xs.sum(0) @ ys.sum(0)).item(), rel=1e-9)
                total = torch.cat([got.right_total[n].reshape(-1) for n in parameters])
                torch.testing.assert_close(total, ys.sum(0), rtol=1e-9, atol=1e-12)


class Wrapped(nn.Module):
    """Another module, called in an unusual way."""

    def __init__(self, inner: nn.Module, call) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x):
        return self.call(self.inner, x)


class Custom(Mixed):
    """Something that the layers' own calls do not show."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        if what == "free":
            self.free = nn.Parameter(torch.ones(VOCABULARY))
        if what == "listed":
            self.listed = nn.ParameterList([torch.ones(VOCABULARY)])
        if what == "tokens":
            self.first_norm = Wrapped(self.first_norm, lambda norm, x: norm(x.flatten(0, 1)).view(x.shape))
        if what == "flipped":  # sums over sequences do not change, but each gets another's
            self.first_norm = Wrapped(self.first_norm, lambda norm, x: norm(x.flip(0)).flip(0))
        if what == "mixing":  # every sequence sees the batch's mean
            self.first_norm = MeanFree(self.first_norm.normalized_shape[0])
        if what == "remembering":
            self.first_norm = Remembering(self.first_norm.normalized_shape[0])
        self.double()

    def forward(self, input_ids, attention_mask):
        if self.what == "remembering":
            self.first_norm.last = None
        out = super().forward(input_ids, attention_mask)
        if self.what == "free":
            out.logits = out.logits * self.free
        if self.what == "listed":
            out.logits = out.logits * self.listed[0]
        if self.what == "reused":
            out.logits = out.logits + self.heads.weight.sum() * torch.arange(VOCABULARY)
        return out


class Remembering(nn.Module):
    """A gain on what has come since it was told to forget."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.last = nn.Parameter(torch.ones(width)), None

    def forward(self, x):
        since = x if self.last is None else torch.stack([x, self.last]).sum(0)
        self.last = x.detach()
        return since * self.gain


class MeanFree(nn.Module):
    """A gain on what differs between sequences."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return (x - x.mean(0)) * self.gain


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("free", "free belongs to Custom, which was not called on [sequences, tokens, features]"),
        ("listed", "listed.0 also acts outside its layer"),
        ("reused", "heads.weight also acts outside its layer"),
        ("mixing", "first_norm.gain belongs to MeanFree, which depends on more than one sequence"),
        ("remembering", "first_norm.gain belongs to Remembering, which cannot be called again on one of its sequences"),
        ("tokens", "first_norm.inner.bias belongs to LayerNorm, which was not called on [sequences, tokens, features]"
                   "; 1 more"),
        ("flipped", "first_norm.inner.bias also acts outside its layer; 1 more"),
    ],
)  # fmt: skip
def test_what_layers_do_not_show_is_said(what, why):
    model = Custom(what)
    assert hookable(Scorer(model, 1.0, 300), trained(model), rollouts()) == why


def test_what_follows_a_layer_may_change_its_output_in_place():
    """Whether the layer has a formula or is called again and compared with what it returned."""
    model = Mixed().double()
    model.scale = nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(inplace=True), Gain(8), nn.LeakyReLU(inplace=True))
    model.double().scale.forward = lambda h, mask, inner=model.scale.forward: inner(h)
    assert str(check(model, rollouts(), 1e-9)).startswith(
        "hooks; by autograd: conv.bias, conv.weight, norm.weight and 1"
    )


class Gain(nn.Module):
    """No formula for it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(-1, 1, width))

    def forward(self, x):
        return x * self.gain
