"""Evaluation rollouts beside a training run: sampled from the policy as it is, kept while they still speak for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entropy_probe.config import ProbeConfig
from entropy_probe.parallel.ranks import Ranks
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.sampling.collect import EVALUATION_STREAM
from entropy_probe.sampling.engine import SamplingParameters
from entropy_probe.sampling.hf import HFGenerator
from entropy_probe.sampling.responses import completed_rollouts, generate_responses, sequence_seeds
from entropy_probe.scoring.isolation import evaluating


@dataclass(frozen=True)
class HeldOut:
    """Which rollouts a step is judged on beside its own.

    Attributes:
        size: sequences, each with a prompt drawn with replacement.
        prompts: to draw from, as the trainer's data set has them in ``prompt``: texts or lists of messages. ``None``
            takes the trainer's own data set: the responses are fresh, which is what counts, and the prompts those that
            entropy is meant over.
        min_ess: rollouts of earlier steps are kept and reweighted while this share of them is effective, and sampled
            anew below it; 1 samples at every probe.
        seed: of prompts and responses; training's random state has no part in it.

    Raises:
        ValueError: for values out of range, or no prompts.
    """

    size: int = 64
    prompts: Sequence[Any] | None = None
    min_ess: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"size: expected at least 2 sequences, got {self.size}; an error needs more than one")
        if not 0 <= self.min_ess <= 1:
            raise ValueError(f"min_ess: expected a share between 0 and 1, got {self.min_ess}; correct it")
        if self.prompts is not None and not len(self.prompts):
            raise ValueError("prompts: expected at least one prompt, got none; give some, or None for the trainer's")


class HeldOutSampler:
    """Samples the rollouts of :class:`HeldOut`, and keeps them.

    Args:
        settings: which.
        trainer: of TRL; its prompts are made tokens in its own way.
        ranks: all processes; all get the rollouts that the first one has.

    Raises:
        ValueError: if the trainer's prompts cannot be drawn from, or responses need tools.
    """

    def __init__(self, settings: HeldOut, trainer: Any, ranks: Ranks) -> None:
        self.settings, self._trainer, self._ranks = settings, trainer, ranks
        self._kept: Rollouts | None = None
        self._round = 0
        if getattr(trainer, "tools", None) or getattr(trainer, "environment_factories", None):
            raise ValueError(
                "evaluation: expected a trainer without tools and environments, whose turns are not sampled here, got "
                "one with them; use evaluation='batch'"
            )
        if settings.prompts is None and not hasattr(trainer.train_dataset, "__len__"):
            raise ValueError(
                "evaluation: expected a data set of known length, got a stream; give HeldOut(prompts=[...])"
            )

    def rollouts(self, model: Any, config: ProbeConfig) -> tuple[Rollouts, ProbeConfig]:
        """The rollouts that are kept, or else new ones of the policy as it is; and the settings to take them by."""
        if self._kept is None or self.settings.min_ess == 1:
            self._kept = self._sampled(model, config)
            return self._kept, config
        weighted = {"on_mismatch": "reweight", "max_mismatch": 0.0, "min_ess_fraction": self.settings.min_ess}
        return self._kept, config.model_copy(update=weighted)

    def forget(self) -> None:
        """Let the next ones be new."""
        self._kept = None

    def _sampled(self, model: Any, config: ProbeConfig) -> Rollouts:
        trainer, settings = self._trainer, self.settings
        prompts = settings.prompts if settings.prompts is not None else trainer.train_dataset
        random = np.random.default_rng([settings.seed, self._round])
        drawn = random.integers(len(prompts), size=settings.size).tolist()
        texts = [prompts[i] if settings.prompts is not None else prompts[i]["prompt"] for i in drawn]
        seeds = sequence_seeds(settings.seed, EVALUATION_STREAM, self._round, range(settings.size))
        self._round += 1
        with evaluating(model):
            token_ids = trainer._tokenize_prompts(texts)[0]
            engine = HFGenerator(model, getattr(trainer.processing_class, "tokenizer", trainer.processing_class))
            parameters = SamplingParameters(config.temperature, trainer.args.max_completion_length)
            completions = generate_responses(engine, token_ids, drawn, parameters, seeds)
        return self._ranks.broadcast(completed_rollouts(drawn, completions))
