"""The momentum part by step of origin, against an optimizer that took these steps."""

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig
from entropy_probe.named import dot
from entropy_probe.report.sections.base import Table
from entropy_probe.report.sections.run import step_section
from tests.invariants.problems import batches
from tests.reference.enumeration import TEMPERATURE, TinyPolicy

TAKEN = 6


def stepped(cls=torch.optim.AdamW, **options):
    """A policy, an optimizer with so many steps behind it, and their gradients, the last one first."""
    model, generator, past = TinyPolicy(), torch.Generator().manual_seed(2), []
    groups = [{"params": [model.embed.weight], "betas": (0.6, 0.99)}, {"params": [*model.inner.parameters()]}]
    optimizer = cls([*groups, {"params": [*model.out.parameters()]}], lr=1e-3, **options)
    for _ in range(TAKEN):
        for p in model.parameters():
            p.grad = 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        past.insert(0, {name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, past


def predicted(model, optimizer, past, **settings):
    update, evaluation = batches(n=50)
    config = ProbeConfig(temperature=TEMPERATURE, **settings)
    probe = EntropyProbe(model, optimizer, config, past_gradients=past)
    return probe.predict(update=update, evaluation=evaluation)


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_parts_of_a_whole_record_sum_to_the_momentum_part(normalization):
    model, optimizer, past = stepped(amsgrad=True)
    result = predicted(model, optimizer, past, normalization=normalization)
    momentum, origins = result.components["momentum"], result.origins
    assert len(origins.steps) == TAKEN
    assert sum(part.value for part in origins.steps) == pytest.approx(momentum.value, rel=1e-10)
    assert abs(origins.older.value) < 1e-12 * abs(momentum.value)
    assert origins.older.standard_error < 1e-10 * momentum.standard_error
    (table,) = (x for x in step_section(result).blocks if isinstance(x, Table) and "origin" in x.title)
    assert [row[0] for row in table.rows] == ["the last step", *(f"{k} steps ago" for k in range(2, 7)), "older"]


def test_steps_without_a_gradient_do_not_age_a_moment():
    """Nor do gradients from before the optimizer's first step count."""
    model, generator, past = TinyPolicy(), torch.Generator().manual_seed(2), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for k in range(TAKEN):
        for p in model.parameters():
            gradient = 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.grad = None if p is model.embed.weight and k in (1, 4) else gradient
        past.insert(0, {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    optimizer.zero_grad()
    earlier = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    result = predicted(model, optimizer, [*past, earlier])
    assert abs(result.origins.older.value) < 1e-12 * abs(result.components["momentum"].value)
    assert result.origins.steps[-1].value == 0


def test_a_part_is_what_the_momentum_part_is_less_without_that_gradient():
    """Taken again without one of the gradients, in the first moment alone, the step differs by that gradient's part."""
    model, optimizer, past = stepped()
    whole = predicted(model, optimizer, past[:3])
    again = {n: [g[n] if k != 1 else torch.zeros_like(g[n]) for k, g in enumerate(past)] for n in past[0]}
    for name, p in model.named_parameters():
        beta1 = 0.6 if name == "embed.weight" else 0.9
        optimizer.state[p]["exp_avg"] = sum((1 - beta1) * beta1**k * g for k, g in enumerate(again[name]))
    without = predicted(model, optimizer, [])
    lost = whole.components["momentum"].value - without.components["momentum"].value
    assert whole.origins.steps[1].value == pytest.approx(lost, rel=1e-9)
    known = sum(part.value for part in whole.origins.steps)
    assert whole.origins.older.value == pytest.approx(whole.components["momentum"].value - known, rel=1e-9)
    assert abs(whole.origins.older.value) > 1e-3 * abs(known)
    assert without.origins is None


def test_gradients_of_other_steps_are_refused():
    model, optimizer, past = stepped()
    assert dot(past[0], past[0]) != dot(past[1], past[1])
    for wrong in (past[::-1], [{n: 0.5 * g for n, g in x.items()} for x in past], past[1:] + past[:1]):
        with pytest.raises(ValueError, match=r"they do not make the first moment of embed\.weight"):
            predicted(model, optimizer, wrong)
    coupled = stepped(torch.optim.Adam, weight_decay=0.1)
    assert abs(predicted(*coupled).origins.older.value) > 0  # decay is in those moments
    with pytest.raises(ValueError, match=r"past_gradients: expected torch.optim.AdamW or Adam, .* got torch.optim.SGD"):
        predicted(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), past)
    with pytest.raises(ValueError, match="gradient: expected the names"):
        predicted(model, optimizer, [{"a": torch.ones(1)}])
