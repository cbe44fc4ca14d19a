"""verl's actor loss (0.7.0 to 0.9.0), one microbatch after the other, as a scalar that autograd differentiates."""

import math

import torch


def loss(s, h, rollouts, settings):
    """The loss of one optimizer step of one rank.

    Args:
        s: log-probabilities, ``[N, L]``, float64, with gradient.
        h: entropies likewise.
        rollouts: with ``old_logprobs``, ``sampled_logprobs``, ``reference_logprobs`` and ``microbatch_ids``.
        settings: verl's, by its own names.
    """
    mask = rollouts.response_mask.double()
    old = s.detach() if rollouts.old_logprobs is None else rollouts.old_logprobs
    is_weights = None
    if settings.bypass_mode:
        old = rollouts.sampled_logprobs
    elif settings.rollout_is is not None or settings.rollout_rs is not None:
        is_weights, mask = correction(old - rollouts.sampled_logprobs, mask, settings)
    ids = torch.zeros(len(s), dtype=torch.long) if rollouts.microbatch_ids is None else rollouts.microbatch_ids
    generator = torch.Generator().manual_seed(settings.seed)
    total = torch.zeros((), dtype=torch.float64)
    for which in ids.unique().tolist():
        rows = ids == which
        share = int(rows.sum()) / len(s)
        scale = Scale(mask, settings, share)
        part = (s[rows], old[rows], rollouts.token_advantages[rows].double(), mask[rows])
        weights = None if is_weights is None else is_weights[rows]
        micro = policy_loss(*part, weights, settings, scale, generator)
        if settings.entropy_coeff:
            micro = micro - settings.entropy_coeff * scale(h[rows], mask[rows], settings.loss_agg_mode)
        if settings.use_kl_loss:
            kl = kl_penalty(s[rows], rollouts.reference_logprobs[rows], settings.kl_loss_type)
            micro = micro + settings.kl_loss_coef * scale(kl, mask[rows], settings.loss_agg_mode)
        total = total + (share * micro if scale.legacy else micro)
    return total


class Scale:
    """What divides a matrix of losses: the microbatch in the first workers, the mini-batch in the later ones."""

    def __init__(self, mini_mask, settings, share):
        self.legacy = settings.version in ("0.7.0", "0.7.1") and settings.use_legacy_worker_impl != "disable"
        self.first_norm = settings.version == "0.7.0"
        self.tokens = None if self.legacy else mini_mask.sum()
        self.sequences = None if self.legacy else len(mini_mask)
        self.factor = settings.loss_scale_factor
        self.share = share

    def __call__(self, matrix, mask, mode):
        matrix = torch.where(mask.bool(), matrix, 0.0)
        lengths = mask.sum(1)
        tokens = mask.sum() if self.tokens is None else self.tokens
        sequences = (lengths > 0).sum() if self.sequences is None else self.sequences
        if mode == "token-mean":
            return matrix.sum() / tokens
        if mode == "token-sum":
            return matrix.sum()
        if mode == "seq-mean-token-sum":
            return matrix.sum(1).sum() / sequences
        if mode == "seq-mean-token-mean":
            return sum(row.sum() / length for row, length in zip(matrix, lengths, strict=True) if length) / sequences
        assert mode == "seq-mean-token-sum-norm"
        return matrix.sum() / self.factor / (1 if self.first_norm else sequences)


def kl_penalty(s, ref, kind):
    forward = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}.get(kind.removesuffix("+"), kind.removesuffix("+"))
    if forward == "k1":
        value = s - ref
    elif forward == "abs":
        value = (s - ref).abs()
    elif forward == "k2":
        value = 0.5 * (s - ref) ** 2
    else:
        inverse = (ref - s).clamp(-20, 20)
        value = (inverse.exp() - inverse - 1).clamp(-10, 10)
    if kind.endswith("+"):
        square = 0.5 * (s - ref) ** 2
        return square - square.detach() + value.detach()
    return value


def correction(log_ratio, mask, settings):
    """Weights of the policy loss and the mask without what is rejected, from ``log(trained / sampled)``."""
    weights = None
    if settings.rollout_is is not None:
        if settings.rollout_is == "token":
            weights = log_ratio.clamp(-20, 20).exp()
        else:
            weights = (log_ratio * mask).sum(1, keepdim=True).clamp(-20, 20).exp().expand_as(log_ratio)
        weights = weights * mask
        low, _, high = str(settings.rollout_is_threshold).rpartition("_")
        if low:
            weights = torch.where((weights >= float(low)) & (weights <= float(high)), weights, 0.0)
        else:
            weights = weights.clamp(max=float(high))
        if settings.rollout_is_batch_normalize:
            if settings.rollout_is == "token":
                mean = weights.sum() / mask.sum()
            else:
                answered = mask.sum(1) > 0
                mean = ((weights * mask).sum(1)[answered] / mask.sum(1)[answered]).mean()
            weights = weights / mean
        weights = weights.detach()
    if settings.rollout_rs is not None:
        options = settings.rollout_rs.split(",")
        thresholds = str(settings.rollout_rs_threshold).split(",")
        if len(thresholds) == 1:
            thresholds = thresholds * len(options)
        kept = torch.ones_like(mask)
        for option, threshold in zip(options, thresholds, strict=True):
            kept = kept * accepted(log_ratio.detach(), mask, option, threshold)
        mask = mask * kept
    return weights, mask


