"""The callback inside real training runs of TRL: what it leaves alone, what it logs and writes, and how it gives up."""

from __future__ import annotations

import pytest

from entropy_probe.analyses import provenance
from entropy_probe.integrations.trl import EntropyProbeCallback, HeldOut
from entropy_probe.results.live import read_records
from tests.integrations.witness import differing, trained

pytestmark = pytest.mark.unchecked  # the run-time check of shapes draws from Python's random numbers
HELD_OUT = HeldOut(size=8)
SETTINGS = {
    "LoRA": ({}, "batch"),
    "full": ({"lora": False}, "batch"),
    "dropout, KL, accumulation": (
        {"adapter": {"lora_dropout": 0.2}, "beta": 0.1, "gradient_accumulation_steps": 2,
         "per_device_train_batch_size": 8}, "batch",
    ),
    "2 iterations": ({"num_iterations": 2, "steps": 4, "save_steps": 4}, "batch"),
    "2 iterations, held out": ({"num_iterations": 2}, HELD_OUT),
    "SGD": ({"optim": "sgd"}, HELD_OUT),
    "Adafactor": ({"optim": "adafactor"}, HELD_OUT),
    "bf16": ({"bf16": True}, "batch"),
    "bf16, held out": ({"bf16": True}, HELD_OUT),
    "bf16 weights": ({"prepare": "bfloat16", "lora": False}, "batch"),
    "gradient checkpointing": ({"gradient_checkpointing": True}, "batch"),
    "gradient checkpointing, full": ({"gradient_checkpointing": True, "lora": False}, HELD_OUT),
}  # fmt: skip
QUICK = ("dropout, KL, accumulation", "SGD")


def check_untouched(directory, settings, evaluation, *, probes: int) -> None:
    alone, _ = trained(directory / "alone", **settings)
    callback = EntropyProbeCallback(every=1, evaluation=evaluation)
    beside, warned = trained(directory / "beside", [callback], **settings)
    assert warned == []
    assert differing(beside, alone) == []
    assert len({step["weights"] for step in alone.seen}) > 1
    assert sum("entropy_probe/predicted" in log for log in beside.logs) == probes
    assert len(read_records(directory / "beside")) == probes


@pytest.mark.parametrize("name", QUICK)
def test_training_is_the_same_to_the_bit(tmp_path, name):
    check_untouched(tmp_path, *SETTINGS[name], probes=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - set(QUICK)))
def test_training_is_the_same_to_the_bit_in_every_setting(tmp_path, name):
    probes = 2 if name == "2 iterations" else 3  # the second step on responses is passed over
    check_untouched(tmp_path, *SETTINGS[name], probes=probes)


@pytest.mark.parametrize("place", [1, 7])
def test_a_probe_that_raises_switches_itself_off_and_training_goes_on(tmp_path, monkeypatch, place):
    alone, _ = trained(tmp_path / "alone")
    original, phases = provenance.Clock.phase, []

    def phase(self, name):
        phases.append(name)
        if len(phases) == place:
            raise RuntimeError(f"struck in {name}")
        return original(self, name)

    monkeypatch.setattr(provenance.Clock, "phase", phase)
    beside, warned = trained(tmp_path / "beside", [EntropyProbeCallback(every=1)])
    assert warned == [f"entropy-probe: switched off, training goes on: RuntimeError: struck in {phases[-1]}"]
    assert len(phases) == place
    assert differing(beside, alone) == []
