"""The realized change of the whole probe: what happens at large steps, small steps, and with the same batch."""

import pytest
import torch

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts, TokenScores
from entropy_probe.analyses.noise import _moved
from entropy_probe.estimators.uncertainty import ratio
from entropy_probe.scoring.cache import ScoreCache, fingerprint, mixed_sums
from entropy_probe.scoring.forward import Scorer
from tests.invariants.problems import TABLE, batches, float32_problem, numbers, probe
from tests.notes import texts
from tests.reference.enumeration import TEMPERATURE, TinyPolicy, trained_optimizer

LARGE = 0.5


def sampler(model: TinyPolicy, generator: torch.Generator):
    """Fresh draws of the enumerable policy as it is, to the prompts of given rollouts."""

    def resample(rollouts: Rollouts) -> Rollouts:
        by_prompt = TABLE.probabilities(model).detach().view(-1, TABLE.per_prompt)[rollouts.prompt_ids]
        rows = torch.multinomial(by_prompt, 1, generator=generator)[:, 0] + rollouts.prompt_ids * TABLE.per_prompt
        return TABLE.rollouts.select(rows)

    return resample


def test_a_step_too_large_is_refused():
    model = TinyPolicy()
    update, evaluation = batches()
    result = probe(model, trained_optimizer(model), learning_rate=LARGE).run(update=update, evaluation=evaluation)
    assert result.realized.status == "low_ess"
    assert (
        result.realized.value is result.realized.standard_error is result.realized.estimate is result.difference is None
    )
    assert result.predicted.value
    assert any(
        "effective sample size" in m and "no realized change is given" in m for m in texts(result.diagnostics.notes)
    )


def test_fresh_responses_measure_a_step_of_any_size():
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    generator = torch.Generator().manual_seed(8)
    update, _ = batches()
    config = ProbeConfig(temperature=TEMPERATURE, learning_rate=LARGE, on_low_ess="resample")
    subject = EntropyProbe(model, optimizer, config, resample=sampler(model, generator))
    old = TABLE.entropy(model, "token").item()
    values, errors, exact = [], [], None
    for _ in range(150):
        evaluation = TABLE.rollouts.select(TABLE.sample(model, 200, generator))
        result = subject.measure(update=update, evaluation=evaluation)
        if exact is None:
            story = subject.measure(update=update, evaluation=evaluation)
            assert story.realized.estimator == "resampled"
            exact = stepped_entropy(model, optimizer, update) - old
        values.append(result.realized.value)
        errors.append(result.realized.standard_error)
    values, errors = torch.tensor(values), torch.tensor(errors)
    assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5
    assert 0.89 <= ((values - exact).abs() <= 1.96 * errors).double().mean() <= 0.99
    assert result.realized.status == "ok"
    assert any("sampled anew" in m for m in texts(result.diagnostics.notes))


def test_fresh_responses_are_measured_by_the_surprisal_that_was_asked_for():
    model, mean = TinyPolicy(), []
    update, evaluation = batches()

    def surprisal(rollouts: Rollouts) -> float:
        scorer = Scorer(model, TEMPERATURE, 8192)
        scorer.prepare(rollouts)
        return -(scorer.score(rollouts).logprobs.double().sum() / rollouts.response_mask.sum()).item()

    def resample(rollouts: Rollouts) -> Rollouts:
        fresh = sampler(model, torch.Generator().manual_seed(3))(rollouts)
        mean.append(surprisal(fresh))
        return fresh

    config = ProbeConfig(temperature=TEMPERATURE, learning_rate=LARGE, on_low_ess="resample", entropy="surprisal")
    subject = EntropyProbe(model, trained_optimizer(model), config, resample=resample)
    realized = subject.measure(update=update, evaluation=evaluation).realized
    assert realized.estimator == "resampled"
    assert realized.value == pytest.approx(mean[0] - surprisal(evaluation), rel=1e-9)


def test_the_error_of_the_difference_from_fresh_responses_has_both_errors_of_h():
    """The change has that of the old and of the fresh responses, however far apart their lengths are."""
    model, fresh = TinyPolicy(), []
    update, evaluation = batches()

    def of_entropy(rollouts: Rollouts) -> torch.Tensor:
        scorer = Scorer(model, TEMPERATURE, 8192)
        scorer.prepare(rollouts)
        return ratio(scorer.score(rollouts).entropies.double().sum(1), rollouts.response_lengths.double()).influence

    def resample(rollouts: Rollouts) -> Rollouts:
        found = sampler(model, torch.Generator().manual_seed(3))(rollouts)
        fresh.append((of_entropy(found), found.response_lengths.sum()))
        return found

    config = ProbeConfig(temperature=TEMPERATURE, learning_rate=LARGE, on_low_ess="resample",
                         evaluation_unit="sequence")  # fmt: skip
    subject = EntropyProbe(model, trained_optimizer(model), config, resample=resample)
    result = subject.run(update=update, evaluation=evaluation)
    assert abs(fresh[0][1] / evaluation.response_lengths.sum() - 1) > 0.05
    predicted = torch.tensor(result.contributions, dtype=torch.float64) - result.predicted.value
    by_hand = fresh[0][0] - of_entropy(evaluation) - predicted
    assert result.difference.standard_error == pytest.approx(by_hand.std().item() / 60**0.5, rel=1e-9)


