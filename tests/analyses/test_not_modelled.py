"""What of the trainer's step is not in the numbers, from the model and the optimizer."""

import torch
from torch import nn

from entropy_probe.analyses.not_modelled import of_frozen_geometry, of_model, of_rounding, unrounded


class Attention(nn.Module):
    """Drops out by a function, as attention does."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.attention_dropout = rate


def test_dropout():
    assert of_model(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), Attention(0.0))) == []
    (said,) = of_model(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.05), Attention(0.1)).eval())
    assert said.startswith("dropout of up to 0.1 in 2 modules (1 first)")


def trained(dtype: torch.dtype, lr: float) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Weights after three steps in a precision, and their optimizer."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape).to(dtype)
        optimizer.step()
    return dict(model.named_parameters()), optimizer


def test_rounding_of_the_step():
    parameters, optimizer = trained(torch.bfloat16, 1e-3)
    for p in parameters.values():
        p.data = p.data.float()  # as a checkpoint is loaded
    weight, delta = parameters["weight"], {name: torch.full_like(p, 1e-5) for name, p in parameters.items()}
    (said,) = of_rounding(parameters, optimizer, delta)
    stay = sum(int(((p + 1e-5).bfloat16() == p.bfloat16()).sum()) for p in parameters.values())
    share = stay / sum(p.numel() for p in parameters.values())
    assert 0.5 < share < 1
    assert f"rounding of the step to bfloat16, which the trained weights are exact in: {share:.1%} of the" in said
    delta["weight"][1:] = 0.0  # what does not move does not count
    moving = int(((weight[0] + 1e-5).bfloat16() == weight[0].bfloat16()).sum())
    moving += int(((parameters["bias"] + 1e-5).bfloat16() == parameters["bias"].bfloat16()).sum())
    assert f"{moving / 128:.1%} of the" in of_rounding(parameters, optimizer, delta)[0]
    weight.data[5, 5] += 1e-6
    assert of_rounding(parameters, optimizer, delta) == []


def test_weights_in_float32_are_not_rounded():
    parameters, optimizer = trained(torch.float32, 1e-3)
    delta = {name: torch.full_like(p, 1e-5) for name, p in parameters.items()}
    assert of_rounding(parameters, optimizer, delta) == []
    # exact in bfloat16, but as they came: never trained
    for p in parameters.values():
        p.data = p.data.bfloat16().float()
    assert of_rounding(parameters, torch.optim.AdamW(parameters.values()), delta) == []
    assert "float16" in of_rounding(*trained(torch.float16, 1e-3), delta)[0]


def test_zeros_are_no_evidence_of_a_precision():
    """A LoRA adapter before its first step: most of it is a ``lora_B`` of zeros."""
    parameters = {"lora_A": nn.Parameter(torch.randn(4, 8)), "lora_B": nn.Parameter(torch.zeros(32, 4))}
    optimizer = torch.optim.AdamW(parameters.values())
    delta = {name: torch.full_like(p, 1e-5) for name, p in parameters.items()}
    assert unrounded(parameters, optimizer, delta, "auto") == ([], [])
    assert unrounded({"lora_B": parameters["lora_B"]}, optimizer, delta, "auto") == ([], [])
    parameters["lora_A"].data = parameters["lora_A"].data.bfloat16().float()
    assert [note.code for note in unrounded(parameters, optimizer, delta, "auto")[1]] == ["precision_unknown"]
    optimizer = torch.optim.AdamW([parameters["lora_A"]])
    optimizer.state[parameters["lora_A"]] = {"step": torch.tensor(1.0), "exp_avg": torch.ones(4, 8)}
    assert [note.code for note in unrounded(parameters, optimizer, delta, "auto")[1]] == ["master_weights"]


def test_what_the_frozen_geometry_leaves_out():
    parameters, optimizer = trained(torch.float32, 1e-3)
    assert of_frozen_geometry(parameters, optimizer, 2.0, 1.0) == ["momentum, weight decay, clipping (frozen geometry)"]
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert of_frozen_geometry(parameters, optimizer, 0.5, 1.0) == ["momentum (frozen geometry)"]
    assert of_frozen_geometry(parameters, torch.optim.SGD(parameters.values(), lr=1.0), 0.5, 1.0) == []
