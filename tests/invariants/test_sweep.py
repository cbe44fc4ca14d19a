"""The sweep as a whole, on the enumerable policy: every point is the probe at that rate, and it can be resumed."""

import pytest
import torch
from torch import nn

from entropy_probe import Sweep, SweepPoint, TokenScores
from entropy_probe.analyses import sweep as analysis
from entropy_probe.analyses.horizons import measured_within
from entropy_probe.analyses.measure import measure
from entropy_probe.analyses.own_batch import own_prediction, predict_own, without_own
from entropy_probe.scoring.directional import directional_derivatives
from tests.invariants.problems import batches, probe
from tests.invariants.traces import assert_same, state
from tests.notes import texts
from tests.reference.enumeration import TinyPolicy, trained_optimizer

RATES = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def setting(**options):
    model = TinyPolicy()
    return model, trained_optimizer(model, weight_decay=0.1, **options)


def swept(model, optimizer, rates=RATES, seed=0, **arguments) -> Sweep:
    config = arguments.pop("config", {})
    update, evaluation = batches(seed, n=200)
    return probe(model, optimizer, **config).sweep(
        update=update, evaluation=evaluation, learning_rates=rates, **arguments
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"normalization": "sequence"},
        {"realized": "snis", "entropy": "surprisal"},
        {"geometry": "frozen"},
        {"max_grad_norm": 1e-3},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_every_point_is_the_probe_at_that_rate(config, kind):
    """With two groups of different rates, which the swept rate replaces in both."""
    model, _ = setting()
    first, *rest = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind([{"params": [first], "lr": 1e-3}, {"params": rest, "lr": 5e-5}], weight_decay=0.1)
    optimizer.load_state_dict(trained_optimizer(model, cls=kind).state_dict() | {"param_groups": optimizer.state_dict()["param_groups"]})  # noqa: E501  # fmt: skip
    update, evaluation = batches(n=200)
    sweep = probe(model, optimizer, **config).sweep(update=update, evaluation=evaluation, learning_rates=RATES[:3])
    assert sweep.own_learning_rates == (1e-3, 5e-5)
    for point in sweep.points:
        expected = probe(model, optimizer, learning_rate=point.learning_rate, **config).run(
            update=update, evaluation=evaluation
        )
        for name in ("predicted", "realized", "difference"):
            got, wanted = getattr(point, name).model_dump(), getattr(expected, name).model_dump()
            assert got.keys() == wanted.keys()
            for key, value in wanted.items():
                number = isinstance(value, float)
                assert got[key] == (pytest.approx(value, rel=1e-6, abs=1e-12) if number else value), (name, key)
        clusters = torch.tensor(point.influence, dtype=torch.float64)
        assert float(clusters.std() / len(clusters) ** 0.5) == pytest.approx(point.realized.standard_error, rel=1e-12)
        assert sum(point.difference_influence) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("config", [{}, {"normalization": "sequence", "horizon": 2}], ids=str)
def test_one_batch_is_judged_by_itself_at_every_rate(config):
    model, optimizer = setting()
    update, _ = batches()
    sweep = probe(model, optimizer, **config).sweep(update=update, learning_rates=RATES[:3], direct_curvature=True)
    assert sweep.horizon == config.get("horizon")
    assert "curvature_of_one_batch" in [note.code for note in sweep.notes] or sweep.horizon is not None
    for point in sweep.points:
        at_rate = probe(model, optimizer, **config, learning_rate=point.learning_rate)
        with at_rate._opened() as policy:
            own = own_prediction(predict_own(policy, update).plan, sweep.horizon)
            measured = without_own(own, measured_within(own, measure(own.plan))).measurement.change
        assert point.predicted.value == pytest.approx(own.change.value, rel=1e-6)
        assert point.predicted.se_evaluation == pytest.approx(own.change.standard_error, rel=1e-6)
        assert point.realized.value == pytest.approx(measured.value, rel=1e-6)
        assert point.realized.standard_error == pytest.approx(measured.standard_error, rel=1e-6)
        assert point.realized.batch == "own"
        assert point.difference.value == pytest.approx(measured.value - own.change.value, rel=1e-3)
    with pytest.raises(ValueError, match="geometry: expected adamw for a step that is judged on its own batch"):
        probe(model, optimizer, geometry="frozen").sweep(update=update, learning_rates=RATES[:3])


