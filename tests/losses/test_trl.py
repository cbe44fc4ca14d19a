"""The coefficients of TRL's losses are autograd's, off policy, with masks and microbatches."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from entropy_probe import Rollouts, TokenScores
from entropy_probe.losses.trl import TRLLoss
from tests.losses.trl_formulas import trl_loss

N, L, MICROBATCHES = 12, 9, 4
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo", "gmpo", "rloo")
SETTINGS = {
    "clip range": {"epsilon": 0.1, "epsilon_high": 0.28},
    "delta": {"epsilon": 0.1, "epsilon_high": 0.28, "delta": 1.4},
    "small delta": {"epsilon": 0.1, "epsilon_high": 0.5, "delta": 1.2},
    "sequence": {"epsilon": 0.05, "importance_sampling_level": "sequence"},
    "kl": {"beta": 0.3},
    "kl at sequence level": {"beta": 0.3, "importance_sampling_level": "sequence"},
    "plain kl": {"beta": 0.3, "use_bias_correction_kl": False},
    "bonus": {"entropy_coef": 0.1},
    "top entropy": {"top_entropy_quantile": 0.3, "entropy_coef": 0.1},
    "top entropy at sequence level": {"top_entropy_quantile": 0.3, "importance_sampling_level": "sequence"},
    "off-policy mask": {"off_policy_mask_threshold": 0.02},
    "vllm": {"use_vllm": True, "vllm_importance_sampling_clip_max": 1.3, "off_policy_mask_threshold": 0.02},
    "vllm token_truncate": {
        "use_vllm": True, "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.1,
        "vllm_importance_sampling_clip_min": 0.9,
    },
    "vllm token_mask": {
        "use_vllm": True, "vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": 1.1,
    },
    "vllm sequence_truncate": {
        "use_vllm": True, "vllm_importance_sampling_mode": "sequence_truncate",
        "vllm_importance_sampling_clip_max": None, "vllm_importance_sampling_clip_min": 0.9,
    },
    "accumulation": {"gradient_accumulation_steps": 4, "entropy_coef": 0.1, "beta": 0.1, "top_entropy_quantile": 0.5},
    "several generations": {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
    "part of a generation": {
        "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_items_in_batch": 99, "entropy_coef": 0.1,
    },
    "own shapes": {
        "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5, "vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0,
        "vespo_k_neg": 0.5, "vespo_lambda_neg": 1.5,
    },
}  # fmt: skip


def problem(seed: int = 0, microbatches: int = 1) -> tuple[SimpleNamespace, Rollouts, torch.Tensor, torch.Tensor]:
    """A batch with gaps and an empty response, for the formulas and as rollouts, with current scores."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale=1.0, *shape):
        return scale * torch.randn(*(shape or (N, L)), generator=g, dtype=torch.float64)

    mask = torch.rand(N, L, generator=g) < 0.7
    mask[:, 0], mask[:, 1], mask[5] = False, True, False
    s, h = normal() - 3, normal().abs()
    microbatch = torch.arange(N) % microbatches
    batch = SimpleNamespace(
        mask=mask, advantages=normal(1.0, N), old=s + normal(0.2), sampled=s + normal(0.2), reference=s + normal(0.4),
        microbatch=microbatch,
    )  # fmt: skip
    ids = torch.ones(N, L, dtype=torch.long)
    columns = {"old_logprobs": batch.old, "sampled_logprobs": batch.sampled, "reference_logprobs": batch.reference}
    rollouts = Rollouts(ids, ids, mask, torch.arange(N) // 3, advantages=batch.advantages, microbatch_ids=microbatch,
                        **columns)  # fmt: skip
    return batch, rollouts, s.requires_grad_(), h.requires_grad_()


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("name", SETTINGS)
def test_coefficients_are_those_of_autograd(loss_type, name):
    settings = {"loss_type": loss_type, "epsilon": 0.2, "max_completion_length": 6} | SETTINGS[name]
    batch, rollouts, s, h = problem(microbatches=settings.get("gradient_accumulation_steps", 1))
    expected = torch.autograd.grad(trl_loss(s, h, batch, **settings), [s, h], allow_unused=True, materialize_grads=True)
    got = TRLLoss(**settings).coefficients(rollouts, TokenScores(s.detach(), h.detach(), batch.mask))
    of_entropies = torch.zeros_like(h) if got.entropies is None else got.entropies
    for ours, gradient in zip((got.logprobs, of_entropies), expected, strict=True):
        assert float((ours - gradient.masked_fill(~batch.mask, 0.0)).abs().max()) <= 1e-12 * float(gradient.abs().max())
    assert float(expected[0].abs().max()) > 0