def stepped_entropy(model: TinyPolicy, optimizer: torch.optim.Optimizer, update: Rollouts) -> float:
    """The exact entropy after the step that a training loop would take."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    r = update
    log_p = torch.log_softmax(model(r.input_ids, r.attention_mask.long()).logits / TEMPERATURE, -1)
    s = log_p[:, :-1].gather(-1, r.input_ids[:, 1:, None])[..., 0] * r.response_mask[:, 1:]
    (-(s * r.token_advantages[:, 1:]).sum() / r.response_mask.sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = LARGE
    optimizer.step()
    try:
        return TABLE.entropy(model, "token").item()
    finally:
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.zero_grad()
        for n, p in model.named_parameters():
            p.data.copy_(before[n])
        for p, entries in state.items():
            optimizer.state[p].update(entries)


def test_fresh_responses_must_answer_the_same_prompts():
    model = TinyPolicy()
    update, evaluation = batches()
    config = ProbeConfig(temperature=TEMPERATURE, learning_rate=LARGE, on_low_ess="resample")
    wrong = EntropyProbe(model, trained_optimizer(model), config, resample=lambda r: r.select(torch.arange(5)))
    with pytest.raises(ValueError, match="expected a response to each of the 60 evaluation prompts"):
        wrong.measure(update=update, evaluation=evaluation)
    with pytest.raises(ValueError, match="resample: expected a function"):
        EntropyProbe(model, trained_optimizer(model), config)


def test_the_same_sequences_as_both_batches_are_said_to_share_their_noise():
    model = TinyPolicy()
    update, evaluation = batches()
    subject = probe(model, trained_optimizer(model))
    result = subject.measure(update=update, evaluation=update)
    assert result.realized.batch == "update"
    assert result.diagnostics.evaluation_unit == "prompt"
    assert any("biased by what they share" in m for m in texts(result.diagnostics.notes))
    assert subject.measure(update=update, evaluation=evaluation).realized.batch == "evaluation"


def test_the_noise_floor_tells_a_real_change_from_rounding():
    model, optimizer, update, evaluation = float32_problem()

    def realized(**settings):
        return EntropyProbe(model, optimizer, ProbeConfig(**settings)).measure(update=update, evaluation=evaluation)

    real = realized().realized
    assert real.status == "ok"
    assert 0 < real.noise_floor < 1e-2 * abs(real.value)
    lost = realized(learning_rate=1e-11)
    assert lost.realized.status == lost.realized.estimate.status == "below_noise_floor"
    assert any("rounding to the parameters' precision" in m for m in texts(lost.diagnostics.notes))
    coarse = realized(autocast="bfloat16")
    assert coarse.realized.noise_floor > 30 * real.noise_floor
    assert any("autocast in bfloat16" in m for m in texts(coarse.diagnostics.notes))
    # the cache of converted weights must not hide the step
    assert coarse.realized.value != 0
    assert realized(measure_noise_floor=False).realized.noise_floor is None


@pytest.mark.parametrize("normalization", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
def test_errors_against_float64_are_what_the_noise_floor_says(normalization):
    model, optimizer, update, _ = float32_problem()
    precise, its_optimizer, *_ = float32_problem()
    precise.double()
    for state in its_optimizer.state.values():
        state |= {name: x.double() for name, x in state.items() if name != "step"}
    ratios = []
    for seed in range(12):
        # parameters after another step are rounded differently
        config = ProbeConfig(normalization=normalization, learning_rate=3e-5 * 1.1**seed)
        ids = torch.randint(2, 30, (40, 14), generator=torch.Generator().manual_seed(seed))
        evaluation = Rollouts(ids, torch.ones_like(ids), (torch.arange(14) >= 4).expand(40, -1), torch.arange(40))
        a, b = (
            EntropyProbe(m, o, config).measure(update=update, evaluation=evaluation).realized
            for m, o in ((model, optimizer), (precise, its_optimizer))
        )
        assert a.value != b.value
        assert b.noise_floor < 0.3 * a.noise_floor  # of norms, which stay in float32
        ratios.append((a.value - b.value) / (a.noise_floor / 2))
    assert 0.4 < torch.tensor(ratios).square().mean().sqrt() < 2.5


def test_reference_scores_are_computed_once_per_policy_and_batch(monkeypatch):
    model = TinyPolicy()
    optimizer = trained_optimizer(model)
    update, evaluation = batches()
    scored = []
    original = Scorer.score

    def counted(self, rollouts, progress=None, *, share=True):
        scored.extend([len(rollouts)] * share)  # the noise floor's are not shared
        return original(self, rollouts, progress, share=share)

    monkeypatch.setattr(Scorer, "score", counted)
    subject = probe(model, optimizer)
    first = subject.run(update=update, evaluation=evaluation)
    assert len(scored) == 3  # before and after the step, and after the opposite one
    copy = Rollouts(
        *(getattr(evaluation, n).clone() for n in ("input_ids", "attention_mask", "response_mask", "prompt_ids"))
    )
    assert numbers(subject.run(update=update, evaluation=copy)) == numbers(first)
    assert len(scored) == 5
    subject.predict(update=update, evaluation=copy)
    assert len(scored) == 5
    with torch.no_grad():
        model.out.bias[0] += 1e-9
    changed = subject.predict(update=update, evaluation=evaluation)
    assert len(scored) == 6
    assert changed.entropy.value != first.entropy.value
    subject.predict(update=update, evaluation=evaluation.select(torch.arange(50)))
    assert len(scored) == 7


def test_a_policy_that_changed_outside_of_its_parameters_is_not_mistaken():
    """As where another adapter becomes active: the same parameters and buffers, other scores."""

    class Switched(TinyPolicy):
        sharp = False

        def forward(self, input_ids, attention_mask):
            output = super().forward(input_ids, attention_mask)
            output.logits = output.logits * (1.5 if self.sharp else 1.0)
            return output

    model = Switched()
    update, evaluation = batches()
    subject = probe(model, trained_optimizer(model))
    before = subject.predict(update=update, evaluation=evaluation)
    model.sharp = True
    fresh = probe(model, trained_optimizer(model)).predict(update=update, evaluation=evaluation)
    again = subject.predict(update=update, evaluation=evaluation)
    assert again.entropy == fresh.entropy != before.entropy
    assert again.predicted == fresh.predicted


def test_moves_are_drawn_anew_for_every_parameter_and_have_an_opposite():
    """Parameters of one shape must not move in step: their effects would add up instead of averaging out."""
    wide = {name: torch.nn.Parameter(torch.randn(4000)) for name in "ab"}
    moves, opposite = (
        {name: x.double() / wide[name].detach().double() - 1 for name, x in _moved(wide, "off", 0, sign).items()}
        for sign in (1, -1)
    )
    for name, move in moves.items():
        assert move.abs().max() == pytest.approx(2**-4 * 2**-11.5, rel=0.01)
        assert abs(move.mean()) < 0.1 * move.abs().max()
        # opposite but for two roundings, each twice that of a nearest one
        error = (move + opposite[name]) * wide[name].detach().double() / last_place_of(wide[name])
        assert error.square().mean() == pytest.approx(4 / 12, rel=0.2)
        assert abs(error.mean()) < 0.05
    assert abs((moves["a"] * moves["b"]).sum()) < 0.1 * moves["a"].square().sum()
    assert all(torch.equal(_moved(wide, "off", 0, 1)[name], x) for name, x in _moved(wide, "off", 0, 1).items())
    coarse = wide["a"].detach().bfloat16()
    assert (_moved({"a": torch.nn.Parameter(coarse)}, "off", 0, 1)["a"] != coarse).double().mean() > 0.4


def last_place_of(x: torch.Tensor) -> torch.Tensor:
    """A unit in the last place of float32 numbers."""
    size = x.detach().abs()
    return (torch.nextafter(size, torch.tensor(9.0)) - size).double()


def test_the_cache_forgets_the_oldest():
    cache, computed = ScoreCache(size=2), []
    scores = TABLE.token_scores(TinyPolicy())

    def compute(key: str) -> TokenScores:
        computed.append(key)
        return scores

    for key in ("a", "b", "a", "c", "b", "a"):
        assert cache.get(key, lambda key=key: compute(key)) is scores
    assert computed == ["a", "b", "c", "a"]


@pytest.mark.checked
def test_fingerprints_see_every_bit_name_and_place():
    x = torch.randn(1000)
    same = [("x", x.clone())]
    swapped = x.clone()
    swapped[[3, 4]] = x[[4, 3]]
    nudged = x.clone()
    nudged[-1] = torch.nextafter(x[-1], torch.tensor(9.0))
    others = [
        [("y", x)],
        [("x", swapped)],
        [("x", nudged)],
        [("x", x.view(10, 100))],
        [("x", x.double())],
        [("x", x[:-1])],
    ]
    assert fingerprint([("x", x)]) == fingerprint(same)
    found = {fingerprint(other) for other in others} | {fingerprint(same)}
    assert len(found) == len(others) + 1
    # the form used on accelerators
    sums = [mixed_sums(t) for t in (x, swapped, nudged, x[:-1], x.bfloat16(), torch.zeros(1000))]
    assert len({tuple(s.tolist()) for s in sums}) == len(sums)
    assert torch.equal(mixed_sums(x), mixed_sums(x.clone()))
    assert torch.equal(fingerprint_of_strided(), mixed_sums(torch.arange(0, 20, 2)))
    assert fingerprint([("b", torch.tensor([True, False]))]) != fingerprint([("b", torch.tensor([False, True]))])


def fingerprint_of_strided() -> torch.Tensor:
    return mixed_sums(torch.arange(20)[::2].contiguous())
