"""Alarms on recorded series of the demo's task (benchmarks/alarms.py), and on single facts."""

from collections.abc import Sequence

import pytest

from entropy_probe.analyses.alarms import alarms, alarms_now
from entropy_probe.results.estimate import Estimate
from entropy_probe.results.live import StepRecord
from entropy_probe.results.probe import BatchFit, OptimizerStateReport, SamplerMismatch

# step, entropy, realized (else predicted) change and its error in thousandths, ESS, gradient norm, z of the fit;
# RATE: the learning rate grows by 3e-4 a step; SIGN: advantages are negated from step 11 on; HEALTHY: the demo's
RATE = (
    (2, 0.2439, -0.14, 2.28, 0.968, 0.29, 1.7), (3, 0.2240, 0.81, 3.82, 0.908, 0.40, -1.5),
    (4, 0.2319, 1.24, 1.51, 0.975, 0.39, 0.8), (5, 0.2360, -8.78, 1.88, 0.947, 0.41, 0.7),
    (6, 0.2238, -12.82, 4.78, 0.869, 0.35, 0.1), (7, 0.2039, -8.45, 2.98, 0.960, 0.39, -0.6),
    (8, 0.2049, -7.28, 3.03, 0.910, 0.39, -0.3), (9, 0.2034, -9.17, 4.56, 0.926, 0.28, -1.4),
    (10, 0.1506, -16.88, 3.63, 0.910, 0.39, 0.8), (11, 0.1382, -20.33, 3.57, 0.924, 0.40, 1.6),
    (12, 0.1180, -14.61, 3.15, 0.930, 0.35, -1.0),
)  # fmt: skip
SIGN = (
    (6, 0.2257, -2.94, 0.96, 0.989, 0.30, 0.1), (7, 0.2164, -2.75, 0.57, 0.998, 0.31, -1.4),
    (8, 0.2260, -1.29, 0.20, 0.999, 0.25, 0.4), (9, 0.2367, -0.77, 0.65, 0.994, 0.32, 0.2),
    (10, 0.1972, -1.30, 0.57, 0.999, 0.29, 0.9), (11, 0.2043, -1.01, 0.30, 0.998, 0.28, -0.4),
    (12, 0.1917, -1.49, 0.46, 0.999, 0.27, -0.5), (13, 0.1923, -0.55, 0.35, 1.000, 0.27, -0.6),
    (14, 0.2136, 0.55, 0.20, 0.997, 0.23, 0.9), (15, 0.2089, 1.85, 1.21, 0.980, 0.56, -0.1),
    (16, 0.2365, 4.09, 1.21, 0.988, 0.17, 0.1), (17, 0.2003, 2.99, 0.91, 0.991, 0.28, -1.1),
    (18, 0.1964, 7.73, 2.25, 0.966, 0.50, 0.9), (19, 0.2605, 9.51, 2.15, 0.955, 0.28, -0.6),
)  # fmt: skip
HEALTHY = (
    (1, 0.2524, 6.36, 6.31, 0.958, 0.31, -0.3), (2, 0.2442, -0.96, 1.35, 0.992, 0.22, 1.4),
    (3, 0.2230, 1.50, 2.29, 0.983, 0.39, -1.7), (4, 0.2283, -0.72, 0.53, 0.997, 0.31, 1.0),
    (5, 0.2344, -2.33, 0.62, 0.997, 0.25, 0.3), (6, 0.2257, -2.94, 0.96, 0.989, 0.30, 0.1),
    (7, 0.2164, -2.75, 0.57, 0.998, 0.31, -1.4), (8, 0.2260, -1.29, 0.20, 0.999, 0.25, 0.4),
    (9, 0.2367, -0.77, 0.65, 0.994, 0.32, 0.2), (10, 0.1972, -1.30, 0.57, 0.999, 0.29, 0.9),
    (11, 0.2043, -2.33, 0.29, 0.999, 0.28, -0.4), (12, 0.1908, -1.59, 0.42, 0.999, 0.29, -0.3),
    (13, 0.1889, -2.20, 0.41, 0.998, 0.26, -0.1), (14, 0.2106, -2.15, 0.25, 0.999, 0.23, 1.0),
    (15, 0.2010, -2.28, 0.31, 0.998, 0.26, -0.6), (16, 0.2224, -2.21, 0.50, 0.998, 0.17, -0.7),
    (17, 0.1869, -2.43, 0.46, 0.998, 0.35, -0.8), (18, 0.1712, -1.98, 0.29, 0.998, 0.27, -0.2),
    (19, 0.2232, -2.38, 0.33, 0.996, 0.21, 0.8), (20, 0.1806, -2.81, 0.30, 0.999, 0.24, 1.2),
    (21, 0.2143, -2.28, 0.31, 0.999, 0.32, 0.0), (22, 0.2051, -2.94, 0.34, 0.999, 0.19, 0.1),
    (23, 0.1824, -2.26, 0.24, 0.999, 0.30, 1.8), (24, 0.1899, -2.85, 0.50, 0.998, 0.24, 0.4),
    (25, 0.1989, -2.14, 0.54, 0.994, 0.49, 0.4), (26, 0.1594, -3.32, 1.08, 0.996, 0.30, -0.2),
    (27, 0.1785, -1.45, 0.59, 0.997, 0.42, -3.0), (28, 0.1513, -1.87, 0.62, 0.999, 0.37, 0.7),
    (29, 0.1866, -2.83, 0.38, 0.996, 0.49, 0.6), (30, 0.1187, -2.83, 0.43, 0.998, 0.42, -0.2),
    (31, 0.1479, -1.63, 1.03, 0.997, 0.26, 2.1), (32, 0.1761, -2.23, 0.28, 0.998, 0.26, 1.5),
    (33, 0.1613, -2.20, 0.28, 0.999, 0.28, -0.7), (34, 0.1672, -2.51, 0.38, 0.998, 0.33, 0.3),
    (35, 0.1713, -2.99, 0.74, 0.999, 0.34, -1.7), (36, 0.1347, -3.32, 0.34, 0.998, 0.40, -0.5),
    (37, 0.1599, -2.20, 0.31, 0.999, 0.33, 0.1), (38, 0.1511, -2.13, 0.91, 0.993, 0.57, -1.3),
    (39, 0.1411, -1.57, 0.51, 0.995, 0.41, 0.8), (40, 0.1361, -1.42, 0.80, 0.997, 0.73, 0.7),
)  # fmt: skip


