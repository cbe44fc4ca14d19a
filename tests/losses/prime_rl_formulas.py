"""prime-rl's losses (0.2 to 0.8), one sequence after the other, as a scalar that autograd differentiates."""

import torch


def loss(s, h, rollouts, settings):
    """The loss of one optimizer step; arguments as those of verl's."""
    del h
    first = settings.version in ("0.2", "0.3", "0.4")
    processes = settings.num_processes if settings.version <= "0.5" else 1
    process = rollouts.microbatch_ids % processes
    totals = torch.zeros(processes, dtype=torch.float64)
    for i, inside in enumerate(rollouts.response_mask):
        if not inside.any():
            continue
        teacher = None if rollouts.reference_logprobs is None else rollouts.reference_logprobs[i][inside]
        part = (s[i][inside], rollouts.sampled_logprobs[i][inside], rollouts.token_advantages[i][inside].double())
        term = masked_importance(*part, teacher, settings) if first else trust_region(*part, teacher, settings)
        totals = totals + term * torch.nn.functional.one_hot(process[i], processes)
    if first and settings.ratio_type == "sequence":
        return totals.sum() / len(rollouts.microbatch_ids.unique())
    tokens = [rollouts.response_mask[process == which].sum() for which in range(processes)]
    return (totals / torch.stack(tokens)).mean()


def trust_region(s, q, advantages, teacher, settings):
    moved = (s.exp() - q.exp()).detach()
    if settings.version == "0.5":
        kept = (moved <= settings.ipo_mask_high) & (moved >= -settings.ipo_mask_low)
    elif settings.type == "ipo":
        kept = moved.abs() <= settings.ipo_threshold
    else:
        kept = torch.where(advantages > 0, moved <= settings.dppo_mask_high, moved >= -settings.dppo_mask_low)
    advantages = settings.adv_tau * advantages
    if settings.version == "0.5" and settings.teacher_tau:
        advantages = advantages + settings.teacher_tau * (teacher - s).detach()
    return (
        -kept.double() * advantages * (s - q).exp()
        + (1e-3 if settings.kl_tau is None else settings.kl_tau) * (s - q) ** 2
    ).sum()


def masked_importance(s, q, advantages, teacher, settings):
    d = (s - q).detach()
    ratio, mean = d.exp(), d.mean().exp()
    kept = (ratio >= settings.token_mask_low) & (ratio <= settings.token_mask_high)
    kept &= bool(settings.geo_mask_low <= mean <= settings.geo_mask_high)
    kept &= bool(ratio.min() >= settings.sequence_mask_low) & bool(ratio.max() <= settings.sequence_mask_high)
    if settings.ratio_type == "sequence":
        weight = d.sum().clamp(max=10).exp().clamp(max=settings.sequence_clip_high) / len(s)
    else:
        weight = ratio
    advantages = settings.adv_tau * advantages
    if settings.teacher_tau:
        advantages = advantages + settings.teacher_tau * (teacher - s).detach()
    return -(weight * (advantages - (settings.kl_tau or 0.0) * d) * kept * s).sum()
