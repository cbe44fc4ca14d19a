"""AReaL's actor loss, one sequence after the other, as a scalar that autograd differentiates."""

import torch


def loss(s, h, rollouts, settings):
    """The loss of one optimizer step; arguments as those of verl's."""
    del h
    total = torch.zeros((), dtype=torch.float64)
    for i, inside in enumerate(rollouts.response_mask):
        if inside.any():
            columns = (rollouts.old_logprobs, rollouts.sampled_logprobs, rollouts.token_advantages)
            total = total + sequence(s[i][inside], *(x[i][inside].double() for x in columns), settings)
    return total / rollouts.response_mask.sum()


def sequence(s, old, sampled, advantages, settings):
    anchor = old if settings.use_decoupled_loss or settings.recompute_logprob else sampled
    kept, weight = torch.ones_like(s, dtype=torch.bool), torch.ones_like(s)
    if settings.use_decoupled_loss and settings.rejection_sampling is not None:
        kept, weight = rejected(old - sampled, settings.rejection_sampling)
    if not kept.any():
        return 0 * s.sum()
    s, anchor, advantages, weight = s[kept], anchor[kept], advantages[kept], weight[kept]
    ratio = (s - anchor).exp()
    if settings.importance_sampling_level == "sequence":
        ratio, advantages = (s - anchor).mean().exp().expand_as(s), advantages.mean().expand_as(s)
    if settings.use_sapo_loss:
        tau = torch.where(advantages > 0, settings.sapo_tau_pos, settings.sapo_tau_neg)
        return -(torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages).sum()
    high = settings.eps_clip if settings.eps_clip_higher is None else settings.eps_clip_higher
    clipped = ratio.clamp(1 - settings.eps_clip, 1 + high)
    each = torch.maximum(-advantages * ratio, -advantages * clipped)
    if settings.c_clip is not None:
        each = torch.minimum(each, advantages.abs() * settings.c_clip)
    return (each * weight).sum()


def rejected(d, rule):
    """The tokens that are kept, and the weights, of one sequence."""
    metric = {
        "ratio": d, "kl_k1": d, "kl_k2": d**2 / 2, "kl_k3": (-d).exp() - 1 + d,
    }[rule.metric]  # fmt: skip
    weight = d.exp()
    if rule.level == "sequence":
        metric = {"sum": metric.sum(), "mean": metric.mean(), "max": metric.max()}[rule.agg].expand_as(d)
        weight = d.mean().exp().expand_as(d) if rule.metric == "ratio" else weight
    metric = metric.exp() if rule.metric == "ratio" else metric
    inside = (metric <= rule.upper) & (rule.lower is None or metric >= rule.lower)
    if rule.action == "mask":
        return inside, weight
    held = weight.clamp(0.0 if rule.lower is None else rule.lower, rule.upper)
    return torch.ones_like(inside), (held if rule.level == "token" else torch.where(inside, weight, held))
