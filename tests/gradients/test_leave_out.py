"""The update gradient without a block."""

from types import SimpleNamespace

import torch
from torch import nn

from entropy_probe.gradients.cross import _totals
from entropy_probe.gradients.leave_out import kept_gradient, reduced_gradients
from entropy_probe.gradients.per_sample import SampleGradients
from entropy_probe.losses.trl import TRLLoss
from entropy_probe.scoring.forward import Scorer
from tests.invariants.problems import batches
from tests.reference.enumeration import TinyPolicy


def test_what_only_the_left_out_block_reaches_becomes_zero_exactly():
    """Sums over a batch and over its blocks round differently; a sign or a root would blow the difference up."""
    parameters = {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(1))}
    shares = torch.tensor([[0.1, 0.2, 0.0, 0.7], [0.0, 0.3, 0.5, 0.0]])
    total = shares.sum(0)
    total[0] = torch.nextafter(total[0], torch.tensor(1.0))
    total[3] = torch.nextafter(total[3], torch.tensor(0.0))
    assert total[0] != shares[0, 0]
    whole = SampleGradients({"a": total[:3], "b": total[3:]}, torch.zeros(0, 2), shares, torch.zeros(0, 2))
    update, _ = batches(groups=2)
    given = (
        Scorer(TinyPolicy(), 1.0, 100),
        parameters,
        update,
        update.prompt_ids,
        TRLLoss(loss_type="dapo").coefficients(update, None),
    )
    without = list(reduced_gradients(*given, whole, [2.0, 3.0]))
    torch.testing.assert_close(without[0]["a"], 2 * shares[1, :3])
    assert without[0]["a"][0] == 0
    assert without[0]["b"] == 0
    torch.testing.assert_close(without[1]["a"], 3 * shares[0, :3])
    assert without[1]["a"][2] == 0
    unreached = SampleGradients({"a": None, "b": total[3:]}, torch.zeros(0, 2), shares, torch.zeros(0, 2))
    assert next(reduced_gradients(*given, unreached, [1.0]))["a"] is None


class Bigrams(nn.Embedding):
    """A policy in bfloat16."""

    def __init__(self) -> None:
        super().__init__(4, 4, dtype=torch.bfloat16)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=super().forward(input_ids))


def test_what_is_kept_has_one_precision_on_every_rank():
    """Backward passes in bfloat16 where a rank has some of the kept units, zeros where it has none: both are summed."""
    model = Bigrams()
    update, _ = batches(groups=2)
    scorer, loss = Scorer(model, 1.0, 100), TRLLoss(loss_type="dapo").coefficients(update, None)
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros(p.shape) for name, p in parameters.items()}
    whole = SampleGradients(dict(total), torch.zeros(0, 2), None, torch.zeros(0, 2))
    for kept in (torch.tensor([0]), torch.tensor([], dtype=torch.long)):
        found = kept_gradient(scorer, parameters, update, update.prompt_ids, kept, loss, whole)
        assert {g.dtype for g in found.values()} == {torch.float32}
        assert any(bool(g.any()) for g in found.values()) == bool(len(kept))


def test_totals_of_one_batch_are_in_float32():
    model = Bigrams()
    update, _ = batches(groups=2)
    parameters, loss = dict(model.named_parameters()), TRLLoss(loss_type="dapo").coefficients(update, None)
    scale = {name: torch.ones(p.shape) for name, p in parameters.items()}
    totals, _ = _totals(Scorer(model, 1.0, 100), parameters, update, update.prompt_ids, loss, loss, scale)
    assert {g.dtype for total in totals for g in total.values()} == {torch.float32}
