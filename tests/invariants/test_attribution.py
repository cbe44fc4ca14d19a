"""Attribution adds up, equals one backward pass per token, and finds causes that were planted."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts, TokenScores
from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.estimators.first_order import length_coefficients, sequence_weights
from entropy_probe.estimators.uncertainty import ratio
from entropy_probe.losses.trl import TRLLoss
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.slopes import SlopeMethod
from entropy_probe.steps.adamw import adamw_step, clip_gradient
from entropy_probe.types import Clusters
from tests.invariants import hf_problems as hf
from tests.invariants.problems import TABLE, batches, pad, with_advantages
from tests.invariants.problems import probe as any_probe
from tests.invariants.traces import WithState, assert_same, state
from tests.reference.enumeration import TEMPERATURE, VOCABULARY, TinyPolicy, trained_optimizer
from tests.whole_batch import coefficients

probe = partial(any_probe, horizon=None)  # contributions to the whole response
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def assert_adds_up(found, rel: float) -> None:
    """Tokens, prompts, signs and layers against the prediction, relative to the prediction itself."""
    parts, summary = {name: part.value for name, part in found.result.components.items()}, found.summary
    scale = rel * max(map(abs, parts.values()))
    for name in ("gradient", "momentum", "weight_decay"):
        assert getattr(summary, name) == parts.get(name, 0.0)
        assert sum(getattr(layer, name) for layer in found.layers) == pytest.approx(parts.get(name, 0.0), abs=scale)
    assert sum(layer.total for layer in found.layers) == pytest.approx(found.result.predicted.value, abs=scale)
    for terms in (found.tokens, found.sequences, found.prompts):
        assert terms.sum().item() == pytest.approx(parts["gradient"], abs=scale)
    assert summary.positive_advantages + summary.negative_advantages == pytest.approx(parts["gradient"], abs=scale)
    assert sum(parts.values()) == pytest.approx(found.result.predicted.value, abs=scale)
    assert summary.num_tokens == int(found.update.response_mask.sum())
    assert (found.tokens[~found.update.response_mask] == 0).all()


def one_backward_per_token(
    model, optimizer, update, evaluation, loss_type="dapo", normalization="token", max_norm=None, loss=None
):
    """Every token's contribution on a route of its own: the model's logits and autograd, no pass of the package."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def scores(r: Rollouts) -> TokenScores:
        log_p = torch.log_softmax(model(r.input_ids, r.attention_mask.long()).logits / TEMPERATURE, -1)
        s, h = (torch.zeros(r.input_ids.shape, dtype=torch.float64) for _ in range(2))
        s[:, 1:] = log_p[:, :-1].gather(-1, r.input_ids[:, 1:, None])[..., 0] * r.response_mask[:, 1:]
        h[:, 1:] = -(log_p.exp() * log_p).sum(-1)[:, :-1] * r.response_mask[:, 1:]
        return TokenScores(s, h, r.response_mask)

    def gradient(value: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(named, torch.autograd.grad(value, list(named.values()), retain_graph=True), strict=True))

    e, clusters = scores(evaluation), Clusters.sequences(len(evaluation))
    fixed = TokenScores(e.logprobs.detach(), e.entropies.detach(), e.response_mask)
    c = coefficients(fixed, evaluation.prompt_ids, clusters, normalization)
    size = sequence_weights(fixed, normalization).sum()
    entropy = gradient((c.logprobs * e.logprobs + c.entropies * e.entropies).sum() / size)
    u = scores(update)
    detached = TokenScores(u.logprobs.detach(), u.entropies.detach(), u.response_mask)
    loss = TRLLoss(loss_type=loss_type, max_completion_length=5) if loss is None else loss
    of_loss = loss.coefficients(update, detached)
    value = of_loss.logprobs * u.logprobs
    if of_loss.entropies is not None:
        value = value + of_loss.entropies * u.entropies
    clipped = clip_gradient(gradient(value.sum()), max_norm)
    step = adamw_step(named, optimizer, clipped.values)
    out = torch.zeros_like(value)
    for i, t in update.response_mask.nonzero().tolist():
        g = gradient(value[i, t])
        out[i, t] = -clipped.factor * sum((entropy[n] * step.gradient_scale[n] * g[n]).sum() for n in named)
    return out.detach(), clipped.factor


CASES = [
    {},
    {"normalization": "sequence", "max_norm": 1e-3},
    {"loss_type": "grpo"},
    {"loss_type": "dr_grpo", "max_norm": 1e-2},
]


