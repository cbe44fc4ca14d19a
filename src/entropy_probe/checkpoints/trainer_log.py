"""What a trainer's own log shows of the run: its loss, and numbers that a probe's own can be held against.

``trainer_state.json`` holds what was logged at each step. The keys are those of TRL's trainers (1.x) and of loops that
log alike; a log without any of them shows nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.safe_read import read_json
from entropy_probe.results.live import logged_numbers

LAST = 20
"""How many of the last records are looked at; settings may change during a run."""
COMPARED = 5
"""Of how many the numbers are kept."""
LOGGED = ("grad_norm", "entropy", "completions/mean_length", "reward")
"""What a probe has too: the norm before clipping, nats per token, tokens per response, and the mean."""

LOG_FILE = "trainer_state.json"


@dataclass(frozen=True)
class TrainerLog:
    """The last training records of a log, the numbers in them."""

    records: tuple[dict[str, float], ...]  # by key, in order

    @cached_property
    def keys(self) -> set[str]:
        """What is logged."""
        return {key for record in self.records for key in record}

    def last(self, key: str) -> float | None:
        """The last number under a key."""
        return next((record[key] for record in reversed(self.records) if key in record), None)

    def largest(self, key: str) -> float:
        """The largest by size, 0 where there is none."""
        return max((abs(record.get(key, 0.0)) for record in self.records), default=0.0)

    @property
    def numbers(self) -> dict[str, tuple[float, ...]]:
        """The last numbers under the keys that can be compared, where there are any."""
        logged = {key: [record[key] for record in self.records if key in record] for key in LOGGED}
        return {key: tuple(values[-COMPARED:]) for key, values in logged.items() if values}

    @property
    def reuses_rollouts(self) -> bool:
        """Whether some steps log no reward, having sampled nothing."""
        clipped = [record for record in self.records if any(key.startswith("clip_ratio") for key in record)]
        return any("reward" in record for record in clipped) and any("reward" not in record for record in clipped)

    def other_loss(self) -> str | None:
        """Which trainer it is, and what shows it, where its loss is no policy gradient that is modelled."""
        for shown, but, name in _OTHER_LOSSES:
            if shown in self.keys and but not in self.keys:
                return f"{name} ({LOG_FILE} logs {shown})"
        trains, samples = self.keys & {"loss", "grad_norm"}, ("reward", "clip_ratio", "cispo_", "vespo/", "objective/")
        if trains and not any(key.startswith(samples) for key in self.keys):
            return f"a trainer without rewards ({LOG_FILE} logs neither reward nor clip_ratio)"
        return None

    def settings(self) -> Iterator[tuple[str, Any, str]]:
        """What the keys tell of settings of TRL's losses: name, value (None for any but 0), and the key."""
        if self.last("kl") is not None:
            yield "beta", None, "kl"
        if self.largest("entropy_coef"):
            yield "entropy_coef", self.last("entropy_coef"), "entropy_coef"
        for key, loss_type in (("cispo_clip_ratio", "cispo"), ("vespo/phi_seq_mean", "vespo")):
            if self.last(key) is not None:
                yield "loss_type", loss_type, key

    def not_modelled(self) -> tuple[str, ...]:
        """One line for each term of the loss that it shows and a policy gradient at the sampling point does not have.

        How a line begins says which term it is: see :attr:`entropy_probe.losses.Loss.models`.
        """
        kl = [key for key in ("kl", "objective/kl", "kl_loss") if self.last(key) is not None]
        bonus = [key for key in ("entropy_coef", "entropy_loss") if self.largest(key)]
        experts = ["aux_loss"] if self.largest("aux_loss") else []
        sampler = sorted(key for key in self.keys if key.startswith("sampling/importance_sampling_ratio"))
        return (
            *self._told("the KL term to a reference policy", kl),
            *self._told("the entropy bonus", bonus),
            *self._told("the auxiliary loss that balances the experts", experts),
            *self._ratios(),
            *self._told("the weights that correct for the sampler", sampler),
        )

    def _told(self, what: str, keys: list[str]) -> list[str]:
        return [f"{what} (the log has {key}, {self.last(key):.3g} last)" for key in keys[:1]]

    def _ratios(self) -> list[str]:
        keys = sorted(key for key in self.keys if key.startswith("clip_ratio") or "clipfrac" in key)
        key = max(keys, key=self.largest, default=None)
        if key is None or not self.largest(key):
            return []
        return [
            f"importance ratios other than 1 and their clipping: the log has {key} up to {self.largest(key):.3g}, so "
            "the trainer takes several steps on the same rollouts; the step here is the first of them"
        ]


_OTHER_LOSSES = (
    ("objective/rlhf_reward", "reward", "online DPO, or PPO or RLOO of older TRL"),
    ("loss/value_avg", "", "PPO with a learned value function"),
    ("log_odds_ratio", "", "ORPO"),
    ("nll_loss", "", "CPO"),
    ("rewards/chosen", "", "DPO, KTO or another trainer that learns from preferences"),
    ("rewards/rejected", "", "DPO, KTO or another trainer that learns from preferences"),
    ("logps/chosen", "", "DPO, KTO or another trainer that learns from preferences"),
    ("mean_token_accuracy", "reward", "SFT or another trainer that imitates given text"),
    ("margin", "reward", "a trainer of reward models"),
)
"""A key, one that may not be there beside it, and who logs so, the most telling first."""


def read_log(path: Path) -> TrainerLog:
    """The end of the log of a checkpoint directory, empty where there is none."""
    return TrainerLog(read_history(path)[-LAST:])


def read_history(path: Path) -> tuple[dict[str, float], ...]:
    """All numbers that were logged of training in a checkpoint directory, a record at a time; none without a log."""
    file = path / LOG_FILE
    history = read_json(file).get("log_history") if file.is_file() else None
    history = history if isinstance(history, list) else []
    records = [logged_numbers(record) for record in history if isinstance(record, dict)]
    return tuple(record for record in records if not any(key.startswith(("eval_", "train_")) for key in record))