def series(rows: Sequence[tuple[float, ...]]) -> list[StepRecord]:
    return [
        StepRecord(
            step=int(step),
            entropy=estimate(entropy, 0.02),
            realized=estimate(change / 1e3, error / 1e3),
            ess=ess,
            gradient_norm=norm,
            fit=BatchFit(z=z, excess=z / 100, num_sequences=128),
        )
        for step, entropy, change, error, ess, norm, z in rows
    ]


def estimate(value: float, error: float) -> Estimate:
    return Estimate(value=value, standard_error=error, num_clusters=16, unit="nats/token")


def given(records: Sequence[StepRecord]) -> list[tuple[str, int]]:
    return [(alarm.note.code, alarm.first) for alarm in alarms(records)]


def test_a_rate_that_is_too_large_is_noticed_long_before_the_reward_falls():
    """From step 14 on rewards are below those of steps 10 to 13 by more than chance."""
    assert given(series(RATE)) == [("collapse_ahead", 7)]


def test_advantages_of_the_wrong_sign_are_noticed_before_the_reward_falls():
    """From step 19 on rewards are a standard deviation below those of the ten steps before."""
    assert given(series(SIGN)) == [("explosion_ahead", 16)]


def test_a_healthy_run_is_quiet():
    assert given(series(HEALTHY)) == []


def test_an_alarm_is_the_same_in_a_live_run_and_afterwards():
    records = series(RATE)
    (alarm,) = alarms(records)
    live = [note for end in range(1, len(records) + 1) for note in alarms_now(records[:end])]
    assert live[0] == alarm.note
    assert alarm.note.numbers["step"] == alarm.first
    assert alarm.holds == (alarms_now(records) != ())
    assert alarm.last == max(note.numbers["step"] for note in live)