@pytest.mark.parametrize(
    ("settings", "column", "said"),
    [
        (
            {"num_iterations": 2},
            "old_logprobs",
            r"old_logprobs: expected \[N, L\] .*num_iterations 2.*, got None; record",
        ),
        ({"steps_per_generation": 2}, "old_logprobs", "old_logprobs: expected .*steps_per_generation 2"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 8}, "old_logprobs", "old_logprobs: expected"),
        ({"beta": 0.1}, "reference_logprobs", r"reference_logprobs: expected \[N, L\] .*, got None; record"),
        ({"use_vllm": True}, "sampled_logprobs", r"sampled_logprobs: expected .*\(use_vllm\), got None; record"),
        ({"top_entropy_quantile": 0.5}, None, "microbatch_ids: expected at most 1 different ones in a step .*, got 4"),
        ({"loss_type": "dr_grpo"}, None, "dr_grpo: expected max_completion_length, got None; set it"),
    ],
)
def test_what_a_batch_lacks_is_named(settings, column, said):
    _, rollouts, s, h = problem(microbatches=4)
    given = rollouts if column is None else replace(rollouts, **{column: None})
    with pytest.raises(ValueError, match=said):
        TRLLoss(**settings).coefficients(given, TokenScores(s.detach(), h.detach(), rollouts.response_mask))


def test_ratios_need_no_old_logprobs_where_each_batch_serves_one_step():
    _, rollouts, *_ = problem(microbatches=4)
    fresh = replace(rollouts, old_logprobs=None)
    for settings in (
        {},
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
    ):
        loss = TRLLoss(**settings)
        assert not loss.needs_scores(fresh)
        assert loss.coefficients(fresh).entropies is None


INERT = "clip range inert: every ratio is 1 on this step"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epsilon_high": 0.28}, f"{INERT} (epsilon_high)"),
        ({"epsilon": 0.2, "delta": 2.0}, f"{INERT} (epsilon, delta)"),
        ({"loss_type": "sapo", "sapo_temperature_pos": 2.0}, "importance ratios inert: every ratio is 1 on this step"),
        ({"off_policy_mask_threshold": 0.1}, "(off_policy_mask_threshold)"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, None),
        ({"beta": 0.1}, None),
        ({}, None),
    ],
)
def test_a_setting_without_effect_is_said_once(settings, said):
    _, rollouts, s, h = problem()
    scores = TokenScores(s.detach(), h.detach(), rollouts.response_mask)
    for ours in (replace(rollouts, old_logprobs=None), replace(rollouts, old_logprobs=s.detach() + 1e-6)):
        texts = [note.text for note in TRLLoss(**settings).notes(ours, scores)]
        assert len(texts) == (said is not None)
        assert said is None or said in texts[0]
    assert TRLLoss(**settings).notes(rollouts, scores) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_type": "bnpo"}, "the bnpo mean over tokens: the trainer takes it over each microbatch"),
        ({"entropy_coef": 0.1, "top_entropy_quantile": 0.5}, "the entropy bonus and the top-entropy quantile"),
        ({"steps_per_generation": 2}, "the dapo mean over tokens: the trainer takes it over each generation batch"),
        ({"steps_per_generation": 8}, "the dapo mean over tokens: the trainer takes it over each generation batch"),
        ({"steps_per_generation": 8, "num_items_in_batch": 100}, None),
        ({"loss_type": "grpo", "steps_per_generation": 8}, None),
        ({}, None),
    ],
)
def test_means_over_unknown_microbatches_are_said(settings, said):
    _, rollouts, s, h = problem(microbatches=4)
    scores = TokenScores(s.detach(), h.detach(), rollouts.response_mask)
    loss = TRLLoss(**({"gradient_accumulation_steps": 4} | settings))
    texts = [note.text for note in loss.notes(replace(rollouts, microbatch_ids=None), scores)]
    assert len(texts) == (said is not None)
    assert said is None or said in texts[0]
    known = [note.text for note in loss.notes(rollouts, scores)]
    assert known == (texts if settings == {"steps_per_generation": 8} else [])


def test_several_processes_share_an_accumulation_step():
    """The quantile is over all processes' microbatches of one accumulation step; bnpo and the bonus are over each."""
    _, rollouts, s, h = problem(microbatches=4)
    scores = TokenScores(s.detach(), h.detach(), rollouts.response_mask)
    loss = TRLLoss(gradient_accumulation_steps=2, num_processes=2, top_entropy_quantile=0.5, entropy_coef=1.0)
    bonus = -loss.coefficients(rollouts, scores).entropies
    for step in (0, 1):
        rows = rollouts.microbatch_ids // 2 == step
        mask = rollouts.response_mask & rows[:, None]
        kept = mask & (h.detach() >= torch.quantile(h.detach()[mask].float(), 0.5))
        assert torch.equal(bonus[rows] > 0, kept[rows])
    for microbatch in range(4):
        assert bonus[rollouts.microbatch_ids == microbatch].sum().item() == pytest.approx(1 / 4)