def test_what_a_sweep_says():
    sweep = swept(*setting(), direct_curvature=True)
    assert [point.learning_rate for point in sweep.points] == list(RATES)
    end = sweep.linear_range.learning_rate
    assert end in RATES
    assert not sweep.linear_range.at_least
    for point in sweep.points:
        tolerance = 0.1 * max(abs(point.predicted.value), point.predicted.standard_error)
        if point.difference is None:
            assert point.learning_rate > end
            continue
        assert (abs(point.difference.value) <= tolerance) == (point.learning_rate <= end)
    assert sweep.fit is not None
    assert sweep.power_law is not None
    assert sweep.power_law.learning_rates == tuple(rate for rate in RATES if rate <= end)
    assert sweep.fit.learning_rates == tuple(rate for rate in RATES if 3 * rate <= end)
    assert sweep.power_law.slope.value == pytest.approx(1, abs=0.03)
    per_rate = sweep.prediction.predicted.value / RATES[-1]
    assert sweep.fit.linear.value == pytest.approx(per_rate, rel=1e-2)
    # two routes to the same derivative on the same batch: closer to each other than either to the truth
    curvature = sweep.curvature
    assert curvature.direct_slope.value == pytest.approx(per_rate, rel=1e-9)
    assert curvature.direct.value == pytest.approx(curvature.from_fit.value, rel=0.05)
    assert curvature.direct.standard_error == pytest.approx(curvature.from_fit.standard_error, rel=0.2)
    assert curvature.from_fit.value == 2 * sweep.fit.quadratic.value
    star = -sweep.fit.linear.value / sweep.fit.quadratic.value
    assert (sweep.learning_rate_star is None) == (star < 0)


def test_direct_curvature_agrees_for_every_estimator_and_unit():
    for config in ({"normalization": "sequence"}, {"entropy": "surprisal"}, {"evaluation_unit": "prompt"}):
        given = {"config": config | {"horizon": None}, "direct_curvature": True}
        sweep = swept(*setting(), rates=(1e-6, 1e-5, 1e-4, 1e-3), **given)
        assert texts(sweep.notes) == [], config
        assert sweep.curvature.direct.value == pytest.approx(sweep.curvature.from_fit.value, rel=0.02), config


def test_a_range_that_reaches_the_end_of_the_grid_is_a_lower_bound():
    sweep = swept(*setting(), rates=(1e-7, 1e-6, 1e-5))
    assert sweep.linear_range.learning_rate == 1e-5
    assert sweep.linear_range.at_least
    assert sweep.fit is None
    assert texts(sweep.notes) == ["no fit: expected at least 3 rates up to 3.33e-06, got 2"]


def test_too_large_rates_are_reported_and_not_fitted(monkeypatch):
    measure = analysis.measure_at

    def overflow(plan, rate, phase, floor):
        if rate > 10:
            raise ValueError("scores: expected finite log-probabilities")
        return measure(plan, rate, phase, floor)

    monkeypatch.setattr(analysis, "measure_at", overflow)
    sweep = swept(*setting(), rates=(1e-1, 1.0, 30.0))
    assert sweep.linear_range.learning_rate is None
    assert not sweep.linear_range.at_least
    assert sweep.fit is None
    assert sweep.power_law is None
    assert sweep.learning_rate_star is None
    assert [point.status for point in sweep.points][-1] == "failed"
    assert sweep.points[-1].realized is None
    assert sweep.points[-1].failure == "scores: expected finite log-probabilities"
    assert len(texts(sweep.notes)) == 2
    assert all("not even the smallest rate lies within the linear range" in message for message in texts(sweep.notes))


def test_points_of_low_ess_end_the_linear_range():
    sweep = swept(*setting(), config={"min_ess_fraction": 0.99999})
    statuses = [point.status for point in sweep.points]
    assert statuses[0] == "ok"
    refused = [status in ("low_ess", "high_pareto_k") for status in statuses]
    assert refused[-1]
    assert all(point.estimate is None for point, no in zip(sweep.points, refused, strict=True) if no)
    last_ok = refused.index(True) - 1
    assert sweep.linear_range.learning_rate == RATES[last_ok]


def test_resumed_points_are_taken_as_they_are_and_give_the_same_sweep(tmp_path):
    done: list[SweepPoint] = []
    whole = swept(*setting(), on_point=done.append)
    assert tuple(done) == whole.points
    for k, point in enumerate(done[:4]):
        point.save(tmp_path / f"{k}.json")
    saved = [SweepPoint.load(tmp_path / f"{k}.json") for k in range(4)]
    assert saved == done[:4]
    rest: list[SweepPoint] = []
    resumed = swept(*setting(), finished=saved, on_point=rest.append)
    assert rest == done[4:]
    assert resumed.model_dump_json() == whole.model_dump_json()


