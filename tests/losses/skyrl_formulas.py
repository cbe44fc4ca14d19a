"""SkyRL's loss, advantages scaled first as its trainer does, as a scalar that autograd differentiates."""

import torch


def loss(s, h, rollouts, settings):
    """The loss of one optimizer step; arguments as those of verl's."""
    mask = rollouts.response_mask
    advantages = scaled(rollouts.token_advantages.double(), mask, rollouts, settings)
    total = (policy(s, rollouts.old_logprobs, advantages, mask, settings) * mask).sum()
    lengths = mask.sum(1)
    if settings.use_kl_loss:
        each = torch.where(mask, kl(s, rollouts.reference_logprobs.double(), settings.kl_estimator_type), 0.0)
        total = total + settings.kl_loss_coef * (each.sum(1) / lengths.clamp(min=1)).mean()
    if settings.use_entropy_loss:
        parts = [rollouts.microbatch_ids == which for which in rollouts.microbatch_ids.unique()]
        means = [rows.sum() / len(mask) * (h[rows] * mask[rows]).sum() / mask[rows].sum() for rows in parts]
        total = total - settings.entropy_loss_coef * torch.stack(means).sum()  # each by its share of the sequences
    return total


def scaled(advantages, mask, rollouts, settings):
    size, out = len(mask), torch.zeros_like(advantages)
    if settings.loss_reduction in ("token_mean_legacy", "prompt_mean"):
        ids = rollouts.prompt_ids if settings.loss_reduction == "prompt_mean" else rollouts.microbatch_ids
        for which in ids.unique():
            out[ids == which] = advantages[ids == which] / mask[ids == which].sum().clamp(min=1) / len(ids.unique())
        return out
    if settings.loss_reduction == "token_mean":
        return advantages / mask.sum()
    if settings.loss_reduction == "sequence_mean":
        return advantages / (size * mask.sum(1, keepdim=True).clamp(min=1))
    return advantages / (size * settings.max_seq_len)


def policy(s, old, advantages, mask, settings):
    d = torch.where(mask, s - old, 0.0)
    if settings.policy_loss_type == "gspo":
        mean = d.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        ratio = (s - s.detach() + mean.detach()).clamp(max=10).exp()
    else:
        ratio = d.clamp(-20, 20).exp()
    if settings.policy_loss_type == "sapo":
        tau = torch.where(advantages > 0, settings.tau_pos, settings.tau_neg)
        return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    clipped = ratio.clamp(1 - settings.eps_clip_low, 1 + settings.eps_clip_high)
    each = -torch.minimum(ratio * advantages, clipped * advantages)
    if settings.policy_loss_type == "dual_clip":
        each = torch.where(advantages < 0, torch.minimum(-advantages * settings.clip_ratio_c, each), each)
    return each


def kl(s, base, kind):
    d = s - base
    if kind != "k3":
        return d if kind == "k1" else d**2 / 2
    d = (-d).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)
