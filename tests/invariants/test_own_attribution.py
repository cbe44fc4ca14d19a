"""Attribution from one batch: every prompt's tokens against the entropy gradient of the other prompts."""

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig
from entropy_probe.analyses.own_batch import predict_own
from entropy_probe.analyses.predict import entropy_surrogate
from entropy_probe.named import dot
from tests.invariants.problems import TABLE, batches, probe
from tests.reference.enumeration import LONGEST, TEMPERATURE, TinyPolicy, trained_optimizer

SETTINGS = {"loss_type": "dr_grpo", "max_completion_length": LONGEST, "horizon": None}


def test_tokens_one_by_one_and_sums():
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model), **SETTINGS)
    update, _ = batches(groups=6)
    found = subject.attribute(update=update, measure=True)
    with subject._opened() as policy:
        prediction = predict_own(policy, update)
        plan, surrogate = prediction.plan, entropy_surrogate(prediction.plan)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    log_p = torch.log_softmax(model(update.input_ids, update.attention_mask.long()).logits / TEMPERATURE, -1)
    s = torch.nn.functional.pad(log_p[:, :-1].gather(-1, update.input_ids[:, 1:, None])[..., 0], (1, 0))
    h = torch.nn.functional.pad(-(log_p.exp() * log_p).sum(-1)[:, :-1], (1, 0))

    def gradient(value: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(named, torch.autograd.grad(value, list(named.values()), retain_graph=True), strict=True))

    rows, step = (surrogate.logprobs * s + surrogate.entropies * h).sum(1), plan.step
    expected, size = torch.zeros(update.input_ids.shape, dtype=torch.float64), plan.before.sums.size.sum().item()
    for number in update.prompt_ids.unique():
        others = gradient(rows[update.prompt_ids != number].sum())
        for i, t in (update.response_mask & (update.prompt_ids == number)[:, None]).nonzero().tolist():
            g = gradient(plan.batch.loss.logprobs[i, t] * s[i, t])
            moved = {n: -step.gradient.factor * step.gradient_scale[n] * g[n] for n in named}
            expected[i, t] = 6 / 5 * dot(others, moved) / size
    torch.testing.assert_close(found.tokens, expected, rtol=1e-8, atol=1e-9 * expected.abs().max().item())
    torch.testing.assert_close(found.prompts, prediction.by_prompt, rtol=1e-9, atol=1e-15)
    assert sum(layer.gradient for layer in found.layers) == pytest.approx(found.summary.gradient, rel=1e-8)
    assert sum(layer.momentum for layer in found.layers) == pytest.approx(found.summary.momentum, rel=1e-8)
    assert found.result.realized.batch == "own"


def z_of_contributions(number: int) -> torch.Tensor:
    """Of the prompts' contributions, and of those through all prompts' entropy gradients, against exact ones."""
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    for state in optimizer.state.values():
        state["step"] = torch.tensor(500.0)  # the batch hardly moves the denominators
    config = ProbeConfig(temperature=TEMPERATURE, merge_equal_prompts=False, normalization="sequence",
                         max_grad_norm=None, **SETTINGS)  # fmt: skip
    subject, gaps = EntropyProbe(model, optimizer, config), []
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    h = TABLE.entropy(model, "sequence")
    slope = dict(zip(named, torch.autograd.grad(h, list(named.values())), strict=True))
    for seed in range(number):
        with subject._opened() as policy:
            prediction = predict_own(policy, batches(seed, 4, 4, 4)[0])
            plan = prediction.plan
            whole = prediction.slope.total
            exact, every = [], []
            size = plan.before.sums.size.sum().item()
            for row in plan.batch.gradient.stored:
                pieces = row.split([p.numel() for p in named.values()])
                moved = {n: -plan.step.gradient.factor * plan.step.gradient_scale[n] * y.view(p.shape)
                         for (n, p), y in zip(named.items(), pieces, strict=True)}  # fmt: skip
                exact.append(dot(slope, moved))
                every.append(dot(whole, moved) / size)
            exact, every = torch.tensor(exact), torch.tensor(every)
            gaps.append([(prediction.by_prompt - exact).mean().item(), (every - exact).mean().item()])
    gaps = torch.tensor(gaps, dtype=torch.float64)
    return gaps.mean(0) / (gaps.std(0) / len(gaps) ** 0.5)


def test_contributions_are_unbiased():
    assert abs(z_of_contributions(40)[0]) < 4


@pytest.mark.slow
def test_contributions_are_unbiased_where_those_with_their_own_responses_are_not():
    z = z_of_contributions(2000)
    assert abs(z[0]) < 4
    assert abs(z[1]) > 4


def spread_and_error(number: int, normalization: str, prompts: int = 8, folds: int = 4) -> tuple[float, float]:
    """Of the first prompt's contribution, whose responses stay, over batches with others: its spread, and its error."""
    model, seen, errors = TinyPolicy(), [], []
    optimizer, generator = trained_optimizer(model), torch.Generator().manual_seed(3)
    for state in optimizer.state.values():
        state["step"] = torch.tensor(500.0)
    subject = probe(model, optimizer, max_grad_norm=None, normalization=normalization, **SETTINGS)
    first = TABLE.sample_groups(model, 1, 4, generator)
    for _ in range(number):
        rows = torch.cat([first, TABLE.sample_groups(model, prompts - 1, 4, generator)])
        found = subject.attribute(update=TABLE.update_batch(rows, 4), folds=folds)
        seen.append(found.prompts[0].item())
        errors.append(found.standard_errors[0].item())
    return torch.tensor(seen).std().item(), torch.tensor(errors).square().mean().sqrt().item()


def test_errors_of_contributions_are_their_spread_over_other_prompts():
    spread, error = spread_and_error(16, "sequence")
    assert 0.5 < error / spread < 1.8


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_errors_of_contributions_are_their_spread_over_many_batches(normalization):
    spread, error = spread_and_error(100, normalization)
    assert 0.75 < error / spread < 1.3


def test_what_one_batch_cannot_have():
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model))
    with pytest.raises(ValueError, match="evaluation: expected rollouts beside questions or pool"):
        subject.attribute(update=batches()[0], pool=True)
    with pytest.raises(ValueError, match="attribution_folds: expected 2 to 4, half the number of prompts, got 5"):
        subject.attribute(update=batches()[0], folds=5)
