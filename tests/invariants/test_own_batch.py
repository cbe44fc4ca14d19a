"""The batch of the step as its own evaluation batch, against exact sums over all responses of the enumerable policy."""

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.analyses import policy as policies
from entropy_probe.analyses.horizons import measure_horizons, measured_within
from entropy_probe.analyses.measure import measure
from entropy_probe.analyses.own_batch import measure_own, measure_own_taken, own_prediction, predict_own
from entropy_probe.analyses.predict import entropy_surrogate
from entropy_probe.estimators.uncertainty import Sampled
from entropy_probe.named import add, dot, scale
from entropy_probe.results.student import critical_value, degrees_of
from entropy_probe.scoring.cache import fingerprint
from entropy_probe.scoring.isolation import parameters_at
from entropy_probe.steps.plan import stepped_parameters
from tests.invariants.exact import Bound
from tests.reference.enumeration import LONGEST, TEMPERATURE, Table, TinyPolicy, trained_optimizer

TABLE = Table.build()
RATE = 3e-3
OTHERS = {"sgd": 0.05, "nesterov": 0.05, "rmsprop": 1e-3, "adafactor": 1e-2}
"""Learning rates of optimizers whose step is taken on copies."""


def batch(generator: torch.Generator, prompts: int, group: int) -> Rollouts:
    return TABLE.update_batch(TABLE.sample_groups(TinyPolicy(), prompts, group, generator), group)


def history(model: TinyPolicy, kind: str, step: int, size: float) -> torch.optim.Optimizer:
    """An optimizer after some steps, with moments of this size; those of random gradients are of size 1."""
    cls, options = {
        "adamw": (torch.optim.AdamW, {}),
        "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
        "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9}),
        "adafactor": (torch.optim.Adafactor, {}),
    }[kind]
    optimizer = trained_optimizer(model, cls=cls, **options)
    for state in optimizer.state.values():
        for name, value in state.items():
            if name == "step":
                state[name] = torch.tensor(float(step))
            elif value is not None:
                value *= size if name in ("exp_avg", "momentum_buffer") else size**2
    return optimizer


def margin(estimate: Sampled) -> float:
    """How far the 95% interval reaches."""
    return critical_value(degrees_of(len(estimate.influence), estimate.skewness)) * estimate.standard_error


class Repeated:
    """Estimates and exact values over many batches."""

    def __init__(self, prompts: int, group: int, norm: str, step: int, batches: int, *, measured: bool,
                 optimizer: str = "adamw", size: float = 0.02, rate: float = RATE, **settings):  # fmt: skip
        model = TinyPolicy()
        trained = history(model, optimizer, step, size)  # 0.02: as large as this policy's gradients
        fields = {"temperature": TEMPERATURE, "merge_equal_prompts": False, "learning_rate": rate,
                  "loss_type": "dr_grpo", "max_completion_length": LONGEST, "normalization": norm,
                  "measure_noise_floor": False}  # fmt: skip
        probe = EntropyProbe(model, trained, ProbeConfig(**(fields | settings)))
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        h = TABLE.entropy(model, norm)
        slope = dict(zip(named, torch.autograd.grad(h, list(named.values())), strict=True))
        generator, rows = torch.Generator().manual_seed(5), []
        for _ in range(batches):
            with probe._opened() as policy:
                prediction = predict_own(policy, batch(generator, prompts, group))
                plan = prediction.plan
                over_batches = Sampled(prediction.change.value, prediction.influence)
                row = [prediction.change.value, dot(slope, plan.step.delta), margin(prediction.change),
                       margin(over_batches), prediction.all_pairs.value]  # fmt: skip
                if measured:
                    stepped, _ = stepped_parameters(named, trained, plan.step, policy.config, rate)
                    with torch.no_grad():
                        exact = TABLE.entropy(Bound(model, stepped), norm) - h
                    plain, own = measure(plan).measurement.change, measure_own(prediction).measurement.change
                    row += [own.value, exact.item(), margin(own), plain.value]
                rows.append(row)
        self.columns = torch.tensor(rows, dtype=torch.float64).T

    def z(self, estimate: int, truth: int) -> float:
        gap = self.columns[estimate] - self.columns[truth]
        return (gap.mean() / (gap.std() / len(gap) ** 0.5)).item()

    def coverage(self, estimate: int, truth: torch.Tensor, reach: int) -> float:
        return ((self.columns[estimate] - truth).abs() <= self.columns[reach]).double().mean().item()


