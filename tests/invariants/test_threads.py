"""The same model in another thread: training is noticed, and nothing else of either thread reaches the other."""

import threading
from collections.abc import Callable

import pytest
import torch

from entropy_probe.scoring.isolation import of_this_thread
from tests.invariants.problems import batches, numbers, probe, same
from tests.reference.enumeration import TinyPolicy, trained_optimizer

UPDATE, EVALUATION = batches(n=30)


def elsewhere(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_another_thread_takes_is_noticed(cls):
    model = TinyPolicy()
    optimizer = trained_optimizer(model, cls=cls)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    subject = probe(model, optimizer)
    subject._shared["progress"] = lambda phase, *_: phase.startswith("update") and elsewhere(optimizer.step)
    with pytest.raises(
        ValueError, match="expected nobody to train it while it is probed, but its optimizer took a step"
    ):
        subject.run(update=UPDATE, evaluation=EVALUATION)
    subject._shared["progress"] = None
    subject.run(update=UPDATE, evaluation=EVALUATION)


class Shared(TinyPolicy):
    """Another thread calls its layers on other inputs in the midst of every forward pass."""

    def forward(self, input_ids, attention_mask):
        ids = torch.tensor([[1, 2, 1]])
        elsewhere(lambda: self.seen.append(super(Shared, self).forward(ids, torch.ones_like(ids)).logits.detach()))
        return super().forward(input_ids, attention_mask)


def test_another_threads_calls_and_the_probes_hooks_do_not_meet():
    alone, model = TinyPolicy(), Shared()
    model.seen = []
    expected = probe(alone, trained_optimizer(alone)).run(update=UPDATE, evaluation=EVALUATION)
    got = probe(model, trained_optimizer(model)).run(update=UPDATE, evaluation=EVALUATION)
    assert got.diagnostics.per_sample_gradients == expected.diagnostics.per_sample_gradients
    same(numbers(got), numbers(expected))
    assert model.seen


def test_a_hook_is_for_its_thread_and_for_the_workers_of_autograd():
    seen: list[str] = []
    hook = of_this_thread(lambda: seen.append(threading.current_thread().name))
    hook()
    elsewhere(hook)
    assert len(seen) == 1


def test_inference_mode_is_one_line():
    with torch.inference_mode():
        model = TinyPolicy()
    with pytest.raises(ValueError, match=r"expected one that can be differentiated, got torch\.inference_mode"):
        probe(model, torch.optim.AdamW(model.parameters())).run(update=UPDATE, evaluation=EVALUATION)
    model = TinyPolicy()
    subject = probe(model, trained_optimizer(model))
    with torch.inference_mode(), pytest.raises(ValueError, match="which it was made or is probed under; leave that"):
        subject.run(update=UPDATE, evaluation=EVALUATION)
