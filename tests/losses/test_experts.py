"""A mixture of experts that TRL balances by a loss of its own: refused, or probed by the trainer's gradient."""

from types import SimpleNamespace

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig
from entropy_probe.losses.trl import TRLLoss
from tests.devices import rollouts
from tests.tiny_architectures import tiny_model


@pytest.mark.parametrize(
    ("own", "model", "refused"),
    [
        (None, {"output_router_logits": False, "router_aux_loss_coef": 0.001}, "0.001 .the model's."),
        (0.02, {"output_router_logits": False, "router_aux_loss_coef": 0.0}, "0.02 .the loss's."),
        (0.02, {"output_router_logits": True}, "0.02 .the loss's."),
        (0.0, {"output_router_logits": True, "router_aux_loss_coef": 0.001}, None),
        (None, {"output_router_logits": True, "router_aux_loss_coef": 0.0}, None),
        (None, {"output_router_logits": True}, None),
        (None, {}, None),
    ],
)
def test_what_is_refused(own, model, refused):
    loss = TRLLoss(router_aux_loss_coef=own)
    for config in (SimpleNamespace(**model), SimpleNamespace(text_config=SimpleNamespace(**model))):
        if refused is None:
            loss.check_model(config)
        else:
            with pytest.raises(ValueError, match=f"router_aux_loss_coef: expected 0, got {refused} on a mixture"):
                loss.check_model(config)
    loss.check_model(None)


def test_a_probe_of_a_mixture():
    model = tiny_model("mixtral")
    batches = {"update": rollouts(4, 2, 0, 30), "evaluation": rollouts(6, 2, 1, 30)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    probe = EntropyProbe(model, optimizer)
    for ask in (probe.run, probe.predict, probe.measure):
        with pytest.raises(ValueError, match=r"expected 0, got 0.001 \(the model's\) on a mixture of experts"):
            ask(**batches)
    for ask in (probe.one_batch, probe.cross_prompt):
        with pytest.raises(ValueError, match=r"expected 0, got 0.001 \(the model's\) on a mixture of experts"):
            ask(batches["update"])
    without = EntropyProbe(model, optimizer, ProbeConfig(loss=TRLLoss(router_aux_loss_coef=0.0)))
    planned = without.run(**batches)
    given = probe.predict(gradient=planned.step.gradient, evaluation=batches["evaluation"])
    assert given.predicted.value == pytest.approx(planned.predicted.value, rel=1e-6)
