"""The step that TRL takes is the one that is planned: a part of ``benchmarks/trl_steps.py``."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
STEPS = import_module("trl_steps")
NAMES = (
    "dapo, ε_high 0.28, KL 0.04, 2 iterations",
    "bnpo, accumulation 4",
    "dr_grpo",
    "cispo",
    "sapo by sequence",
    "vLLM, vespo, 2 iterations",
    "GSPO, grpo, KL 0.1, 2 iterations",
    "KL 0.5, LoRA",
    "entropy bonus 0.1, top 20% of entropy",
    "truncated masked, grpo",
    "accumulation 4, 8 steps per generation",
    "GMPO, 2 iterations, KL, top 50% of entropy",
    "RLOO",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_step_is_the_one_that_training_wrote(name):
    found = STEPS.compare(STEPS.SETTINGS[name])
    assert found["gradient"] <= 2e-5
    assert found["step"] <= STEPS.TARGET
    assert (found["ratio"] > 0.01) == (STEPS.SETTINGS[name].get("num_iterations", 1) > 1 or "8 steps" in name)


@pytest.mark.parametrize("name", STEPS.REFUSED)
def test_what_cannot_be_known_is_refused(name):
    setting, column = STEPS.REFUSED[name]
    with pytest.raises(ValueError, match=f"{column}: expected"):
        STEPS.compare(setting, column)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(STEPS.SETTINGS.keys() - set(NAMES)))
def test_the_step_is_the_one_that_training_wrote_in_every_setting(name):
    assert STEPS.compare(STEPS.SETTINGS[name])["step"] <= STEPS.TARGET
