"""OpenRLHF's actor loss (0.9.0 to 0.11.0), one microbatch after the other, as a scalar that autograd differentiates."""

import torch


def version_of(settings):
    return tuple(int(part) for part in settings.version.split("."))


def loss(s, h, rollouts, settings):
    """The loss of one optimizer step; arguments as those of verl's."""
    mask = rollouts.response_mask.double()
    old = s.detach() if rollouts.old_logprobs is None else rollouts.old_logprobs
    ids = torch.zeros(len(s), dtype=torch.long) if rollouts.microbatch_ids is None else rollouts.microbatch_ids
    version = version_of(settings)
    whole = version >= (0, 10, 4) or (version == (0, 10, 3) and settings.use_dynamic_batch)
    if version == (0, 10, 3):
        ids = ids // settings.num_processes
    total = torch.zeros((), dtype=torch.float64)
    for which in [None] if whole else ids.unique().tolist():
        rows = torch.ones(len(s), dtype=torch.bool) if which is None else ids == which
        sampled = None if rollouts.sampled_logprobs is None else rollouts.sampled_logprobs[rows]
        by_token = settings.token_level_loss and settings.policy_loss_type != "gspo"
        value = policy_loss(s[rows], old[rows], sampled, rollouts.token_advantages[rows].double(), mask[rows], settings)
        micro = mean(value, mask[rows], by_token)
        if settings.use_kl_loss:
            kl = approximate_kl(s[rows] - rollouts.reference_logprobs[rows], settings.kl_estimator)
            micro = micro + settings.init_kl_coef * mean(kl, mask[rows], True)
        if settings.entropy_loss_coef:
            micro = micro - settings.entropy_loss_coef * mean(h[rows], mask[rows], True)
        total = total + micro * int(rows.sum()) / len(s)
    return total


def mean(matrix, mask, by_token):
    matrix = torch.where(mask.bool(), matrix, 0.0)
    if by_token:
        return matrix.sum() / mask.sum()
    lengths = mask.sum(1)
    return sum(row.sum() / length for row, length in zip(matrix, lengths, strict=True) if length) / (lengths > 0).sum()


def approximate_kl(d, estimator):
    return {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator].clamp(-10, 10)


def policy_loss(s, old, sampled, advantages, mask, settings):
    corrected = settings.enable_vllm_is_correction
    lengths = mask.sum(1).clamp(min=1)
    if settings.policy_loss_type == "ppo":
        d = s - old
        ratio = (d.clamp(-20, 20) if version_of(settings) >= (0, 10, 3) else d).exp()
    else:
        d = torch.where(mask.bool(), s - (sampled if corrected else old), 0.0)
        ratio = (d.sum(1) / lengths).exp()[:, None] * mask
    low, high = settings.eps_clip_low_high or (settings.eps_clip, settings.eps_clip)
    bounded = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if settings.dual_clip is not None:
        bounded = torch.where(advantages < 0, torch.maximum(bounded, settings.dual_clip * advantages), bounded)
    if corrected and settings.policy_loss_type == "ppo":
        bounded = bounded * correction(torch.where(mask.bool(), old - sampled, 0.0), lengths, settings)
    return -bounded


def correction(d, lengths, settings):
    bounds = settings.vllm_is_truncated_threshold
    if not isinstance(bounds, tuple):
        return d.exp().clamp(max=bounds).detach()
    low, high = bounds
    weight = d.exp().detach()
    if settings.vllm_is_correction_type == "icepop":
        return weight * ((weight >= low) & (weight <= high))
    if settings.vllm_is_correction_type == "seq-mask-tis":
        whole = (d.sum(1) / lengths).exp()[:, None]
        return weight * ((whole >= low) & (whole <= high))
    return weight.clamp(low, high)
