"""What a trainer's own log shows of its loss that a policy gradient at the sampling point does not have.

``trainer_state.json`` holds what was logged at each step. The keys are those of TRL's trainers (1.x) and of loops that
log alike; a log without any of them shows nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.safe_read import read_json

__all__ = ["not_modelled_by_log"]

LAST = 20
"""How many of the last records are looked at; settings may change during a run."""


def not_modelled_by_log(path: Path) -> tuple[str, ...]:
    """One line for each term of the loss, or other loss, that the log of a checkpoint directory shows.

    Raises:
        DamagedFileError: if the log is not JSON.
    """
    file = path / "trainer_state.json"
    history = read_json(file).get("log_history") if file.is_file() else None
    records = [record for record in history if isinstance(record, dict)] if isinstance(history, list) else []
    logged = {key: value for record in records[-LAST:] for key, value in _numbers(record).items()}
    largest = {key: max((abs(_numbers(r).get(key, 0.0)) for r in records[-LAST:]), default=0.0) for key in logged}
    return tuple(line for look in _SIGNS if (line := look(logged, largest)) is not None)


_Logged = dict[str, float]
"""The last number logged under each key, or the largest by size."""


def _numbers(record: dict[Any, Any]) -> _Logged:
    return {k: float(v) for k, v in record.items() if isinstance(k, str) and isinstance(v, int | float)}


def _other_loss(last: _Logged, _: _Logged) -> str | None:
    rewarded = "reward" in last or "objective/rlhf_reward" in last
    if "rewards/chosen" in last or "rewards/rejected" in last:
        return (
            "the loss itself: the log has rewards/chosen, so the trainer learns from preferences (DPO, KTO and alike), "
            "and the step here is that of a policy gradient, which it does not take"
        )
    if "mean_token_accuracy" in last and not rewarded:
        return (
            "the loss itself: the log has mean_token_accuracy and no reward, so the trainer imitates given text (SFT), "
            "and the step here is that of a policy gradient, which it does not take"
        )
    return None


def _kl(last: _Logged, _: _Logged) -> str | None:
    key = next((key for key in ("kl", "objective/kl", "kl_loss") if key in last), None)
    return None if key is None else f"the KL term to a reference policy (the log has {key}, {last[key]:.3g} last)"


def _entropy_bonus(last: _Logged, largest: _Logged) -> str | None:
    key = next((key for key in ("entropy_coef", "entropy_loss") if largest.get(key)), None)
    return None if key is None else f"the entropy bonus (the log has {key}, {last[key]:.3g} last)"


def _experts(last: _Logged, largest: _Logged) -> str | None:
    if not largest.get("aux_loss"):
        return None
    return f"the auxiliary loss that balances the experts (the log has aux_loss, {last['aux_loss']:.3g} last)"


def _clipped_ratios(_: _Logged, largest: _Logged) -> str | None:
    keys = [k for k, v in largest.items() if v and (k.startswith("clip_ratio") or "clipfrac" in k)]
    if not keys:
        return None
    key = max(keys, key=lambda k: largest[k])
    return (
        f"importance ratios other than 1 and their clipping: the log has {key} up to {largest[key]:.3g}, so the "
        "trainer takes several steps on the same rollouts; the step here is the first of them"
    )


def _sampler_weights(last: _Logged, _: _Logged) -> str | None:
    key = next((key for key in sorted(last) if key.startswith("sampling/importance_sampling_ratio")), None)
    return (
        None if key is None else f"the weights that correct for the sampler (the log has {key}, {last[key]:.3g} last)"
    )


_SIGNS: tuple[Callable[[_Logged, _Logged], str | None], ...] = (
    _other_loss,
    _kl,
    _entropy_bonus,
    _experts,
    _clipped_ratios,
    _sampler_weights,
)
