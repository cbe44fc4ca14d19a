from __future__ import annotations

import pytest

from entropy_probe.report import verdict
from entropy_probe.report.sections.run import story
from entropy_probe.results.changes import HorizonPoint, Horizons
from entropy_probe.results.probe import Estimate
from tests.report.results import make_cross_prompt, make_result


@pytest.mark.parametrize(
    ("predicted", "realized", "difference", "kind"),
    [
        ((-1e-3, 1e-4), (-1e-3, 1e-4), (0.0, 1e-5), "agrees within error"),
        # different by 30%, but not by two paired errors
        ((-1e-3, 1e-4), (-0.7e-3, 1e-4), (0.3e-3, 1.6e-4), "agrees within error"),
        # different by many paired errors, but by less than 10%
        ((-1e-3, 1e-4), (-0.95e-3, 1e-4), (0.5e-4, 1e-6), "agrees up to curvature"),
        # more than 10% of the prediction, less than 10% of its error
        ((1e-6, 1e-3), (51e-6, 1e-5), (50e-6, 1e-6), "agrees up to curvature"),
        ((-1e-3, 1e-4), (-0.85e-3, 1e-4), (1.5e-4, 1e-5), "beyond the linear range"),
        ((-1e-3, 1e-4), (1e-3, 1e-4), (2e-3, 1e-5), "beyond the linear range"),
        # one of the two is distinguishable
        ((-1e-4, 1e-4), (-2.1e-4, 1e-4), (-1.1e-4, 1e-5), "beyond the linear range"),
        ((-1e-4, 1e-4), (-1.1e-4, 1e-4), (-1e-5, 1e-5), "indistinguishable from 0"),
        ((1.9e-4, 1e-4), (-1.9e-4, 1e-4), (-3.8e-4, 3e-4), "indistinguishable from 0"),
        ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), "indistinguishable from 0"),
        # nothing sampled, nothing uncertain: any change is one
        ((1e-9, 0.0), (1e-9, 0.0), (0.0, 0.0), "agrees within error"),
        ((-1e-3, 1e-4), None, None, "distinguishable from 0"),
        ((-1e-4, 1e-4), None, None, "indistinguishable from 0"),
        (None, (1e-3, 1e-4), None, "distinguishable from 0"),
        (None, (1e-4, 1e-4), None, "indistinguishable from 0"),
    ],
)
def test_kinds(predicted, realized, difference, kind):
    assert verdict(make_result(predicted, realized, difference)).kind == kind


@pytest.mark.parametrize("predicted", [(-1e-3, 1e-4), (0.0, 1e-4), None])
def test_a_refused_change_comes_before_anything_else_and_says_what_to_do(predicted):
    judged = verdict(make_result(predicted, (-1e-3, 1e-4), (0.0, 1e-5), status="low_ess"))
    assert judged.kind == "not measured"
    assert "refused" in judged.sentence
    assert "5.1 samples (2.0%)" in judged.sentence
    assert "smaller learning rate" in judged.sentence
    assert "resample" in judged.sentence
    assert ("prediction" in judged.sentence) == (predicted is not None)
    tail = verdict(make_result(predicted, (-1e-3, 1e-4), (0.0, 1e-5), status="high_pareto_k"))
    assert "Pareto k 0.81, at most 0.58" in tail.sentence


def test_numbers_from_rollouts_of_another_policy_are_not_just_in_agreement():
    result = make_result((-1e-3, 1e-4), (-1e-3, 1e-4), (0.0, 1e-5))
    assert "biases" not in verdict(result).sentence  # the fixture's update batch is off policy, as it may be
    fit = result.diagnostics.policy_fit
    off = result.diagnostics.model_copy(update={"policy_fit": fit.model_copy(update={"evaluation": fit.update})})
    judged = verdict(result.model_copy(update={"diagnostics": off}))
    assert judged.kind == "agrees within error"
    assert judged.sentence.endswith("which biases every number above (see the notes).")


@pytest.mark.parametrize("predicted", [(-1e-9, 1e-10), None])
def test_a_change_that_rounding_could_have_made_is_not_compared(predicted):
    result = make_result(predicted, (-1e-8, 1e-10), (1e-9, 1e-11), status="below_noise_floor")
    judged = verdict(result)
    assert judged.kind == "below the noise floor"
    assert "1.00e-8" in judged.sentence
    assert "2.0e-8" in judged.sentence
    assert "float64" in judged.sentence