@pytest.mark.parametrize("case", CASES, ids=["dapo", "per sequence, clipped", "grpo", "dr_grpo, clipped"])
def test_tokens_equal_one_backward_per_token(case):
    model = TinyPolicy()
    optimizer = trained_optimizer(model, weight_decay=0.1)
    update, evaluation = batches()
    expected, factor = one_backward_per_token(model, optimizer, update, evaluation, **case)
    settings = {"max_grad_norm": case.get("max_norm"), "max_completion_length": 5}
    settings |= {name: case[name] for name in ("loss_type", "normalization") if name in case}
    found = probe(model, optimizer, **settings).attribute(update=update, evaluation=evaluation)
    assert (factor < 1) == ("max_norm" in case)
    torch.testing.assert_close(found.tokens, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    assert found.summary.method == "forward-mode"
    assert found.summary.unit == f"nats/{case.get('normalization', 'token')}"
    assert_adds_up(found, 1e-10)


@pytest.mark.parametrize("bonus", [0.0, 0.3])
def test_off_policy_with_kl_and_bonus(bonus):
    """Contributions count what a token's entropy does, and its ratio."""
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches(groups=5)
    noise = torch.randn(2, *update.input_ids.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    old = TABLE.token_scores(model).logprobs.detach()
    rows = (update.input_ids[:, None] == TABLE.rollouts.input_ids).all(-1).int().argmax(1)
    given = {"old_logprobs": old[rows] + 0.2 * noise[0], "reference_logprobs": old[rows] + 0.5 * noise[1]}
    update = replace(update, **given)
    loss = TRLLoss(loss_type="grpo", beta=0.3, entropy_coef=bonus, top_entropy_quantile=0.8)
    expected, _ = one_backward_per_token(model, optimizer, update, evaluation, loss=loss)
    found = probe(model, optimizer, max_grad_norm=None, loss=loss).attribute(update=update, evaluation=evaluation)
    torch.testing.assert_close(found.tokens, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())
    # of tokens without an advantage too, which the KL term and the bonus move
    gradient, summary = found.result.components["gradient"].value, found.summary
    assert found.tokens.sum().item() == pytest.approx(gradient, rel=1e-9)
    assert found.prompts.sum().item() == pytest.approx(gradient, rel=1e-9)
    assert summary.positive_advantages + summary.negative_advantages != pytest.approx(gradient, rel=1e-4)


def test_advantages_per_token():
    """A loss may give every token an advantage of its own."""
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches()
    noise = torch.randn(update.input_ids.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    update = with_advantages(update, noise)
    expected, _ = one_backward_per_token(model, optimizer, update, evaluation)
    found = probe(model, optimizer, max_grad_norm=None).attribute(update=update, evaluation=evaluation)
    torch.testing.assert_close(found.tokens, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    assert_adds_up(found, 1e-10)


@pytest.mark.checked
@pytest.mark.parametrize("settings", [{"geometry": "frozen"}, {"max_stored_gradient_gib": 0}], ids=["frozen", "passes"])
def test_adds_up_in_other_settings(settings):
    model = TinyPolicy()
    update, evaluation = batches()
    found = probe(model, trained_optimizer(model), **settings).attribute(update=update, evaluation=evaluation)
    assert_adds_up(found, 1e-10)
    if "geometry" in settings:
        assert found.summary.momentum == found.summary.weight_decay == 0


def test_adam_and_groups_with_rates_of_their_own():
    model = TinyPolicy()
    history = trained_optimizer(model, cls=torch.optim.Adam)
    groups = [{"params": [p], "lr": 1e-4 * (k + 1), "weight_decay": 0.2 * k} for k, p in enumerate(model.parameters())]
    optimizer = torch.optim.Adam(groups, amsgrad=True)
    optimizer.state.update(history.state)
    update, evaluation = batches()
    found = probe(model, optimizer).attribute(update=update, evaluation=evaluation)
    assert found.summary.weight_decay != 0
    assert_adds_up(found, 1e-10)


@pytest.mark.parametrize("moving", ["embed", "inner", "out"])
def test_only_layers_that_move_contribute(moving):
    model = TinyPolicy()
    history = trained_optimizer(model)
    groups = [
        {"params": list(layer.parameters()), "lr": 1e-3 if name == moving else 0.0}
        for name, layer in model.named_children()
    ]
    optimizer = torch.optim.AdamW(groups)
    optimizer.state.update(history.state)
    update, evaluation = batches()
    found = probe(model, optimizer).attribute(update=update, evaluation=evaluation)
    assert [layer.layer for layer in found.layers if layer.total != 0] == [moving]
    sizes = {name: sum(p.numel() for p in layer.parameters()) for name, layer in model.named_children()}
    assert {layer.layer: layer.num_parameters for layer in found.layers} == sizes


@pytest.mark.parametrize("architecture", ["qwen2", pytest.param("qwen3", marks=pytest.mark.slow), "llama"])
@pytest.mark.parametrize(("kind", "config"), hf.KINDS, ids=hf.IDS)
def test_adds_up_on_hugging_face_models(architecture, kind, config):
    model, optimizer = hf.policy(kind, architecture, **config)
    for update in (hf.rollouts(), hf.long_prompts(gaps=True)):
        found = EntropyProbe(model, optimizer, ProbeConfig(temperature=0.9, horizon=None)).attribute(
            update=update, evaluation=hf.rollouts(40, seed=2, group=1)
        )
        assert found.summary.method == "forward-mode"
        assert_adds_up(found, 1e-6)
    assert found.result.diagnostics.prefix_sharing == "on"
    scores = Scorer(model, 0.9, 8192).score(update)
    torch.testing.assert_close(found.scores.logprobs, scores.logprobs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.scores.entropies, scores.entropies, atol=2e-5, rtol=1e-5)


@pytest.mark.checked
def test_planted_causes_come_out_on_top():
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches(groups=12)
    before = probe(model, optimizer).attribute(update=update, evaluation=evaluation)
    by_size = before.prompts.abs().argsort(descending=True)
    middling, zero = by_size[[4, 5]].tolist(), int(by_size[0])
    factor = torch.ones(len(update), dtype=torch.float64)
    for prompt in middling:
        factor[update.prompt_ids == prompt] = 20
    factor[update.prompt_ids == zero] = 0
    found = probe(model, optimizer).attribute(
        update=with_advantages(update, update.advantages * factor), evaluation=evaluation
    )
    assert set(found.prompts.abs().argsort(descending=True)[:2].tolist()) == set(middling)
    assert (found.tokens[update.prompt_ids == zero] == 0).all()
    assert found.prompts[zero] == 0
    assert not torch.signbit(found.tokens[update.prompt_ids == zero]).any()


def test_a_batch_without_advantages_contributes_nothing():
    model = TinyPolicy()
    update, evaluation = batches()
    found = probe(model, trained_optimizer(model)).attribute(
        update=with_advantages(update, torch.zeros(len(update))), evaluation=evaluation
    )
    assert (found.tokens == 0).all()
    assert found.summary.gradient == 0
    assert found.summary.momentum != 0
    assert found.summary.rank_correlation_with_covariance is None


def test_invariant_to_layout():
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches()
    expected = probe(model, optimizer).attribute(update=update, evaluation=evaluation)
    small = probe(model, optimizer, max_tokens_per_microbatch=7).attribute(
        update=pad(update, 2, 1), evaluation=pad(evaluation, 0, 3)
    )
    order = torch.randperm(len(update), generator=torch.Generator().manual_seed(3))
    shuffled = probe(model, optimizer).attribute(update=update.select(order), evaluation=evaluation)
    in_order = expected.tokens[update.response_mask]
    torch.testing.assert_close(small.tokens[small.update.response_mask], in_order, rtol=1e-9, atol=1e-16)
    torch.testing.assert_close(shuffled.tokens, expected.tokens[order], rtol=1e-9, atol=1e-16)
    torch.testing.assert_close(shuffled.prompts, expected.prompts, rtol=1e-9, atol=1e-16)


class NoForwardRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 - torch.tanh(ctx.saved_tensors[0]) ** 2)


class WrongForwardRule(NoForwardRule):
    @staticmethod
    def jvp(ctx, tangent):
        return 0.97 * tangent * (1 - torch.tanh(ctx.saved_tensors[0]) ** 2)

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_forward(x)
        ctx.save_for_backward(x)
        return torch.tanh(x)


class BackwardOnce(NoForwardRule):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * (1 - torch.tanh(ctx.saved_tensors[0]) ** 2)


class WithRule(TinyPolicy):
    """The same policy, its tanh by another rule."""

    def __init__(self, rule: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.double()[..., None]
        mean = (self.embed(input_ids) * mask).cumsum(1) / mask.cumsum(1).clamp(min=1)
        return SimpleNamespace(logits=self.out(self.rule.apply(self.inner(mean + self.embed(input_ids)))))


@pytest.mark.checked
@pytest.mark.parametrize(
    ("rule", "method"),
    [
        (NoForwardRule, "reverse-mode (no forward mode: "),
        (WrongForwardRule, "reverse-mode (no forward mode: its slopes are off by "),
        (BackwardOnce, "reverse-mode (one pass per token; no forward mode: "),
    ],
)
def test_reverse_mode_where_forward_mode_fails(rule, method):
    update, evaluation = batches()
    plain, other = TinyPolicy(), WithRule(rule)
    expected = probe(plain, trained_optimizer(plain)).attribute(update=update, evaluation=evaluation)
    found = probe(other, trained_optimizer(other)).attribute(update=update, evaluation=evaluation)
    assert found.summary.method.startswith(method)
    assert "\n" not in found.summary.method
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-9, atol=1e-16)
    assert_adds_up(found, 1e-10)


class WithNorms(nn.Module):
    """Layers whose forward-mode rules torch has had wrong at second order: layer_norm, silu, attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 8, dtype=torch.float64)
        self.norm = nn.LayerNorm(8, dtype=torch.float64)
        self.mix = nn.Linear(8, 24, dtype=torch.float64)
        self.out = nn.Linear(8, VOCABULARY, dtype=torch.float64)

    def forward(self, input_ids, attention_mask):
        q, k, v = self.mix(self.norm(self.embed(input_ids))).chunk(3, -1)
        x = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]
        return SimpleNamespace(logits=self.out(nn.functional.silu(self.norm(x)) + nn.functional.gelu(x)))


def test_forward_mode_through_norms_activations_and_attention():
    model = WithNorms()
    optimizer = trained_optimizer(model)
    update, evaluation = batches()
    expected, _ = one_backward_per_token(model, optimizer, update, evaluation)
    found = probe(model, optimizer, max_grad_norm=None).attribute(update=update, evaluation=evaluation)
    assert found.summary.method == "forward-mode"
    torch.testing.assert_close(found.tokens, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("gib", [2.0, 0.0], ids=["stored", "passes"])
def test_errors_from_folds(gib, monkeypatch):
    """With as many folds as units the error is the delta method's over units, taken here by one backward pass each."""
    # the change of length is taken from all sequences
    monkeypatch.setattr("entropy_probe.analyses.before.SHARE", 1.0)
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches(groups=3, n=12)
    found = probe(model, optimizer, max_stored_gradient_gib=gib).attribute(
        update=update, evaluation=evaluation, folds=12
    )
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    scorer = Scorer(model, TEMPERATURE, 8192)
    scores, single = scorer.score(evaluation), Clusters.sequences(12)
    c = coefficients(scores, evaluation.prompt_ids, single)
    to_go = length_coefficients(scores, single, PositionSums.of(scores)).logprobs

    def gradient(batch: Rollouts, logprobs: torch.Tensor, entropies: torch.Tensor) -> dict[str, torch.Tensor]:
        log_p = torch.log_softmax(model(batch.input_ids, batch.attention_mask.long()).logits / TEMPERATURE, -1)
        s = log_p[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        h = -(log_p.exp() * log_p).sum(-1)[:, :-1]
        value = (logprobs[:, 1:] * s).sum() + (entropies[:, 1:] * h).sum()
        return dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))

    loss = -update.token_advantages / update.response_mask.sum()
    by_prompt = [
        gradient(update.select(rows), loss[rows], 0 * loss[rows]) for rows in torch.arange(len(update)).view(3, -1)
    ]
    total = {n: sum(g[n] for g in by_prompt) for n in named}
    clipped = clip_gradient(total, 1.0)
    scale = adamw_step(named, optimizer, clipped.values).gradient_scale
    by_cluster = [gradient(evaluation.select(r), c.logprobs[r], c.entropies[r]) for r in torch.arange(12).view(-1, 1)]
    a = torch.tensor([
        [-clipped.factor * sum((x[n] * scale[n] * y[n]).sum() for n in named) for y in by_prompt] for x in by_cluster
    ], dtype=torch.float64)  # fmt: skip
    sizes = evaluation.response_lengths.double()
    q = a.sum(0) / sizes.sum()
    longer = gradient(evaluation, to_go, 0 * to_go)
    sigma = torch.tensor([
        -clipped.factor * sum((longer[n] * scale[n] * y[n]).sum() for n in named) for y in by_prompt
    ]) / sizes.sum()  # fmt: skip
    of_entropy = ratio(scores.entropies.double().sum(1), sizes).influence
    influence = (a - q * sizes[:, None]) / sizes.mean() - sigma * of_entropy[:, None]
    expected = influence.std(0) / 12**0.5
    torch.testing.assert_close(found.prompts, q, rtol=1e-9, atol=1e-16)
    torch.testing.assert_close(found.standard_errors, expected, rtol=1e-9, atol=1e-16)
    assert found.summary.folds == 12


@pytest.mark.slow
def test_errors_from_folds_are_the_spread_over_evaluation_batches():
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model))
    update, _ = batches()
    found = [subject.attribute(update=update, evaluation=batches(seed=seed, n=80)[1], folds=10) for seed in range(100)]
    spread = torch.stack([a.prompts for a in found]).var(0)
    reported = torch.stack([a.standard_errors for a in found]).square().mean(0)
    assert (spread > 0).sum() >= 4
    ratio = (reported / spread)[spread > 0]
    # the spread of 100 batches is known to about 14%
    assert ((ratio > 0.6) & (ratio < 1.6)).all()


