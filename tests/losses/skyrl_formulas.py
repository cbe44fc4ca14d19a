"""SkyRL's loss, advantages scaled first as its trainer does, as a scalar that autograd differentiates."""

import torch


def loss(s, h, rollouts, settings):
    """The loss of one optimizer step; arguments as those of verl's."""
    mask = rollouts.response_mask
    advantages = scaled(rollouts.token_advantages.double(), mask, rollouts, settings)
    total = (policy(s, rollouts, advantages, mask, settings) * mask).sum()
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


def policy(s, rollouts, advantages, mask, settings):
    kind = settings.policy_loss_type
    to_sampler = kind in ("rollout_is", "dppo") or (kind == "cispo" and settings.cispo_anchor == "rollout")
    old = rollouts.sampled_logprobs if to_sampler else rollouts.old_logprobs
    d = torch.where(mask, s - old, 0.0)
    if kind == "importance_sampling":
        return -d.exp() * advantages
    if kind == "cispo":
        low, high = 1 - settings.cispo_eps_clip_low, 1 + settings.cispo_eps_clip_high
        return -advantages * d.clamp(-20, 20).exp().clamp(low, high).detach() * s
    if kind == "rollout_is":
        weight = d.clamp(-20, 20).exp().detach()
        inside = (weight > 1 - settings.eps_clip_low) & (weight < 1 + settings.eps_clip_high)
        return -advantages * torch.where(inside, weight, 0.0) * s
    if kind == "dppo":
        return -d.clamp(-20, 20).exp() * advantages * near(s.detach(), old, advantages, settings)
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


def near(s, old, advantages, settings):
    """The tokens inside DPPO's region."""
    p, q = s.exp(), old.exp()
    if settings.dppo_type == "binary_tv":
        far = ((advantages > 0) & (p - q > settings.delta_high)) | ((advantages < 0) & (q - p > settings.delta_low))
        return ~far
    divergence = q * (old - s) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    rising = (advantages > 0) & (p > q) & (divergence > settings.delta_high)
    return ~(rising | ((advantages < 0) & (p < q) & (divergence > settings.delta_low)))


def kl(s, base, kind):
    d = s - base
    if kind != "k3":
        return d if kind == "k1" else d**2 / 2
    d = (-d).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)
