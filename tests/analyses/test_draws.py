"""The between-prompt share of a result, against the sums of squares written out."""

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig
from entropy_probe.analyses.batches import admit_batches
from entropy_probe.analyses.measure import measure
from entropy_probe.analyses.plan import plan
from entropy_probe.estimators.realized import per_decision
from tests.invariants.hf_problems import policy, rollouts


def test_share_and_design_effect_of_the_realized_change():
    model, optimizer = policy("lora")
    probe = EntropyProbe(model, optimizer, ProbeConfig(learning_rate=1e-4, measure_noise_floor=False, horizon=None))
    update, evaluation = rollouts(), rollouts(n=24, seed=1)
    evaluation = type(evaluation)(**{
        name: getattr(evaluation, name) for name in ("input_ids", "attention_mask", "response_mask")
    }, prompt_ids=torch.arange(8).repeat_interleave(3))  # fmt: skip
    config = {"evaluation_unit": "prompt", "merge_equal_prompts": False}
    with probe._opened(**config) as opened:
        planned = plan(opened, *admit_batches(opened, update, evaluation))
        after = measure(planned).measurement.after
    probe = EntropyProbe(model, optimizer, probe._config.model_copy(update=config))
    found = probe.run(update=update, evaluation=evaluation)
    before, clusters = planned.before, planned.evaluation.clusters
    # one sequence at a time, with the baselines of the whole
    sums = torch.stack([
        per_decision(before.scores, after, clusters, before.positions, into=type(clusters).sequences(24)).table[:, i]
        for i in range(24)
    ])  # fmt: skip
    old = torch.stack([before.scores.entropies.double().sum(1), before.scores.response_lengths.double()], 1)
    influence = sum(
        sign * (x[:, 0] - x[:, 0].sum() / x[:, 1].sum() * x[:, 1]) / x[:, 1].mean()
        for sign, x in ((1, sums), (-1, old))
    )
    groups = influence.view(8, 3)
    assert groups.mean(1).std().item() / 8**0.5 == pytest.approx(found.realized.standard_error, rel=1e-6)
    within, outside = groups.var(1).mean(), 3 * groups.mean(1).var()
    share = (outside - within) / (outside + 2 * within)
    assert found.draws.between_share == pytest.approx(share.item(), rel=1e-6)
    assert found.draws.design_effect == pytest.approx(1 + 2 * share.item(), rel=1e-6)
    assert (found.draws.num_prompts, found.draws.per_prompt) == (8, 3)
