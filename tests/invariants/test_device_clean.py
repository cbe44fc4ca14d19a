"""No operation mixes the model's device with the CPU: the probe runs on a device that refuses it, see tests/elsewhere.

The probes run in a process of their own because the device stays registered.
"""

import json
import sys
import traceback

import pytest
import torch

from tests.devices import SCENARIOS, disagreements, hugging_face
from tests.processes import Process, run_all

LEFT_OUT = {"autocast", "checkpoint"}
"""Autocast has rules for each device, and the libraries that load checkpoints know the usual devices only."""
CLEAN = sorted(SCENARIOS.keys() - LEFT_OUT)
SOME = ("attribution, lora", "copied step", "curvature", "frozen geometry", "full, tied", "one batch", "sampling")
"""What is not left to the long suite."""


def forgetful(device: torch.device) -> dict[str, float]:
    """A probe that leaves the coefficients of the surrogates on the CPU."""
    from entropy_probe.scoring.packing import Microbatch

    Microbatch.gather = lambda self, values: values[self.rows][self.response_mask]  # type: ignore[method-assign]
    return hugging_face(device, "lora")


def checks_of_the_device(device: torch.device) -> dict[str, str]:
    """What a device allows and what it refuses."""
    x, indices = torch.arange(6.0).view(2, 3).to(device), torch.tensor([1, 0])
    allowed = [x + torch.tensor(1.0), x[indices], x.cpu() + torch.ones(2, 3), torch.zeros(2, 3).copy_(x)]
    assert [str(y.device) for y in allowed] == [str(device), str(device), "cpu", "cpu"]
    assert torch.equal(allowed[1].cpu(), torch.tensor([[3.0, 4.0, 5.0], [0.0, 1.0, 2.0]]))
    weight = torch.nn.Parameter(x)
    (gradient,) = torch.autograd.grad((weight**2).sum(), weight)
    assert gradient.device == device
    assert torch.equal(gradient.cpu(), 2 * torch.arange(6.0).view(2, 3))
    refused = {
        "add": lambda: x + torch.ones(2, 3),
        "number there": lambda: torch.ones(3) * x.sum(),
        "values here": lambda: torch.ones(3)[indices.to(device)],
        "matmul": lambda: x @ torch.ones(3, 1),
        "index_add": lambda: x.index_add(0, indices, torch.ones(2, 3)),
        "cat": lambda: torch.cat([x, torch.ones(1, 3)]),
        "in place": lambda: torch.ones(2, 3).add_(x),
    }
    return {name: _error(work) for name, work in refused.items()}


def _error(work) -> str:
    try:
        work()
    except RuntimeError:
        return traceback.format_exc()
    return ""


def main(*names: str) -> None:
    from tests.elsewhere import elsewhere, register

    register()
    torch.set_num_threads(1)
    found: dict[str, object] = {}
    on_cpu = {name: SCENARIOS[name][0](torch.device("cpu")) for name in names}
    with elsewhere() as device:
        found["refused"] = checks_of_the_device(device)
        for name in names:
            run, tolerance = SCENARIOS[name]
            try:
                found[name] = disagreements(on_cpu[name], run(device), tolerance)
            except Exception:
                found[name] = [traceback.format_exc()]
        found["forgetful"] = _error(lambda: forgetful(device))
    sys.stdout.write(json.dumps(found))


@pytest.fixture(scope="module")
def found(made_once):
    def make(directory):
        (stdout,) = run_all(Process(main, *SOME))
        (directory / "found.json").write_text(stdout.splitlines()[-1])

    return json.loads((made_once("device-clean", make) / "found.json").read_text())


@pytest.mark.parametrize("name", SOME)
def test_a_probe_on_another_device_gives_the_same_numbers(found, name):
    assert found[name] == [], "\n".join(found[name])


@pytest.mark.slow
def test_every_probe_on_another_device_gives_the_same_numbers():
    (stdout,) = run_all(Process(main, *CLEAN))
    outcomes = json.loads(stdout.splitlines()[-1])
    assert {name: outcomes[name] for name in CLEAN} == {name: [] for name in CLEAN}


def test_what_the_device_refuses(found):
    assert len(found["refused"]) == 7
    assert {
        name for name, error in found["refused"].items() if "expected all tensors on one device" not in error
    } == set()


def test_a_tensor_left_behind_is_seen(found):
    assert "expected all tensors on one device" in found["forgetful"]
    assert "scoring/logits.py" in found["forgetful"]