@pytest.mark.parametrize(
    ("settings", "n", "folds"), [({}, 20, 8), ({"max_stored_gradient_gib": 0}, 20, None), ({}, 7, None)]
)
def test_usual_folds_where_they_cost_no_pass_over_the_update_batch(settings, n, folds):
    model = TinyPolicy()
    update, evaluation = batches(n=n)
    subject = probe(model, trained_optimizer(model), **settings)
    found = subject.attribute(update=update, evaluation=evaluation, folds="auto")
    asked = subject.attribute(update=update, evaluation=evaluation, folds=folds)
    assert found.summary.folds == asked.summary.folds == folds
    assert (found.standard_errors is None) == (folds is None)
    if folds:
        assert torch.equal(found.standard_errors, asked.standard_errors)


def test_folds_outside_their_range_are_refused():
    model = TinyPolicy()
    update, evaluation = batches(n=20)
    for folds in (1, 21):
        with pytest.raises(ValueError, match=f"attribution_folds: expected 2 to 20, the number .* got {folds}"):
            probe(model, trained_optimizer(model)).attribute(update=update, evaluation=evaluation, folds=folds)


def test_optimizers_without_a_closed_form_are_refused():
    model = TinyPolicy()
    update, evaluation = batches(n=20)
    with pytest.raises(ValueError, match=r"attribution: expected torch.optim.AdamW or Adam, .* got torch.optim.SGD"):
        probe(model, torch.optim.SGD(model.parameters(), lr=0.1)).attribute(update=update, evaluation=evaluation)