def accepted(log_ratio, mask, option, threshold):
    level, kind = option.rsplit("_", 1)
    d = log_ratio.clamp(-20, 20)
    value = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[kind]
    if level == "seq_sum":
        value = (value * mask).sum(1, keepdim=True)
    elif level == "seq_mean":
        value = (value * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    elif level == "seq_max":
        value = value.masked_fill(mask == 0, -math.inf).amax(1, keepdim=True)
    if kind == "k1":
        low, _, high = threshold.rpartition("_")
        low = math.log(float(low)) if low else -math.log(float(high))
        return ((value >= low) & (value <= math.log(float(high)))).double()
    return (value <= float(threshold)).double()


def policy_loss(s, old, advantages, mask, weights, settings, scale, generator):
    mode, where = settings.loss_mode, settings.loss_agg_mode
    kept = mask
    if settings.bypass_mode:
        weights, kept = correction((s - old).detach(), mask, settings)
        if settings.loss_type == "ppo_clip":
            weights = None
        mode = {"ppo_clip": "vanilla", "reinforce": "gpg"}[settings.loss_type]
    low = settings.clip_ratio if settings.clip_ratio_low is None else settings.clip_ratio_low
    high = settings.clip_ratio if settings.clip_ratio_high is None else settings.clip_ratio_high
    d = s - old
    ratio = (d if mode in ("clip_cov", "kl_cov") else d.clamp(-20, 20)).exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    if mode == "vanilla":
        upper = torch.maximum(unclipped, clipped)
        value = torch.where(advantages < 0, torch.minimum(-advantages * settings.clip_ratio_c, upper), upper)
    elif mode == "gpg":
        value = -advantages * s
    elif mode == "cispo":
        value = -ratio.clamp(1 - low, 1 + high).detach() * advantages * s
    elif mode == "dro":
        value = -(s * advantages - 0.5 * settings.dro_beta * d**2)
    elif mode in ("dppo_tv", "dppo_kl"):
        value = -advantages * ratio.clamp(max=settings.clip_ratio_c).detach() * s
        value = value * trusted(s.detach(), old, advantages, mode, low, high)
    elif mode == "gspo":
        mean = (d * mask).sum(1) / mask.sum(1).clamp(min=1)
        ratio = (s - s.detach() + mean.detach()[:, None]).clamp(max=10).exp()
        value = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
        where = "seq-mean-token-mean"
    elif mode == "sapo":
        tau = torch.where(advantages > 0, settings.tau_pos, settings.tau_neg)
        value = -advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
        where = "seq-mean-token-mean"
    elif mode == "clip_cov":
        value = torch.maximum(unclipped, clipped) * survivors(
            s, unclipped, clipped, advantages, mask, settings, generator
        )
    elif mode == "kl_cov":
        value = unclipped + settings.ppo_kl_coef * d.abs() * largest(s, advantages, mask, settings)
    else:
        assert mode == "geo_mean"
        return geo_mean(d, advantages, mask, weights, low, high)
    return scale(value if weights is None else value * weights, kept, where)


def trusted(s, old, advantages, mode, low, high):
    p, q = s.exp(), old.exp()
    if mode == "dppo_tv":
        return torch.where(advantages > 0, p - q <= high, p - q >= -low).double()
    divergence = q * (old - s) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    up, down = (divergence <= high) | (p <= q), (divergence <= low) | (p >= q)
    return torch.where(advantages > 0, up, down).double()


def covariances(s, advantages, mask):
    inside = mask.bool()
    return (advantages - advantages[inside].mean()) * (s - s[inside].mean()).detach()


def survivors(s, unclipped, clipped, advantages, mask, settings, generator):
    cov = covariances(s, advantages, mask)
    inside = mask.bool() & ~(clipped > unclipped) & (cov > settings.clip_cov_lb) & (cov < settings.clip_cov_ub)
    candidates = inside.nonzero()
    count = max(int(settings.clip_cov_ratio * int(mask.sum())), 1)
    drawn = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    kept = torch.ones_like(mask)
    kept[drawn[:, 0], drawn[:, 1]] = 0
    return kept


def largest(s, advantages, mask, settings):
    cov = covariances(s, advantages, mask).masked_fill(mask == 0, -math.inf)
    count = max(1, int(int(mask.sum()) * settings.kl_cov_ratio))
    chosen = torch.zeros_like(mask).flatten()
    chosen[cov.flatten().topk(count).indices] = 1
    return chosen.view_as(mask)


def geo_mean(d, advantages, mask, weights, low, high):
    values = []
    for row, advantage, inside in zip(d, advantages, mask.bool(), strict=True):
        row, sign = row[inside], advantage[inside].sign()
        least = sign * torch.minimum(sign * row, sign * row.clamp(-low, high))
        count = max(int(inside.sum()), 1)
        values.append(-(advantage[inside].sum() / count) * (least.sum() / count).exp())
    value = torch.stack(values)
    if weights is not None:
        lengths = mask.sum(1).clamp(min=1)
        value = value * (((weights + 1e-10).log() * mask).sum(1) / lengths).exp()
    return value.mean()
