"""The same numbers on any number of ranks: the probe on the enumerable policy in float64, ranks as threads."""

import threading
from dataclasses import replace

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.analyses import attribute as attributed_batch
from entropy_probe.analyses import reduced as predicted
from entropy_probe.analyses import sweep
from entropy_probe.parallel.batch import balanced
from entropy_probe.scoring import slopes
from tests.distributed.ranks import ThreadRanks, differences, on_ranks
from tests.invariants.exact import sampled_elsewhere
from tests.invariants.problems import TABLE, batches, with_reference
from tests.reference.enumeration import TEMPERATURE, TinyPolicy, trained_optimizer

SEVEN = batches(groups=7, size=3, n=40)
RATES = (1e-4, 3e-4, 1e-3)


def grouped(groups: int, size: int, seed: int) -> Rollouts:
    """An evaluation batch of distinct prompts with several responses each."""
    rows = TABLE.sample_groups(TinyPolicy(), groups, size, torch.Generator().manual_seed(seed))
    return TABLE.update_batch(rows, size)


def probe_on(ranks: ThreadRanks | None, optimizer=torch.optim.AdamW, **settings) -> EntropyProbe:
    model = TinyPolicy()
    config = ProbeConfig(**({"temperature": TEMPERATURE, "merge_equal_prompts": False} | settings))
    probe = EntropyProbe(model, trained_optimizer(model, cls=optimizer), config, resample=fresh)
    if ranks is not None:
        probe._shared["ranks"] = ranks
    return probe


def fresh(rollouts: Rollouts) -> Rollouts:
    """Other responses to the same prompts, the same on every rank."""
    per_prompt = TABLE.per_prompt
    rows = rollouts.prompt_ids * per_prompt + torch.arange(len(rollouts)) * 7 % per_prompt
    return TABLE.rollouts.select(rows)


def run(probe: EntropyProbe):
    return probe.run(update=SEVEN[0], evaluation=SEVEN[1])


def ones(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(p) for name, p in model.named_parameters()}


def without_some(probe: EntropyProbe):
    """On two ranks or more, some of which have none of the prompts that are kept."""
    update, evaluation = SEVEN
    ids = update.prompt_ids.unique().tolist()
    return probe.ask("without_prompts", update=update, evaluation=evaluation, prompts=[ids[:1], ids[2:]])


KL = {"loss": {"trainer": "trl", "loss_type": "per_prompt_max", "beta": 0.5, "entropy_coef": 0.2}}
HOT = grouped(60, 2, 8)
HOT_LOGPROBS = torch.full(HOT.input_ids.shape, -0.3, dtype=torch.float64)

FROZEN = {"geometry": "frozen"}
CASES = {
    "default": ({}, run),
    "surprisal, per sequence": ({"entropy": "surprisal", "normalization": "sequence"}, run),
    "snis, surprisal, per token": ({"entropy": "surprisal", "realized": "snis"}, run),
    "psis": ({"realized": "snis", "is_mode": "psis"}, run),
    "passed over twice": ({"max_stored_gradient_gib": 0.0, "loss_type": "grpo"}, run),
    "one sequence at a time": ({"max_tokens_per_microbatch": 1, "max_grad_norm": None}, run),
    "resampled": ({"min_ess_fraction": 1.0, "on_low_ess": "resample", "learning_rate": 0.1}, run),
    "frozen, grouped": (
        {"geometry": "frozen", "loss_type": "per_prompt_max"},
        lambda probe: probe.run(update=SEVEN[0], evaluation=grouped(6, 4, 3)),
    ),
    "jackknife": (
        {"optimizer": torch.optim.RMSprop, "learning_rate": 1e-4},
        lambda probe: probe.predict(update=batches(groups=18, size=2)[0], evaluation=SEVEN[1]),
    ),
    "reweighted": (
        {"on_mismatch": "reweight"},
        lambda probe: probe.run(update=SEVEN[0], evaluation=sampled_elsewhere(TinyPolicy(), 40)[0]),
    ),
    "not the policy's": (
        {},
        lambda probe: probe.predict(
            update=HOT.select(torch.arange(30)), evaluation=replace(HOT, sampled_logprobs=HOT_LOGPROBS)
        ),
    ),
    "measured on the update batch": (
        {"learning_rate": 1e-3},
        lambda probe: probe.measure(update=SEVEN[0], evaluation=SEVEN[0]),
    ),
    "KL term": (KL, lambda probe: probe.run(update=with_reference(SEVEN[0]), evaluation=SEVEN[1])),
    "KL term, one batch": (KL, lambda probe: probe.one_batch(with_reference(SEVEN[0]))),
    "gradient from outside": (
        {"max_grad_norm": 0.5},
        lambda probe: probe.run(gradient=ones(probe._model), update=SEVEN[0], evaluation=SEVEN[1]),
    ),
    "gradient from outside, alone": ({}, lambda probe: probe.run(gradient=ones(probe._model), evaluation=SEVEN[1])),
    "question": ({}, without_some),
    "question, nothing kept": ({"max_stored_gradient_gib": 0.0, "geometry": "frozen"}, without_some),
    "one batch": ({}, lambda probe: probe.one_batch(SEVEN[0])),
    "one batch in blocks, one side kept": (
        FROZEN | {"one_batch_units": "block", "block_size": 2, "max_stored_gradient_gib": 4 * 8 * 79 * 1.5 / 2**30},
        lambda probe: probe.one_batch(batches(groups=8, size=3)[0]),
    ),
    "one batch, frozen": (FROZEN, lambda probe: probe.one_batch(SEVEN[0])),
    "one batch, nothing kept": ({"max_stored_gradient_gib": 0.0}, lambda probe: probe.one_batch(SEVEN[0])),
    "sweep": (
        {},
        lambda probe: probe.sweep(update=SEVEN[0], evaluation=SEVEN[1], learning_rates=RATES, direct_curvature=True),
    ),
}


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_results_do_not_depend_on_the_number_of_ranks(case, size):
    settings, work = CASES[case]
    expected = work(probe_on(None, **settings)).model_dump()
    results, _ = on_ranks(size, lambda ranks: work(probe_on(ranks, **settings)))
    found = [result.model_dump() for result in results]
    assert differences(expected, found[0], 1e-10) == []
    assert all(differences(found[0], other, 0.0) == [] for other in found)


