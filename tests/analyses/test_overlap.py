"""Equal sequences within a batch and in two batches, against what chance makes of them."""

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.analyses.overlap import Contents, copies, shared
from tests.invariants.hf_problems import policy, rollouts
from tests.notes import texts

NUM_PROMPTS, NUM_RESPONSES = 8, 400


def drawn(seed: int, count: int, decay: float = 1.2) -> tuple[Contents, torch.Tensor]:
    """Draws of a policy whose responses have probabilities like ``1 / rank ** decay``, and their log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, NUM_RESPONSES + 1).double() ** -decay
    logprobs = (weights / weights.sum()).log()
    prompts = torch.randint(NUM_PROMPTS, (count,), generator=generator)
    rows = torch.multinomial(logprobs.exp(), count, replacement=True, generator=generator)
    sequences = tuple(b"%d %d" % pair for pair in zip(prompts.tolist(), rows.tolist(), strict=True))
    return Contents(sequences, tuple(b"%d" % p for p in prompts.tolist())), logprobs[rows]


def test_chance_is_no_overlap():
    for seed in range(200):
        (one, logprobs), (other, _) = drawn(2 * seed, 400), drawn(2 * seed + 1, 160)
        assert not shared(one, logprobs, other).significant
        assert not copies(one, logprobs).significant
    assert shared(one, logprobs, other).sequences > 100  # which all repeat what is likely


def test_the_expected_number_is_that_of_chance():
    pairs = [(drawn(2 * seed, 400, 0.0), drawn(2 * seed + 1, 60, 0.0)[0]) for seed in range(50)]
    seen = [len(set(one.sequences) & set(other.sequences)) for (one, _), other in pairs]
    assert sum(shared(*one, other).expected for one, other in pairs) == pytest.approx(sum(seen), rel=0.1)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_part_of_another_batch_is_found_in_any_order(share):
    (one, logprobs), (other, _) = drawn(0, 400, 0.5), drawn(1, 160, 0.5)
    taken = [int(k) for k in torch.randperm(400, generator=torch.Generator().manual_seed(2))[: int(share * 160)]]
    mixed = Contents(
        other.sequences[len(taken) :] + tuple(one.sequences[k] for k in taken),
        other.prompts[len(taken) :] + tuple(one.prompts[k] for k in taken),
    )
    assert shared(one, logprobs, mixed).significant
    assert not shared(one, logprobs, other).significant


@torch.no_grad()
def sampled(model, seed: int, n: int = 24, group: int = 4) -> Rollouts:
    """Responses of 12 tokens that the policy itself draws, each to a prompt of four tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 12, (n // group, 4), generator=generator).repeat_interleave(group, 0)
    for _ in range(12):
        p = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
    mask = (torch.arange(16) >= 4).expand(n, -1)
    advantages = torch.randn(n, generator=generator)
    prompts = torch.arange(n // group).repeat_interleave(group)
    return Rollouts(ids, torch.ones_like(ids), mask, prompts, advantages=advantages)


def test_every_row_twice_is_said_of_either_batch():
    model, optimizer = policy("lora")
    probe = EntropyProbe(model, optimizer, ProbeConfig(loss_type="dapo"))
    update, evaluation = sampled(model, 0), sampled(model, 1)
    twice = torch.arange(len(update)).repeat(2)
    for given in ({"update": update.select(twice), "evaluation": evaluation},
                  {"update": update, "evaluation": evaluation.select(twice)}):  # fmt: skip
        notes = " ".join(texts(probe.predict(**given).diagnostics.notes))
        (role,) = (name for name, batch in given.items() if len(batch) > len(update))
        assert f"{role}: 48 of 48 sequences occur more than once" in notes
    notes = probe.predict(update=update, evaluation=evaluation).diagnostics.notes
    assert "more than once" not in " ".join(texts(notes))


def test_evaluation_rollouts_from_the_update_batch_are_said():
    model, optimizer = policy("lora")
    probe = EntropyProbe(model, optimizer, ProbeConfig(loss_type="dapo"))
    update, evaluation = sampled(model, 0), sampled(model, 1)
    some = update.select(torch.tensor([17, 3, 5, 11, 8]))
    mixed = Rollouts(
        *(torch.cat([getattr(x, name) for x in (evaluation, some)])
          for name in ("input_ids", "attention_mask", "response_mask")),
        torch.cat([evaluation.prompt_ids, 100 + some.prompt_ids]),
    )  # fmt: skip
    result = probe.predict(update=update, evaluation=mixed)
    assert "5 of 29 evaluation sequences are in the update batch too" in " ".join(texts(result.diagnostics.notes))
    shuffled = update.select(torch.randperm(len(update)))
    result = probe.predict(update=update, evaluation=shuffled)
    assert any(note.code == "same_batch" for note in result.diagnostics.notes)


def test_rollouts_of_another_policy_are_not_held_to_this_ones_chance():
    model, optimizer = policy("lora")
    update, evaluation = sampled(model, 0), rollouts(seed=1)  # of any tokens
    result = EntropyProbe(model, optimizer, ProbeConfig(loss_type="dapo")).predict(
        update=update, evaluation=evaluation.select(torch.arange(24).repeat(2))
    )
    codes = {note.code for note in result.diagnostics.notes}
    assert "copies" not in codes
    assert result.diagnostics.policy_fit.evaluation.status == "off_policy"
