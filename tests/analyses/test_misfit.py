"""Which note a batch gets that is not the policy's own, and what is left of it beside another on the same batch."""

import pytest

from entropy_probe.analyses.misfit import Misfit, beside_two_batches
from entropy_probe.estimators.policy_fit import Fit
from entropy_probe.estimators.sampler import Mismatch
from entropy_probe.results.note import Note
from entropy_probe.results.probe import BatchFit

OWN, STRANGE, FOREIGN, GREEDY = Fit(0.5, 0.01, 32), Fit(9.0, 0.4, 32), Fit(40.0, 2.5, 32), Fit(-9.0, -0.4, 32)


def misfit(fit: Fit, mean: float | None = None, *, z: float = 0.0, never_lower: bool = False, **more) -> Misfit:
    mismatch = None if mean is None else Mismatch(mean, 2 * mean, 8.0, z, never_lower)
    return Misfit(fit, not fit.holds, mismatch, 0.25, differ=bool(mean), **more)


@pytest.mark.parametrize(
    ("found", "role", "code", "words"),
    [
        (misfit(OWN, 0.3, amiss="of the wrong sign"), "evaluation", "logprobs_amiss", "so results stand"),
        (misfit(OWN, 0.3, z=9.0), "update", "logprobs_amiss", "so they were not drawn with these"),
        (misfit(FOREIGN, 0.3, z=9.0), "update", "logprobs_amiss", "ids of another tokenizer"),
        (misfit(FOREIGN), "evaluation", "other_tokenizer", "ids of another tokenizer"),
        (misfit(FOREIGN), "update", "other_tokenizer", "; the step is taken on it as given"),
        (misfit(OWN, 0.3, of_logprobs=0.7), "batch", "other_temperature", "sampled at that temperature"),
        (misfit(OWN, 0.3, of_logprobs=0.7, never_lower=True), "evaluation", "off_policy", "top_p, top_k or greedy"),
        (misfit(FOREIGN, 0.3), "update", "off_policy_update", "sampled from another policy"),
        (misfit(STRANGE), "batch", "off_policy_update", "so results are biased, and the step is taken on it as given"),
        (misfit(GREEDY), "evaluation", "off_policy", "sampled at a lower temperature"),
        (misfit(OWN, 0.3), "evaluation", "off_policy", "so results may be biased"),
    ],
)
def test_the_likely_cause_decides_on_what_to_do(found, role, code, words):
    note = found.note(role, found.said(role, 1.0))
    assert note.code == code
    assert note.text.startswith(f"{role}: ")
    assert words in note.text


def test_numbers_of_the_diagnosis_stand_beside_it():
    note = misfit(STRANGE, 0.3, of_tokens=(1.3, 0.1)).reweighted("evaluation: it")
    assert note.text == "evaluation: it; its sequences are reweighted, which leaves that share of them effective"
    assert note.numbers == {
        "z": 9.0, "sequences": 32.0, "excess": 0.4, "token_temperature": 1.3, "mean": 0.3, "max": 0.6,
        "effective_share": 0.25,
    }  # fmt: skip
    assert misfit(STRANGE).note("update", "it").numbers == {"z": 9.0, "sequences": 32.0, "excess": 0.4}


@pytest.mark.parametrize(
    ("found", "status", "said"),
    [
        (misfit(STRANGE), "off_policy", "results are biased by what is said of the update batch"),
        (misfit(STRANGE, 0.3, z=9.0), "off_policy", "results are biased by what is said of the update batch"),
        (misfit(OWN, 0.3), "ok", "results may be biased by what is said of the update batch"),
        (misfit(OWN, 0.3, z=9.0), "ok", None),
    ],
)
def test_one_batch_beside_two_does_not_repeat_what_is_said_of_the_update_batch(found, status, said):
    note = found.note("batch", "batch: it")
    beside = beside_two_batches(note, BatchFit(z=found.fit.z, excess=found.fit.excess, num_sequences=32, status=status))
    assert (beside and beside.text) == said


def test_other_notes_of_one_batch_stay_as_they_are():
    fit = BatchFit(z=9.0, excess=0.4, num_sequences=32, status="off_policy")
    for note in (misfit(STRANGE, 0.3).reweighted("batch: it"), Note(code="test", text="a", remedy="B.")):
        assert beside_two_batches(note, fit) is note
