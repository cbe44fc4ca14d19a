"""How many sequences an error takes, and how long."""

import pytest

from entropy_probe.report.sections.run import proposal
from entropy_probe.results.size import seconds_per_sequence, size_for
from tests.report.results import make_result

TIMED = {"sample evaluation": 128.0, "evaluation gradient": 64.0, "update gradient": 1e6}


def test_the_size_is_that_of_the_evaluation_error():
    result = make_result()  # -1.432e-3, of the evaluation batch 6e-5, on 256 sequences
    size = size_for(result, 0.1)
    assert size.sequences == pytest.approx(256 * (6e-5 / 1.432e-4) ** 2, abs=1)
    assert not size.at_least
    assert size_for(result, 0.01).sequences == pytest.approx(100 * size.sequences, rel=0.03)


def test_a_change_that_is_not_told_from_0_has_a_least_size():
    size = size_for(make_result(predicted=(1e-6, 8e-5)), 0.1)
    assert size.at_least
    assert size.sequences == pytest.approx(256 * (10 / 1.9693) ** 2, rel=1e-3)
    assert size_for(make_result(predicted=(0.0, 0.0)), 0.1) is None
    assert size_for(make_result(predicted=None, difference=None), 0.1) is None


@pytest.mark.parametrize(
    ("timing", "said"),
    [
        ({}, "about 45 evaluation sequences."),
        ({"update gradient": 1e6}, "about 45 evaluation sequences."),
        (TIMED, "about 45 evaluation sequences, less than a minute here."),
        (TIMED | {"evaluation gradient": 3000.0}, "about 45 evaluation sequences, 9 minutes here."),
        (TIMED | {"score after step": 90000.0}, "about 45 evaluation sequences, 4.4 hours here."),
    ],
)
def test_the_line_says_how_long_it_takes_where_that_is_known(timing, said):
    result = make_result().model_copy(update={"timing": timing})
    assert proposal(result).endswith(said)
    assert (seconds_per_sequence(result) is None) == ("sample evaluation" not in timing)