@pytest.mark.parametrize("what", ["tokens", "layers"])
def test_what_does_not_add_up_is_an_error(what, monkeypatch):
    model = TinyPolicy()
    update, evaluation = batches()
    if what == "tokens":
        along = SlopeMethod.along

        def wrong(*args):
            slopes = along(*args)
            slopes.slopes.logprobs[::2] *= 1.01
            return slopes

        monkeypatch.setattr(SlopeMethod, "along", wrong)
    else:
        monkeypatch.setattr("entropy_probe.analyses.attribute.PARTS", ("momentum", "gradient", "weight_decay"))
    with pytest.raises(RuntimeError, match="please report this"):
        probe(model, trained_optimizer(model)).attribute(update=update, evaluation=evaluation)


def test_measured_beside_the_prediction_and_nothing_else_changes():
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches()
    plain = probe(model, optimizer).run(update=update, evaluation=evaluation)
    found = probe(model, optimizer).attribute(update=update, evaluation=evaluation, measure=True).result
    same = {"predicted", "components", "realized", "difference", "entropy", "diagnostics"}
    assert found.model_dump(include=same) == plain.model_dump(include=same)
    assert plain.attribution is None


def test_leaves_no_trace(monkeypatch):
    torch.manual_seed(4)
    model = WithState()
    model.train()
    optimizer = trained_optimizer(model)
    update, evaluation = batches(n=20)
    before = state(model, optimizer)
    attributing = probe(model, optimizer)
    attributing.attribute(update=update, evaluation=evaluation, folds=3)
    assert_same(before, state(model, optimizer))

    def explode(*args):
        torch.rand(3)
        raise KeyError("boom")

    monkeypatch.setattr(Scorer, "token_slopes", explode)
    with pytest.raises(KeyError):
        attributing.attribute(update=update, evaluation=evaluation)
    assert_same(before, state(model, optimizer))