def test_rounding_of_half_the_noise_floor_joins_the_errors_of_the_fit():
    """The floor is two standard deviations."""
    plain: list[SweepPoint] = []
    without = swept(*setting(), on_point=plain.append, config={"measure_noise_floor": False})
    changes = {"noise_floor": 1e-3}
    noisy = [p.model_copy(update={"realized": p.realized.model_copy(update=changes)}) for p in plain]
    fit = swept(*setting(), finished=noisy, config={"measure_noise_floor": False}).fit
    rates = torch.tensor(fit.learning_rates, dtype=torch.float64)
    weights = torch.linalg.pinv(torch.stack([rates, rates**2], 1))
    for found, before, w in zip(
        (fit.linear, fit.quadratic), (without.fit.linear, without.fit.quadratic), weights, strict=True
    ):
        expected = (before.standard_error**2 + (0.5e-3 * w.norm().item()) ** 2) ** 0.5
        assert found.standard_error == pytest.approx(expected, rel=1e-6)


def test_a_saved_sweep_is_read_back_without_influences(tmp_path):
    sweep = swept(*setting(), rates=RATES[:3])
    sweep.save(tmp_path)
    loaded = Sweep.load(tmp_path)
    assert loaded.fit == sweep.fit
    assert loaded.points[0].realized == sweep.points[0].realized
    assert loaded.points[0].influence is None
    assert loaded.prediction.timing == {}
    assert loaded.prediction.memory == {}
    with pytest.raises(ValueError, match="finished: expected points at rates of this sweep, with their influences"):
        swept(*setting(), rates=RATES[:3], finished=loaded.points)
    with pytest.raises(ValueError, match="finished: expected points at rates of this sweep"):
        swept(*setting(), rates=RATES[1:4], finished=sweep.points)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match=r"sweep\.json: not a sweep of schema 3: .*: Field required"):
        Sweep.load(tmp_path)
    with pytest.raises(ValueError, match="expected a saved sweep, found no such file"):
        Sweep.load(tmp_path / "none")


def test_points_are_exactly_linear_in_prediction():
    sweep = swept(*setting())
    for point in sweep.points:
        factor = point.learning_rate / RATES[-1]
        for name in ("value", "standard_error", "se_evaluation", "se_update"):
            expected = factor * getattr(sweep.prediction.predicted, name)
            assert getattr(point.predicted, name) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rates", [[], [1e-3], [1e-3, 1e-3], [0.0, 1e-3], [-1e-3, 1e-3], [1e-3, float("inf")],
                                   [1e-3, float("nan"), 1e-2]])  # fmt: skip
def test_unusable_rates(rates):
    with pytest.raises(ValueError, match="learning_rates: expected at least 2, positive, finite and distinct, got"):
        swept(*setting(), rates=rates)


class WithoutForwardMode(TinyPolicy):
    """A policy with an operation that has no second derivative in forward mode."""

    def forward(self, input_ids, attention_mask):
        found = super().forward(input_ids, attention_mask)
        found.logits = nn.functional.mish(found.logits)
        return found


def test_a_model_without_forward_mode_is_swept_and_says_so():
    model = WithoutForwardMode()
    sweep = swept(model, trained_optimizer(model), rates=(1e-6, 1e-5, 1e-4, 1e-3), direct_curvature=True)
    assert sweep.curvature.direct is None
    assert sweep.curvature.direct_slope is None
    assert sweep.curvature.from_fit is not None
    (message,) = texts(sweep.notes)
    assert message.startswith("no direct curvature: the model cannot be differentiated twice in forward mode (Trying")


def test_a_slope_that_differs_between_the_two_modes_is_found_out(monkeypatch):
    def wrong(*arguments):
        first, second = directional_derivatives(*arguments)
        return TokenScores(2 * first.logprobs, first.entropies, first.response_mask), second

    monkeypatch.setattr("entropy_probe.analyses.sweep.directional_derivatives", wrong)
    sweep = swept(*setting(), rates=(1e-6, 1e-5, 1e-4, 1e-3), direct_curvature=True)
    assert sweep.curvature.direct is None
    (message,) = texts(sweep.notes)
    assert message.startswith("no direct curvature: in forward mode the first-order change is")


def test_nothing_is_left_behind():
    model, optimizer = setting()
    update, evaluation = batches(n=200)
    before = state(model, optimizer)
    arguments = {"update": update, "evaluation": evaluation, "learning_rates": RATES, "direct_curvature": True}
    probe(model, optimizer).sweep(**arguments)
    assert_same(before, state(model, optimizer))

    def fail(point: SweepPoint) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(model, optimizer).sweep(**arguments, on_point=fail)
    assert_same(before, state(model, optimizer))


def test_a_finished_schedule_does_not_matter():
    model, optimizer = setting()
    expected = swept(model, optimizer, rates=RATES[:3])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    update, evaluation = batches(n=200)
    found = probe(model, optimizer, learning_rate=1.0).sweep(
        update=update, evaluation=evaluation, learning_rates=RATES[:3]
    )
    assert [p.realized for p in found.points] == [p.realized for p in expected.points]
