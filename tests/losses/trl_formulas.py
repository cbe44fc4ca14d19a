"""TRL's losses as its documentation and source define them, for autograd: one microbatch after the other."""

import math
from types import SimpleNamespace

import torch

DEFAULTS = {
    "loss_type": "dapo", "beta": 0.0, "use_bias_correction_kl": True, "epsilon": 0.2, "epsilon_high": None,
    "delta": None, "importance_sampling_level": "token", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
    "top_entropy_quantile": 1.0, "entropy_coef": 0.0, "off_policy_mask_threshold": None, "use_vllm": False,
    "vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None, "gradient_accumulation_steps": 1, "steps_per_generation": None,
    "max_completion_length": 6, "num_items_in_batch": None,
}  # fmt: skip


def trl_loss(s, h, batch, **settings):
    """The loss that one optimizer step is the gradient of.

    Args:
        s: current log-probabilities, ``[N, L]``.
        h: current entropies.
        batch: with mask, advantages [N], old, sampled, reference, microbatch [N].
        settings: TRL's arguments.
    """
    a = SimpleNamespace(**(DEFAULTS | settings))
    a.steps = a.steps_per_generation or a.gradient_accumulation_steps
    total = 0.0
    for k in range(a.gradient_accumulation_steps):
        rows = batch.microbatch == k
        generation = (batch.microbatch // a.steps) == k // a.steps
        items = a.num_items_in_batch or batch.mask[generation].sum()
        part = {name: None if x is None else x[rows] for name, x in vars(batch).items()}
        total = total + _microbatch(s[rows], h[rows], SimpleNamespace(**part), a, items)
    return total


def _clip(x, low=-math.inf, high=math.inf):
    return x.clamp(low, high)


def _microbatch(s, h, b, a, items):
    m, adv, n = b.mask.double(), b.advantages[:, None], len(s)
    old = s.detach() if b.old is None else b.old
    keep = m
    if a.top_entropy_quantile < 1:
        keep = m * (h.detach() >= torch.quantile(h.detach()[b.mask].float(), 1 - a.top_entropy_quantile))
    per_token = _gmpo if a.loss_type == "gmpo" else _rloo if a.loss_type == "rloo" else None
    if per_token is not None:
        return per_token(s, old, m, keep, adv[:, 0], b, a) / a.gradient_accumulation_steps
    log_ratio = s - old
    if a.importance_sampling_level == "sequence":
        log_ratio = ((log_ratio * m).sum(1) / m.sum(1).clamp(min=1))[:, None]
    ratio = log_ratio.exp()
    loss = _policy(s, old, ratio, m, adv, b, a)
    if a.off_policy_mask_threshold is not None:
        fallen = (b.sampled if a.use_vllm else old) - s.detach()
        mean = (fallen * m).sum(1, keepdim=True) / m.sum(1, keepdim=True).clamp(min=1)
        loss = loss * ((adv >= 0) | (mean <= a.off_policy_mask_threshold))
    if a.top_entropy_quantile < 1:
        loss = loss * keep
    if a.use_vllm and a.loss_type != "vespo":
        loss = loss * _sampler(old, m, b, a)
    if a.beta:
        d = b.reference - s
        kl = d.exp() - d - 1
        loss = loss + a.beta * (kl * ratio if a.use_bias_correction_kl else kl)
    out = _reduced(loss, m, n, a, items)
    if a.entropy_coef:
        out = out - a.entropy_coef * (h * keep).sum() / keep.sum().clamp(min=1) / a.gradient_accumulation_steps
    return out


def _policy(s, old, ratio, m, adv, b, a):
    high = a.epsilon if a.epsilon_high is None else a.epsilon_high
    if a.loss_type == "cispo":
        return -ratio.clamp(max=high).detach() * adv * s
    if a.loss_type == "sapo":
        tau = torch.where(adv > 0, a.sapo_temperature_pos, a.sapo_temperature_neg)
        return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * adv
    if a.loss_type == "vespo":
        with torch.no_grad():
            log_w = (_clip(s - old, -20, 20) * m).sum(1, keepdim=True)
            if a.use_vllm:
                log_w = log_w + _clip(_sampler(old, m, b, a).log(), math.log(1e-8), 20).sum(1, keepdim=True)
            log_w = _clip(log_w, math.log(1e-8), 20)
            k = torch.where(adv >= 0, a.vespo_k_pos, a.vespo_k_neg)
            lam = torch.where(adv >= 0, a.vespo_lambda_pos, a.vespo_lambda_neg)
            phi = (lam + k * log_w - lam * log_w.exp()).exp()
        return -phi * adv * s
    clipped = ratio.clamp(1 - a.epsilon, 1 + high)
    free = ratio if a.delta is None else ratio.clamp(max=a.delta)
    return -torch.min(free * adv, clipped * adv)


def _sampler(old, m, b, a):
    diff = (old.detach() - b.sampled) * m
    if a.vllm_importance_sampling_mode.startswith("sequence"):
        diff = diff.sum(1, keepdim=True)
    ratio, low, high = diff.exp(), a.vllm_importance_sampling_clip_min, a.vllm_importance_sampling_clip_max
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if a.vllm_importance_sampling_mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)


def _reduced(loss, m, n, a, items):
    share = a.gradient_accumulation_steps
    if a.loss_type in ("grpo", "sapo"):
        return ((loss * m).sum(1) / m.sum(1).clamp(min=1)).mean() / share
    if a.loss_type == "luspo":
        return (loss * m).sum(1).mean() / share
    if a.loss_type == "bnpo":
        return (loss * m).sum() / m.sum().clamp(min=1) / share
    if a.loss_type == "dr_grpo":
        return (loss * m).sum() / (n * a.max_completion_length) / share
    return (loss * m).sum() / (items * share / a.steps)


def _gmpo(s, old, m, keep, adv, b, a):
    high = a.epsilon if a.epsilon_high is None else a.epsilon_high
    log_ratio = s - old
    clipped = log_ratio.clamp(-a.epsilon, high)
    clipped = torch.where(adv[:, None] > 0, torch.minimum(log_ratio, clipped), torch.maximum(log_ratio, clipped))
    loss = -((clipped * keep).sum(1) / keep.sum(1).clamp(min=1)).exp() * adv
    if a.beta:
        d = b.reference - s
        loss = loss + a.beta * ((d.exp() - d - 1) * m).sum(1) / m.sum(1).clamp(min=1)
    return loss.mean()


def _rloo(s, old, m, keep, adv, b, a):
    high = a.epsilon if a.epsilon_high is None else a.epsilon_high
    ratio = ((s - old) * m).sum(1).exp()
    return -torch.min(ratio * adv, ratio.clamp(1 - a.epsilon, 1 + high) * adv).mean()