@pytest.fixture(autouse=True)
def forward_mode_by_one_thread_at_a_time(monkeypatch):
    """Torch's forward mode keeps its levels for the whole process."""
    lock = threading.Lock()

    def locked(original):
        def call(*args):
            with lock:
                return original(*args)

        return call

    for module, name in (
        (sweep, "directional_derivatives"),
        (sweep, "why_not_forward_mode"),
        (attributed_batch, "slope_method"),
        (slopes, "slope_method"),
        (slopes.SlopeMethod, "along"),
    ):
        monkeypatch.setattr(module, name, locked(getattr(module, name)))


@pytest.mark.parametrize(("size", "stored"), [(2, 2.0), (4, 0.0)])
def test_attributions_and_their_validation_do_not_either(size, stored):
    def work(ranks: ThreadRanks | None) -> list:
        probe = probe_on(ranks, max_stored_gradient_gib=stored)
        found = probe.attribute(update=SEVEN[0], evaluation=SEVEN[1], folds=3)
        halves = probe.validate(found, evaluation=SEVEN[1], subsets=4)
        tensors = (found.tokens, found.covariances, found.scores.logprobs, found.prompts, found.standard_errors)
        layers = [vars(layer) for layer in found.layers]
        return [*(x.tolist() for x in tensors), layers, found.result.model_dump(), halves.model_dump()]

    expected = work(None)
    results, _ = on_ranks(size, work)
    assert differences(expected, results[0], 1e-10) == []
    assert all(differences(results[0], other, 0.0) == [] for other in results)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_nor_on_padding_or_order(padding):
    """The batches themselves laid out otherwise, prompt groups torn apart."""
    expected = run(probe_on(None)).model_dump(exclude={"contributions"})
    order = [torch.randperm(len(b), generator=torch.Generator().manual_seed(1)) for b in SEVEN]
    columns = [-1, 0, 1, 2, 3] if padding == "left" else [0, 1, 2, 3, -1]

    def padded(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, 1))[:, columns]

    moved = [
        Rollouts(*(padded(x) for x in (b.input_ids, b.attention_mask, b.response_mask)), b.prompt_ids, b.advantages)
        for b in (batch.select(rows) for batch, rows in zip(SEVEN, order, strict=True))
    ]
    results, _ = on_ranks(3, lambda ranks: probe_on(ranks).run(update=moved[0], evaluation=moved[1]))
    assert differences(expected, results[0].model_dump(exclude={"contributions"}), 1e-10) == []


PARAMETERS = sum(p.numel() for p in TinyPolicy().parameters())


@pytest.mark.parametrize(
    ("case", "of_parameters"),
    # the update gradient; for a prediction also the entropy gradient, which the error from the update batch needs; for
    # the profile from one batch what all prompts together do to the step
    [("default", 2), ("measured on the update batch", 1), ("one batch", 3), ("one batch, nothing kept", 2)],
)
def test_collectives(case, of_parameters):
    """What is summed over ranks: whole gradients as often as said, everything else no larger than the batch."""
    settings, work = CASES[case]
    _, exchange = on_ranks(3, lambda ranks: work(probe_on(ranks, **settings)))
    sequences, longest, tensors, ranks = len(SEVEN[1]), SEVEN[1].input_ids.shape[1], 5, 3
    # sums by position, per sequence or unit, which gradients there are, whether a rank failed, and the mean length's
    # change by each part of the step (3) and beyond first order, each with the tokens it is from
    lengths = {3 + 1, 1 + 1}
    counts = {k * n for n in (sequences, 21, 24, 7) for k in (1, 2, 3, 4, 6)}
    small = {3 * longest, *counts, tensors, ranks} | lengths
    assert exchange.reduced.count(PARAMETERS) == of_parameters
    assert set(exchange.reduced) - small == {PARAMETERS}
    assert len(exchange.reduced) < 80  # three for each horizon, and from one batch one more


