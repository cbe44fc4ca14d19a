"""An embedding's ``padding_idx``: training's gradient lacks that row, the entropy's slope does not."""

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig
from entropy_probe.analyses.batches import admit_batches
from entropy_probe.analyses.plan import plan
from entropy_probe.analyses.predict import entropy_surrogate, predict
from entropy_probe.gradients.cross import cross_products
from entropy_probe.gradients.per_sample import stored_bytes
from entropy_probe.named import dot
from entropy_probe.scoring.directional import directional_derivatives
from entropy_probe.scoring.forward import Scorer
from entropy_probe.types import TokenCoefficients
from tests.invariants.hf_problems import policy, rollouts

PADDING = 5
"""A token that stands in prompts and responses, as an end-of-turn token that also pads does in chats."""


def padded_policy(*, tied: bool):
    model, optimizer = policy("full", tie_word_embeddings=tied)
    model = model.double()
    for state in optimizer.state.values():
        state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].double(), state["exp_avg_sq"].double()
    embedding = model.get_input_embeddings()
    embedding.padding_idx = PADDING
    return model, optimizer, embedding


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("hooks", [True, False])
def test_the_slope_has_the_row_and_the_step_is_trainings(tied, hooks, monkeypatch):
    if not hooks:
        monkeypatch.setattr("entropy_probe.analyses.policy.hookable", lambda *_: "off")
    model, optimizer, embedding = padded_policy(tied=tied)
    probe = EntropyProbe(model, optimizer, ProbeConfig(loss_type="dapo", max_grad_norm=None))
    with probe._opened() as opened:
        planned = plan(opened, *admit_batches(opened, rollouts(), rollouts(seed=1)))
        prediction, surrogate = predict(planned), entropy_surrogate(planned)
        slopes, _ = directional_derivatives(
            opened.scorer, planned.evaluation.own, opened.parameters, planned.step.delta, lambda *_: None
        )
    expected = (surrogate.logprobs * slopes.logprobs).sum()
    if surrogate.entropies is not None:
        expected = expected + (surrogate.entropies * slopes.entropies).sum()
    slope = {name: torch.zeros_like(p) if (x := prediction.slope.total[name]) is None else x
             for name, p in opened.parameters.items()}  # fmt: skip
    assert dot(slope, planned.step.delta) == pytest.approx(expected.item(), rel=1e-4)
    (name,) = [name for name, p in model.named_parameters() if p is embedding.weight]
    assert slope[name][PADDING].abs().max() > 0

    batch = rollouts()
    log_p = torch.log_softmax(model(batch.input_ids, batch.attention_mask.long()).logits[:, :-1].double(), -1)
    s = log_p.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    (planned.batch.loss.logprobs[:, 1:] * s).sum().backward()
    torch.testing.assert_close(planned.batch.gradient.total[name], embedding.weight.grad, rtol=1e-4, atol=1e-9)
    assert (embedding.weight.grad[PADDING] == 0).all() != tied
    assert embedding.padding_idx == PADDING


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_are_attributed_in_forward_mode(tied):
    model, optimizer, embedding = padded_policy(tied=tied)
    probe = EntropyProbe(model, optimizer, ProbeConfig(loss_type="dapo", horizon=None))
    attribution = probe.attribute(update=rollouts(), evaluation=rollouts(seed=1))
    assert attribution.result.attribution.method == "forward-mode"
    assert attribution.tokens.sum().item() == pytest.approx(attribution.result.components["gradient"].value, rel=1e-6)
    assert not embedding._forward_hooks


@pytest.mark.parametrize(("share", "how"), [(2, "one pass"), (1, "two passes, one side"), (0, "two passes, since")])
def test_one_batch_multiplies_both_kinds_of_gradient(share, how):
    model, _, embedding = padded_policy(tied=True)
    batch, parameters = rollouts(), dict(model.named_parameters())
    g = torch.Generator().manual_seed(3)
    x, y = (
        TokenCoefficients(torch.randn(batch.input_ids.shape, generator=g) * batch.response_mask, None) for _ in "xy"
    )
    scale = {name: torch.rand(p.shape, generator=g, dtype=torch.float64) for name, p in parameters.items()}
    scorer = Scorer(model, 1.0, 10_000)
    scorer.prepare(batch)

    def by_prompt(coefficients):
        log_p = torch.log_softmax(model(batch.input_ids, batch.attention_mask.long()).logits[:, :-1].double(), -1)
        s = (coefficients.logprobs[:, 1:] * log_p.gather(-1, batch.input_ids[:, 1:, None])[..., 0]).sum(1)
        each = [s[batch.prompt_ids == u].sum() for u in batch.prompt_ids.unique()]
        rows = [torch.autograd.grad(v, list(parameters.values()), retain_graph=True) for v in each]
        return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])

    ys = by_prompt(y) * torch.cat([v.reshape(-1) for v in scale.values()])
    embedding.padding_idx = None
    xs = by_prompt(x)
    embedding.padding_idx = PADDING
    size = stored_bytes(parameters, len(xs))
    got = cross_products(
        scorer, parameters, batch, batch.prompt_ids, len(xs), x, y, scale,
        hooks=None, max_bytes=share * size, progress=lambda *_: None,
    )  # fmt: skip
    assert got.how.startswith(how)
    expected = (xs @ ys.sum(0), ys @ xs.sum(0), (xs * ys).sum(1))
    for actual, value in zip((got.left, got.right, got.diagonal), expected, strict=True):
        torch.testing.assert_close(actual, value.double(), rtol=1e-4, atol=1e-6)
