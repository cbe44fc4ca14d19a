"""The demo's checkpoint, trained for real: prediction and measurement agree, and meet as the step shrinks."""

from itertools import pairwise

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig, load_checkpoint
from entropy_probe.demo.train import MAX_COMPLETION_LENGTH, train_demo
from entropy_probe.sampling import (
    EvaluationSettings,
    HFGenerator,
    PromptSource,
    SamplingParameters,
    UpdateSettings,
    load_prompts,
    load_reward,
    sample_evaluation,
    sample_update,
)

SHORT = {"warm_start_steps": 150, "steps": 4, "save_steps": 2}


def probe_at(directory, checkpoint, sequences, rates):
    state = load_checkpoint(checkpoint, directory / "base")
    prompts = load_prompts(PromptSource(jsonl=directory / "prompts.jsonl"))
    subject = (HFGenerator(state.model, state.tokenizer, batch_size=256), state.tokenizer, prompts)
    parameters = SamplingParameters(1.0, MAX_COMPLETION_LENGTH)
    settings = UpdateSettings(num_prompts=16, group_size=8)
    update, _ = sample_update(*subject, load_reward("exact_match"), settings, parameters)
    evaluation, _ = sample_evaluation(*subject, EvaluationSettings(total_sequences=sequences), parameters)
    found = {}
    for rate in rates:
        probe = EntropyProbe(state.model, state.optimizer, ProbeConfig(learning_rate=rate))
        found[rate] = probe.run(update=update, evaluation=evaluation)
    return found


def assert_agree_and_meet(found, run_rate):
    at_run = found[run_rate]
    combined = (at_run.predicted.standard_error**2 + at_run.realized.standard_error**2) ** 0.5
    assert abs(at_run.realized.value - at_run.predicted.value) < 2 * combined
    # the gap is of second order, so relative to the prediction it falls with the rate
    gaps = {rate: abs(r.difference.value / r.predicted.value) for rate, r in found.items()}
    rates = sorted(found, reverse=True)
    for large, small in pairwise(rates):
        assert gaps[small] < 0.5 * gaps[large], gaps
    slopes = torch.tensor([r.predicted.value / rate for rate, r in found.items()])
    torch.testing.assert_close(slopes, slopes[:1].expand_as(slopes), rtol=1e-4, atol=0)


def test_short_training(tmp_path):
    checkpoint = train_demo(tmp_path / "tiny", **SHORT)
    assert_agree_and_meet(probe_at(tmp_path / "tiny", checkpoint, 256, (3e-3, 1e-3, 3e-4)), run_rate=3e-4)


@pytest.mark.slow
def test_full_training(tmp_path):
    checkpoint = train_demo(tmp_path / "tiny")
    assert_agree_and_meet(probe_at(tmp_path / "tiny", checkpoint, 2048, (3e-3, 1e-3, 3e-4)), run_rate=3e-4)