def test_large_gradients_are_summed_in_buckets(monkeypatch):
    monkeypatch.setattr("entropy_probe.parallel.ranks.BUCKET_ELEMENTS", 30)
    settings, work = CASES["measured on the update batch"]
    expected = work(probe_on(None, **settings)).model_dump()
    results, exchange = on_ranks(2, lambda ranks: work(probe_on(ranks, **settings)))
    assert differences(expected, results[0].model_dump(), 1e-10) == []
    assert PARAMETERS not in exchange.reduced
    assert {20 + 5, 25 + 5, 20 + 4} & set(exchange.reduced)


def test_an_error_in_a_question_on_one_rank_is_that_error_on_all(monkeypatch):
    of_thread = threading.local()
    real = predicted.kept_gradient

    def sometimes(*given):
        if of_thread.rank == 1:
            raise MemoryError("no room for the gradient")
        return real(*given)

    monkeypatch.setattr(predicted, "kept_gradient", sometimes)

    def work(ranks: ThreadRanks) -> str:
        of_thread.rank = ranks.rank
        with pytest.raises(MemoryError) as found:
            without_some(probe_on(ranks))
        return str(found.value)

    assert on_ranks(2, work)[0] == ["no room for the gradient"] * 2


def test_an_error_on_one_rank_is_that_error_on_all():
    def work(ranks: ThreadRanks) -> str:
        probe = probe_on(ranks)
        if ranks.rank == 1:

            def fail(*_):
                raise ValueError("scores: expected finite log-probabilities, got others in 1 sequences")

            probe._model.register_forward_hook(fail)
        with pytest.raises(ValueError, match="expected finite log-probabilities") as found:
            run(probe)
        return str(found.value)

    messages, _ = on_ranks(3, work)
    assert len(set(messages)) == 1


def test_a_sweep_goes_on_after_a_rate_that_fails_on_one_rank():
    """Every rank takes the same point as failed, and all go on to the next."""

    def work(ranks: ThreadRanks):
        model, update, evaluation = TinyPolicy(), *SEVEN
        optimizer = trained_optimizer(model)
        probe = EntropyProbe(model, optimizer, ProbeConfig(temperature=TEMPERATURE, merge_equal_prompts=False))
        probe._shared["ranks"] = ranks
        reference = model.out.bias.detach().clone()

        def overflow(module, args, output):
            if ranks.rank == 2 and (model.out.bias - reference).abs().max() > 0.05:
                output.logits = output.logits * float("nan")
            return output

        model.register_forward_hook(overflow)
        return probe.sweep(update=update, evaluation=evaluation, learning_rates=(1e-3, 1.0, 3e-3))

    sweeps, _ = on_ranks(3, work)
    assert [point.status for point in sweeps[0].points] == ["ok", "ok", "failed"]
    assert [point.failure for point in sweeps[0].points] == [point.failure for point in sweeps[1].points]


def test_ranks_that_disagree_are_found_out():
    def work(ranks: ThreadRanks, what: str) -> str:
        probe, update, evaluation = probe_on(ranks), *SEVEN
        model, optimizer = probe._model, probe._optimizer
        if ranks.rank == 1:
            if what == "policy":
                model.out.bias.data[0] += 1
            elif what == "optimizer":
                optimizer.param_groups[0]["lr"] *= 2
            elif what == "update":
                update = Rollouts(*(getattr(update, f) for f in ROLLOUTS), advantages=-update.advantages)
            else:
                evaluation = evaluation.select(torch.arange(20))
        with pytest.raises(ValueError, match=f"^{what}: expected the same on every rank, got another on rank 1") as e:
            probe.run(update=update, evaluation=evaluation)
        return str(e.value)

    for what in ("policy", "optimizer", "update", "evaluation"):
        on_ranks(2, lambda ranks, what=what: work(ranks, what))


ROLLOUTS = ("input_ids", "attention_mask", "response_mask", "prompt_ids")


def test_without_a_process_group_there_is_nothing_to_share_the_work_with():
    model = TinyPolicy()
    with pytest.raises(ValueError, match="distributed: expected a process group, found none"):
        EntropyProbe(model, trained_optimizer(model), distributed=True)


def test_parts_are_balanced():
    sizes = [5.0, 9.0, 1.0, 7.0, 3.0, 8.0, 2.0]
    for parts in (1, 2, 3, 4, 9):
        part_of = balanced(sizes, parts)
        filled = [sum(s for s, p in zip(sizes, part_of, strict=True) if p == k) for k in range(parts)]
        best = max(max(sizes), sum(sizes) / parts)
        assert sum(filled) == sum(sizes)
        assert max(filled) <= 4 / 3 * best
