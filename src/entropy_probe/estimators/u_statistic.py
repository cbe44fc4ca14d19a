"""The cross-prompt U-statistic: a first-order change from one batch that both predicts and updates.

Formulas: ``docs/theory.md``, "One batch". Source: Hoeffding, 1948 (U-statistics); Efron and Stein, 1981 (jackknife).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.estimators.uncertainty import Sampled


@dataclass(frozen=True, eq=False)
class CrossStatistic:
    """The U-statistic of ``<X_u, P Y_w>`` over distinct clusters, with two estimates of its error.

    Attributes:
        value: ``1 / (U (U - 1)) sum_{u != w} <X_u, P Y_w>``.
        bars_dot: ``<mean X, P mean Y>``, the V-statistic, biased by the diagonal.
        diagonal: ``sum_u <X_u, P Y_u>``.
        row_means: ``r_u``, half the mean of ``<X_u, P Y_w> + <X_w, P Y_u>`` over ``w != u``; their mean is ``value``.
        zeta_plugin: plug-in estimate of the variance of the projection, ``sum (r_u - mean + e_u / 2)^2 / (U - 1)`` with
            ``e_u`` of :func:`influence_of_sums`.
        zeta_jackknife: the same from leave-one-out values.
        se_plugin: ``sqrt(4 zeta_plugin / U)``.
        se_jackknife: square root of the jackknife variance.
    """

    value: float
    bars_dot: float
    diagonal: float
    row_means: Float[Tensor, " U"]
    zeta_plugin: float
    zeta_jackknife: float
    se_plugin: float
    se_jackknife: float


def influence_of_sums(
    value: float,
    weights: Float[Tensor, " U"],
    loss_weights: Float[Tensor, " U"],
    entropy: Sampled,
    length_slope: float,
) -> Float[Tensor, " U"]:
    """What each cluster does to the statistic through the sums over the batch that ``X`` and ``Y`` are made with.

    ``-value (b_u / mean b - 1) - value (c_u / mean c - 1) + length_slope I_u``: ``X`` is over the batch's tokens and
    ``Y`` over what its loss divides by, and ``X`` rises with the batch's own H by the length gradient. Mean 0; 0 where
    all clusters have as many sequences and neither divides by tokens. Source: ``docs/theory.md``, "One batch".

    Args:
        value: the statistic.
        weights: ``b_u``, the tokens or sequences that H of each cluster is over.
        loss_weights: ``c_u``, the tokens or sequences of each cluster that the loss divides by.
        entropy: H on the same clusters, with its influence ``I_u``.
        length_slope: ``<sum_u length gradient, P mean Y> / sum_u b_u`` per token, the change of the statistic per nat
            of H; 0 per sequence.
    """
    shares = (w.double() / w.double().mean() - 1 for w in (weights, loss_weights))
    return length_slope * entropy.influence - value * sum(shares)


def cross_statistic(
    entropy_side: Float[Tensor, " U"],
    update_side: Float[Tensor, " U"],
    diagonal: Float[Tensor, " U"],
    of_sums: Callable[[float], Float[Tensor, " U"]] | None = None,
) -> CrossStatistic:
    """The U-statistic from three inner products per cluster; no pair is ever formed.

    Args:
        entropy_side: ``<X_u, P sum_w Y_w>``.
        update_side: ``<sum_w X_w, P Y_u>``; sums to the same total.
        diagonal: ``<X_u, P Y_u>``.
        of_sums: from the statistic, what each cluster does to it beyond its pairs: :func:`influence_of_sums`; nothing
            by default.

    Raises:
        ValueError: with fewer than three clusters, which leaves the jackknife nothing to leave out.
    """
    clusters = diagonal.numel()
    if clusters < 3:
        raise ValueError(
            f"one batch: expected at least 3 clusters for the U-statistic and its jackknife error, got {clusters}; "
            "give more prompts or smaller blocks"
        )
    a, b, k = entropy_side.double(), update_side.double(), diagonal.double()
    total = a.sum()
    value = (total - k.sum()) / (clusters * (clusters - 1))
    rows = ((a - k) + (b - k)) / (2 * (clusters - 1))
    beyond = torch.zeros_like(rows) if of_sums is None else of_sums(value.item())
    zeta = (rows - rows.mean() + beyond / 2).square().sum() / (clusters - 1)
    left_out = (clusters * value - 2 * rows) / (clusters - 2) - beyond / (clusters - 1)
    variance = (clusters - 1) / clusters * (left_out - left_out.mean()).square().sum()
    return CrossStatistic(
        value=value.item(),
        bars_dot=(total / clusters**2).item(),
        diagonal=k.sum().item(),
        row_means=rows,
        zeta_plugin=zeta.item(),
        zeta_jackknife=(clusters * variance / 4).item(),
        se_plugin=(4 * zeta / clusters).sqrt().item(),
        se_jackknife=variance.sqrt().item(),
    )
