"""The step of a gradient from outside: the prediction of that very step, with the error it has, and no other."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

from entropy_probe import EntropyProbe, ProbeConfig, ProbeResult, Rollouts
from tests.invariants.problems import TABLE, batches, float32_problem, numbers, probe
from tests.notes import texts
from tests.reference.enumeration import TEMPERATURE, TinyPolicy, trained_optimizer


def loss_gradient(model: nn.Module, update: Rollouts) -> dict[str, torch.Tensor]:
    """Of the dapo loss, by autograd."""
    log_p = torch.log_softmax(model(update.input_ids, update.attention_mask.long()).logits / TEMPERATURE, -1)
    s = log_p[:, :-1].gather(-1, update.input_ids[:, 1:, None])[..., 0] * update.response_mask[:, 1:]
    loss = -(s * update.token_advantages[:, 1:]).sum() / update.response_mask.sum()
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def random_gradient(model: nn.Module, seed: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 1e-3}, {"geometry": "frozen"}], ids=str)
def test_the_trainers_gradient_gives_the_numbers_of_its_batch(settings):
    model = TinyPolicy()
    optimizer = trained_optimizer(model, weight_decay=0.1)
    update, evaluation = batches()
    subject = probe(model, optimizer, **settings)
    expected = subject.run(update=update, evaluation=evaluation)
    got = subject.run(gradient=loss_gradient(model, update), evaluation=evaluation)
    assert got.predicted
    assert expected.predicted
    assert got.predicted.se_update is None
    assert got.predicted.se_update_method is None
    assert got.predicted.standard_error == got.predicted.se_evaluation
    assert got.predicted.se_evaluation == pytest.approx(expected.predicted.se_evaluation, rel=1e-9)
    assert got.components.keys() == expected.components.keys()
    for name, part in got.components.items():
        assert part.value == pytest.approx(expected.components[name].value, rel=1e-9)
    assert got.components["gradient"].standard_error < expected.components["gradient"].standard_error
    assert got.realized
    assert expected.realized
    assert got.realized.value == pytest.approx(expected.realized.value, rel=1e-9)
    found = got.diagnostics
    assert (found.num_update_sequences, found.num_update_prompts, found.gradient_agreement) == (None, None, None)
    assert found.clip_factor == pytest.approx(expected.diagnostics.clip_factor)
    assert any("errors are from the evaluation rollouts alone" in text for text in texts(found.notes))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_the_result_has_the_step_that_the_optimizer_takes(optimizer):
    model = TinyPolicy()
    trained = trained_optimizer(model, cls=optimizer, weight_decay=0.1)
    gradient = {**random_gradient(model), "inner.bias": None}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = probe(model, trained).predict(gradient=gradient, evaluation=batches()[1])
    real, moments = copy.deepcopy((model, trained.state_dict()))
    again = optimizer(real.parameters(), lr=1e-3, weight_decay=0.1)
    again.load_state_dict(moments)
    for n, p in real.named_parameters():
        p.grad = None if gradient[n] is None else gradient[n].clone()
    torch.nn.utils.clip_grad_norm_(real.parameters(), 1.0)
    again.step()
    assert result.step
    for n, p in real.named_parameters():
        torch.testing.assert_close(result.step.delta[n], p.detach() - before[n], rtol=1e-9, atol=1e-15)
        if gradient[n] is None:
            assert result.step.gradient[n] is None
        else:
            torch.testing.assert_close(result.step.gradient[n], p.grad, rtol=1e-9, atol=0.0)
    assert result.predicted
    assert result.predicted.se_update is None
    assert bool(result.components) == (optimizer is not torch.optim.SGD)


def test_vectors_are_not_saved_and_are_a_copy(tmp_path):
    model = TinyPolicy()
    gradient = random_gradient(model)
    result = probe(model, trained_optimizer(model), max_grad_norm=None).predict(
        gradient=gradient, evaluation=batches()[1]
    )
    assert result.step
    kept = {n: g.clone() for n, g in gradient.items()}
    for g in gradient.values():
        g.zero_()  # as the trainer does next
    assert all(torch.equal(result.step.gradient[n], kept[n]) for n in kept)
    assert "inner.weight" not in result.save(tmp_path).read_text()
    loaded = ProbeResult.load(tmp_path)
    assert loaded == result.model_copy(update={"contributions": None, "step": None})
    assert ProbeResult.model_json_schema()["properties"].keys() >= {"predicted", "diagnostics"}


@pytest.mark.parametrize(("factor", "distance"), [(1.0, 0.0), (2.0, 0.5), (-1.0, 2.0)])
def test_beside_a_batch_both_gradients_are_compared(factor, distance):
    model = TinyPolicy()
    update, evaluation = batches()
    gradient = {n: factor * g for n, g in loss_gradient(model, update).items()}
    subject = probe(model, trained_optimizer(model))
    result = subject.run(gradient=gradient, update=update, evaluation=evaluation)
    alone = subject.run(gradient=gradient, evaluation=evaluation)
    agreement = result.diagnostics.gradient_agreement
    assert agreement
    assert agreement.relative_distance == pytest.approx(distance, abs=1e-7)
    assert agreement.cosine == pytest.approx(1.0 if factor > 0 else -1.0)
    assert result.predicted == alone.predicted
    assert result.realized == alone.realized
    assert result.diagnostics.num_update_prompts == update.num_prompts
    differs = [text for text in texts(result.diagnostics.notes) if "away from the one given" in text]
    assert len(differs) == (distance > 0)
    assert numbers(subject.run(update=update, evaluation=evaluation))["se_update"] > 0


def test_a_gradient_of_another_loss_is_told():
    """A KL term that the settings leave out."""
    model = TinyPolicy()
    update, evaluation = batches()
    own, other = loss_gradient(model, update), random_gradient(model)
    given = {n: own[n] + 0.01 * other[n] for n in own}
    result = probe(model, trained_optimizer(model)).predict(gradient=given, update=update, evaluation=evaluation)
    agreement = result.diagnostics.gradient_agreement
    assert agreement
    flat = [torch.cat([x[n].flatten() for n in own]) for x in (given, own)]
    assert agreement.relative_distance == pytest.approx(float((flat[0] - flat[1]).norm() / flat[0].norm()))
    assert agreement.cosine == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)))


@pytest.mark.parametrize("norm", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
def test_unbiased_and_covering(norm):
    """Against the exact slope of the entropy along the step, which the evaluation rollouts do not enter."""
    model = TinyPolicy()
    gradient = random_gradient(model)
    subject = probe(model, trained_optimizer(model), normalization=norm, measure_noise_floor=False)
    generator = torch.Generator().manual_seed(7)
    results = [
        subject.predict(gradient=gradient, evaluation=TABLE.rollouts.select(TABLE.sample(model, 200, generator)))
        for _ in range(200)
    ]
    delta = results[0].step.delta
    at = {n: p.detach() for n, p in model.named_parameters()}

    class Bound(nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values = values

        def forward(self, *args):
            return functional_call(model, self.values, args)

    _, exact = jvp(lambda values: TABLE.entropy(Bound(values), norm), (at,), (delta,))
    values, errors = (torch.tensor([getattr(r.predicted, k) for r in results]) for k in ("value", "standard_error"))
    z = (values.mean() - exact) / (values.std() / len(values) ** 0.5)
    assert abs(z) < 4
    assert 0.9 <= ((values - exact).abs() <= 1.97 * errors).double().mean() <= 0.99


def test_dropout_is_in_a_gradient_from_outside():
    model = TinyPolicy()
    model.dropout = nn.Dropout(0.1)
    update, evaluation = batches()
    subject = probe(model, trained_optimizer(model))
    given = subject.predict(gradient=random_gradient(model), evaluation=evaluation)
    assert given.diagnostics.not_modelled == ()
    own = subject.predict(update=update, evaluation=evaluation)
    assert "dropout" in own.diagnostics.not_modelled[0]


BAD = {
    "missing": (lambda g: {n: x for n, x in g.items() if n != "out.bias"}, r"of which 'out.bias' is missing; take it"),
    "extra": (lambda g: g | {"head": g["out.bias"]}, r"of which 'head' is not one of them; take it"),
    "prefixed": (lambda g: {f"module.{n}": x for n, x in g.items()}, r"'embed.weight' is missing \(and 9 more\)"),
    "shape": (lambda g: g | {"out.bias": torch.zeros(2)}, r"gradient: out\.bias: expected shape \(\d+,\), got \(2,\)"),
    "kind": (lambda g: g | {"out.bias": torch.zeros(4).long()}, r"out\.bias: .* floating-point tensor, got .*int64"),
    "no tensor": (lambda g: g | {"out.bias": [0.0]}, r"out\.bias: expected a dense floating-point tensor, got list"),
    "sparse": (lambda g: g | {"embed.weight": g["embed.weight"].to_sparse()}, r"got torch\.sparse_coo of torch"),
    "nan": (lambda g: g | {"out.bias": g["out.bias"] * float("nan")}, r"out\.bias: expected finite values, got \d+ "),
    "infinite": (lambda g: g | {"out.bias": g["out.bias"] * float("inf")}, r"out\.bias: expected finite values"),
    "none at all": (dict.fromkeys, r"expected a tensor for some parameter, got none for any; take it after"),
    "empty": (lambda g: {}, r"'embed.weight' is missing \(and 4 more\)"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("what", ["predict", "run", "measure"])
def test_unusable_gradients_are_refused_in_one_line(case, what):
    model = TinyPolicy()
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message) as raised:
        getattr(probe(model, trained_optimizer(model)), what)(
            gradient=change(random_gradient(model)), evaluation=batches()[1]
        )
    assert "\n" not in str(raised.value)


def test_something_must_be_given():
    model = TinyPolicy()
    update, evaluation = batches()
    subject = probe(model, trained_optimizer(model))
    for what in (subject.predict, subject.run, subject.measure):
        with pytest.raises(ValueError, match="rollouts to take the step on, or a gradient, got neither"):
            what(evaluation=evaluation)
    with pytest.raises(ValueError, match="which without_prompts divides, got that of a gradient"):
        subject.run(
            update=update,
            evaluation=evaluation,
            gradient=random_gradient(model),
            questions={"without_prompts": {"prompts": [[0]]}},
        )
    measured = subject.measure(update=update, evaluation=update, gradient=random_gradient(model)).realized
    assert measured
    assert measured.batch == "update"


def test_a_gradient_in_another_precision_is_taken_as_it_is():
    model, optimizer, _, evaluation = float32_problem()
    low = {n: g.bfloat16() for n, g in random_gradient(model).items()}
    subject = EntropyProbe(model, optimizer, ProbeConfig())
    results = [
        subject.predict(gradient=g, evaluation=evaluation) for g in (low, {n: g.float() for n, g in low.items()})
    ]
    assert results[0].predicted == results[1].predicted