def test_sentences_name_the_direction_and_the_size():
    fell = verdict(make_result((-1e-3, 1e-4), (-1.04e-3, 1e-4), (-4e-5, 1e-4)))
    assert "The entropy fell by 1.04e-3 nats/token" in fell.sentence
    near = verdict(make_result((-1e-3, 1e-4), (-0.95e-3, 1e-4), (0.5e-4, 1e-6)))
    assert near.sentence.endswith("as predicted, up to 5.00e-5 nats/token, which is 5.0% of the prediction.")
    small = verdict(make_result((1e-6, 1e-3), (51e-6, 1e-5), (50e-6, 1e-6)))
    assert small.sentence.endswith("which is 5.0% of its standard error.")
    opposite = verdict(make_result((-1e-3, 1e-4), (1e-3, 1e-4), (2e-3, 1e-5)))
    assert "rose by 1.00e-3" in opposite.sentence
    assert "predicted to fall" in opposite.sentence
    rises = verdict(make_result((1e-3, 1e-4), None))
    assert rises.sentence == (
        "The predicted change is 10.0 standard errors from 0: the entropy rises by 1.00e-3 nats/token."
    )


def test_a_change_told_from_0_for_this_step_alone_is_said_to_be_that():
    """The fixture's error from the evaluation rollouts is 6e-5."""
    for value, alone in ((-1.4e-4, True), (-1.0e-4, False)):
        judged = verdict(make_result((value, 1e-4), None, None))
        assert judged.kind == "indistinguishable from 0"
        assert ("By the evaluation rollouts alone (± 6.0e-5) this very step is told from 0" in judged.sentence) == alone
        assert ("more update prompts" in judged.sentence) == alone


def test_a_resolved_curvature_is_mentioned_even_where_the_changes_are_not_resolved():
    judged = verdict(make_result((1e-4, 1e-4), (-1e-4, 1e-4), (-2e-4, 1e-6)))
    assert judged.kind == "indistinguishable from 0"
    assert "beyond the linear range" in judged.sentence


def test_incomplete_results_are_refused():
    with pytest.raises(ValueError, match="expected a predicted or a realized change, got neither"):
        verdict(make_result(None, None))
    with pytest.raises(ValueError, match="expected the difference"):
        verdict(make_result(difference=None))


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        ((0.4e-3, 0.45e-3), "distinguishable from 0"),
        # the larger of the two errors decides
        ((0.4e-3, 1.0e-3), "indistinguishable from 0"),
        ((1.0e-3, 0.4e-3), "indistinguishable from 0"),
    ],
)
def test_one_batch_alone(errors, kind):
    cross = make_cross_prompt(-1.9e-3, *errors)
    assert verdict(make_result(None, None, cross_prompt=cross)).kind == kind


def horizon_point(horizon, predicted, beyond) -> HorizonPoint:
    def estimate(pair):
        return None if pair is None else Estimate(value=pair[0], standard_error=pair[1], num_clusters=256,
                                                  unit="nats/token")  # fmt: skip

    return HorizonPoint(horizon=horizon, predicted=estimate(predicted), realized=estimate(predicted), increment=None,
                        beyond=estimate(beyond), beyond_realized=None, ess_fraction=1.0)  # fmt: skip


def test_where_the_whole_is_lost_in_noise_the_headline_is_within_a_horizon_and_named_so():
    lost = make_result((-1.2e-2, 1.0e-2), (-1.1e-2, 1.0e-2), (1e-3, 1e-3))
    points = (horizon_point(16, (-1.11e-2, 0.08e-2), (-0.11e-2, 0.1e-2)), horizon_point(None, (-1.2e-2, 1e-2), None))
    within = lost.model_copy(update={"horizons": Horizons(points=points, headline=16)})
    judged, said = verdict(within), story(within)
    assert judged.kind == "resolved within horizon"
    assert (
        "within 16 tokens of a changed one is 13.9 standard errors from 0: the entropy falls by 0.0111"
        in judged.sentence
    )
    assert "What lies beyond is -1.1e-3 ± 1.0e-3 nats/token, not resolved" in judged.sentence
    assert said == (
        "To first order the step will lower entropy by 0.0111 nats/token within 16 tokens of a changed one; beyond, "
        "-1.1e-3 ± 1.0e-3, not resolved."
    )
    whole = lost.model_copy(update={"horizons": Horizons(points=points, headline=None)})
    assert verdict(whole).kind == "indistinguishable from 0"
    unclear = (horizon_point(16, (-1e-3, 8e-3), (0.0, 1e-3)), points[1])
    assert (
        verdict(lost.model_copy(update={"horizons": Horizons(points=unclear, headline=16)})).kind
        == "indistinguishable from 0"
    )
