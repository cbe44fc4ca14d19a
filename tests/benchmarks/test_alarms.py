"""The benchmark runs at tiny size."""


def test_alarms(run):
    _, figures = run("alarms", "--quick")
    assert [one["run"].rpartition(",")[0] for one in figures] == [
        "healthy",
        "rate x 30, warmed up over 30 steps",
        "advantages with the wrong sign",
        "sampled at a temperature that drifts by 0.02 a step",
        "sampled at temperature 1.5",
    ]
    assert figures[0]["alarms"] == {}
    assert figures[-1]["alarms"] == {"batch_is_not_the_policys": 1}
