from dataclasses import replace

import pytest
import torch

from entropy_probe import ProbeConfig
from entropy_probe.questions import without_prompts
from tests.invariants.problems import batches, probe, with_reference
from tests.reference.enumeration import TinyPolicy, trained_optimizer

CASES = [
    {},
    {"loss_type": "grpo", "max_grad_norm": 1e-3},
    {"loss_type": "dr_grpo", "max_completion_length": 5, "normalization": "sequence"},
    {"loss_type": "per_prompt_max", "geometry": "frozen"},
    {"max_stored_gradient_gib": 0.0},
    {"loss": {"trainer": "trl", "loss_type": "per_prompt_max", "beta": 0.5, "use_bias_correction_kl": False}},
    # terms with normalisers of their own, and a quantile that others move
    {
        "loss": {
            "trainer": "trl", "loss_type": "grpo", "beta": 0.5, "entropy_coef": 0.3, "top_entropy_quantile": 0.5,
            "gradient_accumulation_steps": 3,
        }
    },
    {"loss": {"trainer": "trl", "loss_type": "bnpo", "gradient_accumulation_steps": 3}},
]  # fmt: skip


def subject(**settings):
    model = TinyPolicy()
    return probe(model, trained_optimizer(model), **settings)


@pytest.mark.parametrize("settings", CASES)
def test_the_step_is_that_of_a_batch_without_them(settings):
    update, evaluation = batches()
    update = replace(with_reference(update), microbatch_ids=torch.arange(len(update)) % 3)
    ids = update.prompt_ids.unique().tolist()
    asked = [[ids[0]], [ids[1], ids[-1]]]
    answer = subject(**settings).ask("without_prompts", update=update, evaluation=evaluation, prompts=asked)
    whole = subject(**settings).predict(update=update, evaluation=evaluation)
    assert answer.whole == whole.predicted
    for scenario, left_out in zip(answer.scenarios, asked, strict=True):
        kept = update.select(~torch.isin(update.prompt_ids, torch.tensor(left_out)))
        expected = subject(**settings).predict(update=kept, evaluation=evaluation)
        assert scenario.left_out == tuple(left_out)
        assert scenario.predicted.value == pytest.approx(expected.predicted.value, rel=1e-6)
        assert scenario.predicted.standard_error == pytest.approx(expected.predicted.se_evaluation, rel=1e-6)
        assert scenario.clip_factor == pytest.approx(expected.diagnostics.clip_factor, rel=1e-9)
        gap = scenario.predicted.value - answer.whole.value
        assert scenario.difference.value == pytest.approx(gap, rel=1e-6)
        # the paired difference shares the noise of both
        assert scenario.difference.standard_error < scenario.predicted.standard_error + answer.whole.se_evaluation


def test_a_prompt_without_advantage_changes_what_the_loss_divides_by():
    update, evaluation = batches()
    first = update.prompt_ids == update.prompt_ids.unique()[0]
    update = type(update)(**{**vars(update), "advantages": update.advantages.masked_fill(first, 0.0)})
    chosen = {"max_grad_norm": None, "geometry": "frozen", "normalization": "sequence", "loss_type": "grpo"}
    answer = subject(**chosen).ask(
        "without_prompts", update=update, evaluation=evaluation, prompts=[[int(update.prompt_ids[first][0])]]
    )
    share = (~first).double().mean().item()
    assert answer.scenarios[0].predicted.value == pytest.approx(answer.whole.value / share, rel=1e-6)


def test_a_question_adds_nothing_to_what_is_said_of_the_prediction():
    update, evaluation = batches()
    chosen = {"geometry": "frozen", "frozen_max_scale": 1e-3}
    ids = [[i] for i in update.prompt_ids.unique().tolist()[:3]]
    plain = subject(**chosen).run(update=update, evaluation=evaluation)
    asked = {"without_prompts": {"prompts": ids}}
    found = subject(**chosen).run(update=update, evaluation=evaluation, questions=asked)
    assert "scale_clamped" in [note.code for note in plain.diagnostics.notes]
    assert found.diagnostics.notes == plain.diagnostics.notes


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([[999]], r"without_prompts.prompts: expected some of the \d+ prompt ids .*, got 999"),
        ([[]], "but not all, got none"),
        ("all", "but not all, got all of them"),
        ([], "questions.without_prompts.prompts: Tuple should have at least 1 item"),
        ("some", "questions.without_prompts.prompts: .*, got 'some'; write as {'prompts': .*"),
        ([7], r"prompts.0: .*, got 7; write as {'prompts': \[\[3\], \[5, 8\]\]}"),
    ],
)
def test_what_cannot_be_left_out_is_refused(prompts, expected):
    update, evaluation = batches()
    prompts = [update.prompt_ids.unique().tolist()] if prompts == "all" else prompts
    chosen, phases = subject(), []
    chosen._shared["progress"] = lambda phase, *_: phases.append(phase)
    with pytest.raises(ValueError, match=expected):
        chosen.ask("without_prompts", update=update, evaluation=evaluation, prompts=prompts)
    assert not phases  # before anything is computed


def test_other_questions_and_optimizers_are_refused():
    update, evaluation = batches()
    with pytest.raises(ValueError, match="questions: expected one of without_prompts, got 'whither'; rename it"):
        subject().ask("whither", update=update, evaluation=evaluation)
    model = TinyPolicy()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"without_prompts: expected torch.optim.AdamW or Adam"):
        probe(model, sgd, **ProbeConfig().model_dump(include={"loss_type"})).ask(
            "without_prompts", update=update, evaluation=evaluation, prompts=[[int(update.prompt_ids[0])]]
        )


def test_an_answer_is_kept_and_shown(tmp_path):
    update, evaluation = batches()
    asked = [[int(update.prompt_ids[0])]]
    answer = subject().ask("without_prompts", update=update, evaluation=evaluation, prompts=asked)
    answer.save(tmp_path)
    assert without_prompts.Answer.load(tmp_path) == answer
    rows = without_prompts.section(answer).blocks[0].rows
    assert [row.label for row in rows] == ["whole update batch", f"without prompt {asked[0][0]}", "difference"]