CASES = [
    (16, 4, "token", 12, {}),
    pytest.param(16, 2, "sequence", 500, {"max_grad_norm": 1e-2}, marks=pytest.mark.slow),
    pytest.param(8, 8, "token", 1, {"loss_type": "dapo"}, marks=pytest.mark.slow),
    pytest.param(8, 8, "sequence", 1, {"optimizer": "sgd", "rate": 0.05}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("prompts", "group", "norm", "step", "settings"), CASES)
def test_unbiased_and_covering(prompts, group, norm, step, settings):
    seen = Repeated(prompts, group, norm, step, 100, measured=True, **settings)
    assert abs(seen.z(0, 1)) < 4
    assert abs(seen.z(5, 6)) < 4
    assert 0.88 <= seen.coverage(0, seen.columns[1], 2) <= 0.99
    assert 0.88 <= seen.coverage(0, seen.columns[1].mean(), 3) <= 0.99
    assert 0.88 <= seen.coverage(5, seen.columns[6], 7) <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["token", "sequence"])
@pytest.mark.parametrize("max_grad_norm", [None, 1e-2])
@pytest.mark.parametrize(
    ("prompts", "group", "step", "settings"),
    [
        *((prompts, group, step, {}) for prompts in (8, 16, 64) for group in (2, 8) for step in (1, 12, 500)),
        *((8, 8, 3, {"optimizer": kind, "rate": rate}) for kind, rate in OTHERS.items()),
    ],
    ids=str,
)
def test_bias_and_coverage_long(prompts, group, step, settings, norm, max_grad_norm):
    seen = Repeated(prompts, group, norm, step, 2000, measured=True, max_grad_norm=max_grad_norm, **settings)
    assert abs(seen.z(0, 1)) < 4
    assert abs(seen.z(5, 6)) < 4
    assert 0.92 <= seen.coverage(0, seen.columns[1], 2) <= 0.98
    assert 0.92 <= seen.coverage(0, seen.columns[1].mean(), 3) <= 0.98
    assert 0.92 <= seen.coverage(5, seen.columns[6], 7) <= 0.98