def test_a_change_within_its_error_is_no_alarm():
    rows = [(step, 0.02, -2.0, 2.5, 0.99, 0.3, 0.0) for step in range(1, 8)]
    assert given(series(rows)) == []
    assert given(series([(*row[:3], 0.5, *row[4:]) for row in rows])) == [("collapse_ahead", 1)]


@pytest.mark.parametrize(("slope", "kind"), [(-0.02, "collapse_ahead"), (0.02, "explosion_ahead"), (-0.001, None)])
def test_without_probes_the_logged_entropy_is_followed(slope, kind):
    scatter = (0.004, -0.006, 0.001, 0.005, -0.004)
    records = [
        StepRecord(step=k, log={"entropy": 0.6 + slope * k + scatter[k % 5], "reward": 0.4}) for k in range(1, 21)
    ]
    assert [code for code, _ in given(records)] == ([] if kind is None else [kind])


def test_a_step_that_goes_too_far_and_a_gradient_out_of_line():
    healthy = series(HEALTHY[:10])
    far = healthy[-1].model_copy(update={"step": 11, "ess": 0.3, "gradient_norm": 5.0})
    assert given([*healthy, far]) == [("step_too_far", 11), ("gradient_norm_jump", 11)]
    logged = [StepRecord(step=k, log={"grad_norm": 30.0 if k == 9 else 0.3}) for k in range(1, 12)]
    assert given(logged) == [("gradient_norm_jump", 9)]
    assert not alarms(logged)[0].holds


def test_an_optimizer_state_that_was_lost():
    def record(step: int, counted: int, coverage: float = 1.0) -> StepRecord:
        state = OptimizerStateReport(
            num_parameters=2, num_elements=10, coverage=coverage, mapping="live optimizer", steps=(counted, counted),
            scale_min=1.0, scale_max=2.0, learning_rates=(1e-4,),
        )  # fmt: skip
        return StepRecord(step=step, optimizer_state=state)

    assert given([record(1, 0, 0.5), record(2, 1), record(12, 11)]) == []
    assert given([record(10, 9), record(11, 0, 0.0)]) == [("optimizer_state_missing", 11), ("optimizer_state_lost", 11)]
    assert given([record(10, 9), record(20, 9)]) == [("optimizer_state_lost", 20)]


def test_a_sampler_that_drifts_away():
    def record(step: int, mean: float) -> StepRecord:
        return StepRecord(step=step, mismatch=SamplerMismatch(mean=mean, max=1.0, ess_fraction=0.9))

    steady = [record(step, 0.02 + 0.005 * (step % 2)) for step in range(1, 9)]
    assert given(steady) == []
    assert given([*steady, record(9, 0.09)]) == [("sampler_mismatch_grows", 9)]
    logged = [StepRecord(step=k, log={"sampling/sampling_logp_difference/mean": 0.02 * k}) for k in range(1, 9)]
    assert given(logged) == [("sampler_mismatch_grows", 7)]


def test_responses_of_another_temperature():
    def record(step: int, z: float, status: str = "ok") -> StepRecord:
        return StepRecord(step=step, fit=BatchFit(z=z, excess=0.01 * z, num_sequences=128, status=status))  # type: ignore[arg-type]

    assert given([record(step, 2.0) for step in range(1, 6)]) == []
    assert given([record(step, 3.0) for step in range(1, 6)]) == [("batch_is_not_the_policys", 3)]
    assert given([record(1, -9.0)]) == [("batch_is_not_the_policys", 1)]
    assert given([record(1, -9.0, "selected")]) == [], "of selected responses it is expected"


def test_a_loss_that_is_not_the_trainers():
    assert given([StepRecord(step=1, loss_distance=0.1), StepRecord(step=2, loss_distance=2.0)]) == [
        ("gradient_is_not_of_the_loss", 2)
    ]
