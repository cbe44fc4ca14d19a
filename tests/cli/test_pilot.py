"""How much is drawn of the evaluation batch, by what a pilot says."""

import json

import pytest
import torch

from entropy_probe import ProbeResult, Rollouts
from entropy_probe.cli.pilot import decide
from entropy_probe.results.probe import Draws
from entropy_probe.sampling import EvaluationSettings
from tests.cli.conftest import invoke
from tests.invariants.hf_problems import rollouts
from tests.report.results import make_result

PILOT = rollouts(n=64, seed=0)  # prompts and responses of a few tokens
SHARE = Draws(num_prompts=16, per_prompt=4.0, between_share=0.1, design_effect=1.3)


def decided(result: ProbeResult, source: int = 1000, seconds: float = 64.0, **settings):
    settings = EvaluationSettings(**settings)
    return decide(settings, source, result, PILOT, seconds)


def of_pilot(predicted=(-1e-3, 2e-4), **changes) -> ProbeResult:
    result = make_result(predicted=predicted)
    diagnostics = result.diagnostics.model_copy(update={"num_evaluation_sequences": 64})
    own = result.predicted.model_copy(update={"se_evaluation": predicted[1]})
    return result.model_copy(update={"diagnostics": diagnostics, "predicted": own} | changes)


def test_an_error_asked_for():
    pilot = decided(of_pilot(), relative_error=0.1)
    assert (pilot.sequences, pilot.draws) == (256, None)  # twice the error wished for: four times the pilot
    assert "a relative error of 0.1 takes about 256 sequences; 256 single draws were taken" in pilot.notes[0].text
    unsure = decided(of_pilot((-1e-4, 2e-4)), relative_error=0.1)
    assert unsure.sequences == pytest.approx(64 * (10 / 1.97) ** 2, rel=0.01)
    assert "the change is not told from 0" in unsure.notes[0].text
    assert decided(of_pilot((-1e-3, 1e-5)), relative_error=0.1).sequences == 64  # never less than the pilot
    with pytest.raises(ValueError, match="expected a change that the pilot predicts, got exactly 0"):
        decided(of_pilot((0.0, 0.0)), relative_error=0.1)


def test_a_time_that_is_short_of_the_error():
    timed = of_pilot(timing={"evaluation gradient": 64.0, "update gradient": 100.0})
    pilot = decided(timed, relative_error=0.1, max_minutes=10)
    assert pilot.sequences == (600 - 64 - 164) // 2  # two seconds each
    assert "takes about 256 sequences; 10 minutes buy 186 sequences; 186 single" in pilot.notes[0].text
    assert decided(timed, max_minutes=60).sequences == (3600 - 228) // 2
    assert decided(timed, relative_error=0.1, max_minutes=60).sequences == 256
    assert decided(timed, max_minutes=1).sequences == 64


def test_draws_per_prompt_by_the_share_and_the_lengths():
    responses = PILOT.response_lengths.double().mean()
    ratio = (PILOT.attention_mask.sum(1).double().mean() - responses) / responses
    best = max(1, round((ratio.item() * 9) ** 0.5))
    pilot = decided(of_pilot(draws=SHARE), num_prompts=40, draws_per_prompt="auto")
    assert (pilot.sequences, pilot.draws) == (40 * best, best)
    assert f"prompts explain 10.0% of the variance, and have {ratio * responses:.0f} tokens" in pilot.notes[0].text
    wished = decided(of_pilot(draws=SHARE), relative_error=0.05, draws_per_prompt="auto")
    assert wished.sequences == pytest.approx(64 * 16 * (1 + 0.1 * (best - 1)) / 1.3, abs=best)
    few = decided(of_pilot(draws=SHARE), source=20, relative_error=0.05, draws_per_prompt="auto")
    assert few.draws == -(-wished.sequences // 20) or few.draws == few.sequences // 20
    assert few.notes[0].text.endswith("were taken, all 20 prompts of the source")
    assert decided(of_pilot(), source=20, relative_error=0.01, draws_per_prompt=3).sequences == 60
    refused = of_pilot(realized=make_result(status="low_ess").realized)
    with pytest.raises(ValueError, match=r"draws_per_prompt: expected a change .* got status low_ess; set a number"):
        decided(refused, num_prompts=40, draws_per_prompt="auto")


def test_a_run_draws_what_its_pilot_said_and_resumes_by_it(config, tmp_path):
    wish = "evaluation={num_prompts: 12, draws_per_prompt: auto}"
    shown = invoke("run", config, wish, "probe.horizon=null")
    assert shown.exit_code == 0, shown.output
    result = ProbeResult.load(tmp_path / "out")
    evaluation = Rollouts.from_parquet(tmp_path / "out" / "evaluation.parquet")
    counts = evaluation.prompt_ids.unique(return_counts=True)[1]
    inputs = json.loads((tmp_path / "out" / "inputs.json").read_text())
    assert counts.tolist() == [inputs["pilot"]["draws"]] * 12
    assert result.diagnostics.evaluation_unit == "prompt"
    assert result.entropy.num_clusters == 12
    assert any(note.code == "sized_by_pilot" for note in result.diagnostics.notes)
    assert "draws per prompt" in shown.stdout or inputs["pilot"]["draws"] == 1
    (tmp_path / "out" / "results.json").unlink()
    again = invoke("run", config, wish, "probe.horizon=null")
    assert again.exit_code == 0, again.output
    assert "sample" not in again.stderr
    assert ProbeResult.load(tmp_path / "out").predicted == result.predicted
    assert torch.equal(Rollouts.from_parquet(tmp_path / "out" / "evaluation.parquet").input_ids, evaluation.input_ids)
