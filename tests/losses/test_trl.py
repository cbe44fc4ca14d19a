"""The coefficients of TRL's losses are autograd's, off policy, with masks and microbatches."""

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
