"""The horizon that contributions are taken at: shorter than the response, where that changes nothing but their error.

Formulas: ``docs/theory.md``, "Attribution".
"""

from __future__ import annotations

from entropy_probe.analyses.own_batch import OwnPrediction, own_prediction
from entropy_probe.analyses.predict import Prediction, predict
from entropy_probe.estimators.attribution import correlation
from entropy_probe.estimators.horizon import horizons

ENOUGH_ALIKE = 0.99
"""Correlation of the prompts' contributions with those to the whole response, on the same rollouts."""
MIN_PROMPTS = 4
"""Contributions other than 0; fewer are alike by chance."""


def at_own_horizon(prediction: Prediction) -> tuple[Prediction, float | None]:
    """The prediction within the horizon that it is divided at, and how its prompts correlate with those of the whole.

    That is ``config.horizon`` where it is a number. By default it is the shortest of 0, 1, 2, 4, ... that correlates
    enough, found by halving, since correlations rise with the horizon but for noise. Each one tried costs a gradient
    over the evaluation batch. Without a correlation it is the whole response.

    Args:
        prediction: of the whole response, of a step in closed form.
    """
    plan, config, whole = prediction.plan, prediction.plan.policy.config, prediction.by_prompt
    if config.horizon is None or config.entropy != "rao_blackwell" or whole is None:
        return prediction, None
    alike = int((whole != 0).sum()) >= MIN_PROMPTS and bool((whole != whole[0]).any())
    if isinstance(config.horizon, int):
        within = _predict(prediction, config.horizon)
        return within, _correlation(within, prediction) if alike else None
    if not alike:
        return prediction, None
    ladder = [k for k in horizons(int(plan.evaluation.rollouts.response_lengths.max())) if k is not None]
    best: tuple[Prediction, float | None] = (prediction, None)
    low, high = 0, len(ladder)
    while low < high:
        middle = (low + high) // 2
        within = _predict(prediction, ladder[middle])
        reached = _correlation(within, prediction)
        if reached is not None and reached >= ENOUGH_ALIKE:
            best, high = (within, reached), middle
        else:
            low = middle + 1
    return best


def _predict(prediction: Prediction, horizon: int) -> Prediction:
    again = own_prediction if isinstance(prediction, OwnPrediction) else predict
    return again(prediction.plan, horizon)


def _correlation(within: Prediction, whole: Prediction) -> float | None:
    assert within.by_prompt is not None
    assert whole.by_prompt is not None
    constant = bool((within.by_prompt == within.by_prompt[0]).all())
    return None if constant else correlation(within.by_prompt, whole.by_prompt)