@pytest.mark.slow
def test_all_pairs_are_seen_to_be_off():
    seen = Repeated(4, 4, "sequence", 500, 2000, measured=False, size=0.0, max_grad_norm=None)
    assert abs(seen.z(4, 1)) > 4
    assert abs(seen.z(0, 1)) < 4


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adafactor"])
@pytest.mark.parametrize("kept_gib", [1.0, 0.0])
def test_steps_without_a_prompt_one_by_one(kept_gib, kind):
    model = TinyPolicy()
    optimizer = history(model, kind, 2, 0.02)
    config = ProbeConfig(
        temperature=TEMPERATURE,
        merge_equal_prompts=False,
        learning_rate=RATE,
        loss_type="dapo",
        normalization="sequence",
        max_grad_norm=1e-2,
        max_stored_gradient_gib=kept_gib,
    )
    rollouts = batch(torch.Generator().manual_seed(1), 5, 3)
    with EntropyProbe(model, optimizer, config)._opened() as policy:
        prediction = predict_own(policy, rollouts)
        plan = prediction.plan
        surrogate = entropy_surrogate(plan)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    log_p = torch.log_softmax(model(rollouts.input_ids, rollouts.attention_mask.long()).logits / TEMPERATURE, -1)
    s = torch.nn.functional.pad(log_p[:, :-1].gather(-1, rollouts.input_ids[:, 1:, None])[..., 0], (1, 0))
    h = torch.nn.functional.pad(-(log_p.exp() * log_p).sum(-1)[:, :-1], (1, 0))
    x_rows = (surrogate.logprobs * s + surrogate.entropies * h).sum(1)
    y_rows = (plan.batch.loss.logprobs * s).sum(1)

    def by_prompt(rows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        values = [rows[rollouts.prompt_ids == u].sum() for u in range(5)]
        return [
            dict(zip(named, torch.autograd.grad(v, list(named.values()), retain_graph=True), strict=True))
            for v in values
        ]

    def step(gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        moving, own = copy.deepcopy((model, optimizer))
        for p, g in zip(moving.parameters(), gradient.values(), strict=True):
            p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(list(moving.parameters()), 1e-2)
        own.param_groups[0]["lr"] = RATE
        own.step()
        return {name: p.detach() - named[name].detach() for name, p in moving.named_parameters()}

    xs, ys = by_prompt(x_rows), by_prompt(y_rows)
    tokens = torch.tensor([float(rollouts.response_lengths[rollouts.prompt_ids == u].sum()) for u in range(5)])
    whole, mean = add(*ys), scale(1 / 5, add(*xs))
    taken, own, across = step(whole), [], []
    for u, share in enumerate((tokens / tokens.sum()).tolist()):
        others = step(scale(1 / (1 - share), add(*(y for w, y in enumerate(ys) if w != u))))
        moved_by = {name: taken[name] - others[name] for name in named}
        own.append(dot(xs[u], moved_by))
        across.append(dot(mean, moved_by))
    all_pairs = sum(dot(x, taken) for x in xs) / 15
    assert prediction.all_pairs.value == pytest.approx(all_pairs, rel=1e-9)
    assert prediction.change.value == pytest.approx(all_pairs - (sum(own) - sum(across)) / 15, rel=1e-9)
    expected = 4 * (torch.tensor(across, dtype=torch.float64) - sum(across) / 5) / 3
    torch.testing.assert_close(prediction.of_update, expected, rtol=1e-7, atol=1e-12)
    assert prediction.se_update == pytest.approx((expected.std() / 5**0.5).item(), rel=1e-7)
    if kind != "adamw":
        assert prediction.by_prompt is None
        assert not prediction.parts
        return
    assert sum(part.value for part in prediction.parts.values()) == pytest.approx(prediction.change.value, rel=1e-12)
    gradient = plan.step
    moved = [{n: -gradient.gradient.factor * gradient.gradient_scale[n] * y[n] for n in y} for y in ys]
    pairs = torch.tensor([[dot(x, m) for m in moved] for x in xs], dtype=torch.float64)
    different = pairs - pairs.diagonal().diag()
    torch.testing.assert_close(prediction.by_prompt, 5 / 4 * different.sum(0) / 15, rtol=1e-8, atol=1e-15)


def test_refusals():
    model = TinyPolicy()
    config = ProbeConfig(temperature=TEMPERATURE, merge_equal_prompts=False)
    generator = torch.Generator().manual_seed(2)
    with pytest.raises(ValueError, match=r"one batch: expected at least 3 distinct prompts.*got 2"):
        EntropyProbe(model, trained_optimizer(model), config).one_batch(batch(generator, 2, 4))


def test_the_result_of_an_optimizer_without_a_closed_form():
    model = TinyPolicy()
    config = ProbeConfig(temperature=TEMPERATURE, merge_equal_prompts=False)
    probe = EntropyProbe(model, history(model, "nesterov", 3, 0.02), config)
    result = probe.one_batch(batch(torch.Generator().manual_seed(2), 8, 4))
    assert not result.components
    assert result.predicted.se_update > 0
    assert result.predicted.se_update_method == "pairs"
    assert result.realized.batch == "own"
    assert any(note.code == "step_on_copies" for note in result.diagnostics.notes)


def test_weights_are_recognised_once_in_a_run():
    model = TinyPolicy()
    config = ProbeConfig(temperature=TEMPERATURE, merge_equal_prompts=False, horizon=None)
    probe = EntropyProbe(model, trained_optimizer(model), config)
    taken = []

    def counted(tensors):
        tensors = list(tensors)
        taken.append([name for name, _ in tensors])
        return fingerprint(tensors)

    rollouts = batch(torch.Generator().manual_seed(2), 6, 4)
    with mock.patch.object(policies, "fingerprint", counted):
        first = probe.one_batch(rollouts)
        assert sum("out.bias" in names for names in taken) == 1
        with torch.no_grad():
            model.out.bias[0] += 0.1
        assert probe.one_batch(rollouts).entropy.value != first.entropy.value
        assert sum("out.bias" in names for names in taken) == 2


def test_a_batch_that_was_stepped_on_before_is_said():
    model = TinyPolicy()
    config = ProbeConfig(temperature=TEMPERATURE, merge_equal_prompts=False)
    rollouts = batch(torch.Generator().manual_seed(2), 6, 4)
    for gap, said in ((0.0, False), (0.05, True)):
        old = TABLE.token_scores(model).logprobs.detach()
        index = {tuple(ids.tolist()): k for k, ids in enumerate(TABLE.rollouts.input_ids)}
        rows = torch.tensor([index[tuple(ids.tolist())] for ids in rollouts.input_ids])
        given = replace(rollouts, old_logprobs=old[rows] - gap * rollouts.response_mask)
        notes = EntropyProbe(model, trained_optimizer(model), config).one_batch(given).diagnostics.notes
        assert any(note.code == "used_before" for note in notes) == said


@pytest.mark.parametrize("norm", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_profile_is_that_of_the_gradients_within_each_horizon(kind, norm):
    """From three scorings, against the prediction that differentiates the entropy within the horizon."""
    model = TinyPolicy()
    fields = {"temperature": TEMPERATURE, "merge_equal_prompts": False, "learning_rate": 1e-5, "loss_type": "dr_grpo",
              "max_completion_length": LONGEST, "normalization": norm, "max_grad_norm": None}  # fmt: skip
    probe = EntropyProbe(model, history(model, kind, 1, 0.02), ProbeConfig(**fields))
    with probe._opened() as policy:
        prediction = predict_own(policy, batch(torch.Generator().manual_seed(5), 8, 4))
        profile = measure_horizons(prediction, measure_own(prediction))
        assert profile
        for point in profile.points:
            own = prediction if point.horizon is None else own_prediction(prediction.plan, point.horizon)
            apart = (own.all_pairs - own.change).value
            plain = measured_within(own, measure(own.plan)).measurement.change
            assert plain
            assert point.realized
            assert abs(apart) > 1e-3 * abs(own.change.value)
            assert point.predicted.value == pytest.approx(own.change.value, abs=1e-2 * abs(apart))
            assert point.predicted.standard_error == pytest.approx(own.change.standard_error, rel=0.1)
            assert point.realized.value == pytest.approx(plain.value - apart, abs=1e-2 * abs(apart))


@pytest.mark.parametrize("norm", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
def test_second_order_of_a_part_of_the_prompts_stands_for_that_of_all(norm):
    """8 of 32 prompts, in the change of a step that was taken and in the profile."""
    model = TinyPolicy()
    fields = {"temperature": TEMPERATURE, "merge_equal_prompts": False, "learning_rate": RATE, "loss_type": "dr_grpo",
              "max_completion_length": LONGEST, "normalization": norm, "measure_noise_floor": False}  # fmt: skip
    probe, generator = EntropyProbe(model, history(model, "adamw", 12, 0.02), ProbeConfig(**fields)), torch.Generator()
    z, ratios, gaps, curvatures = [], [], [], []
    for _ in range(6):
        with probe._opened() as policy:
            prediction = predict_own(policy, batch(generator, 32, 4))
            measured = measure_own(prediction)
            whole = measured.measurement.change
            beyond = whole - prediction.change
            stepped, _ = stepped_parameters(
                policy.parameters, policy.optimizer, prediction.plan.step, policy.config, RATE
            )
            with parameters_at(policy.parameters, stepped):
                part = measure_own_taken(prediction).measurement
            assert part.change.value == pytest.approx(prediction.change.value + part.beyond.value, rel=1e-12)
            assert len(part.after.response_mask) == 32
            z.append((part.beyond.value - beyond.value) / part.beyond.standard_error)
            ratios.append(part.change.standard_error / whole.standard_error)
            for point in measure_horizons(prediction, measured).points[:1]:
                exact = own_prediction(prediction.plan, point.horizon).change.value
                gaps.append(point.predicted.value - exact)
                curvatures.append(point.realized.value - exact)
    z, gaps, curvatures = (torch.tensor(x, dtype=torch.float64) for x in (z, gaps, curvatures))
    assert abs(z.mean().item()) * len(z) ** 0.5 < 4
    assert 0.4 < z.square().mean().sqrt().item() < 1.6
    assert min(ratios) == pytest.approx(1, abs=0.05)
    assert max(ratios) == pytest.approx(1, abs=0.05)
    assert gaps.abs().max() < 0.05 * curvatures.mean()
