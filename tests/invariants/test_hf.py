"""The same properties on small Hugging Face models, in float32, with and without LoRA."""

import inspect

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from entropy_probe import EntropyProbe, ProbeConfig, Rollouts
from entropy_probe.gradients.hooks import hookable
from entropy_probe.gradients.per_sample import Side, sample_gradients
from entropy_probe.scoring.forward import Scorer
from entropy_probe.scoring.packing import bounded_groups, pack, pack_shared, shared_prompts
from entropy_probe.types import TokenCoefficients
from tests.invariants.hf_problems import IDS, KINDS, long_prompts, policy, rollouts
from tests.invariants.problems import numbers
from tests.notes import texts
from tests.tiny import tiny_policy

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize(("kind", "config"), KINDS, ids=IDS)
def test_chunked_head_equals_the_models_own_logits(architecture, kind, config):
    model, _ = policy(kind, architecture, **config)
    batch = rollouts()
    scorer = Scorer(model, 0.7, 64)
    scorer.prepare(batch)
    assert scorer.head_path == "chunked"
    with torch.no_grad():
        got = scorer.score(batch)
        scorer.lay_out(None)
        expected = scorer.score(batch)
    torch.testing.assert_close(got.logprobs, expected.logprobs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got.entropies, expected.entropies, atol=2e-5, rtol=1e-5)
    assert (got.logprobs[~batch.response_mask] == 0).all()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_scores_equal_one_sequence_at_a_time(padding):
    """No padding, no batch: what each sequence means on its own."""
    model, _ = policy("lora")
    batch = rollouts()
    scorer = Scorer(model, 1.0, 64)
    scorer.prepare(batch)
    got = scorer.score(batch)
    for i in range(len(batch)):
        real = batch.attention_mask[i]
        ids = batch.input_ids[i, real][None]
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
        s = log_p.gather(-1, ids[0, 1:, None])[:, 0]
        inside = batch.response_mask[i, real][1:]
        torch.testing.assert_close(got.logprobs[i, batch.response_mask[i]].double(), s[inside], atol=1e-5, rtol=1e-5)
        h = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(got.entropies[i, batch.response_mask[i]].double(), h[inside], atol=1e-5, rtol=1e-5)


def test_a_sequences_scores_do_not_depend_on_what_shares_its_microbatch():
    """In float32, where they differ by 1e-6 without the padding with which sums in the model are taken in one order."""
    model, _ = policy("full")
    batch = rollouts(48, seed=3)
    scorer = Scorer(model, 1.0, 8192)
    scorer.prepare(batch)
    whole = scorer.score(batch)
    for tokens in (32, 50, 100, 200):
        scorer.max_tokens = tokens
        again = scorer.score(batch)
        torch.testing.assert_close(again.logprobs, whole.logprobs, rtol=0, atol=1e-7)
        torch.testing.assert_close(again.entropies, whole.entropies, rtol=0, atol=1e-7)


def test_rows_are_padded_no_further_than_the_model_has_positions():
    batch = rollouts()
    longest = int(batch.attention_mask.sum(1).max())
    assert longest < 16
    for context, expected in ((None, longest), (longest, longest), (longest + 1, longest + 1), (64, 16)):
        packed = pack(batch, torch.arange(len(batch)), torch.device("cpu"), context)
        assert packed.input_ids.shape[1] == expected
        assert packed.attention_mask.sum() == batch.attention_mask.sum()


def test_head_with_a_bias():
    model, _ = policy("full")
    plain = model.lm_head
    model.lm_head = torch.nn.Linear(plain.in_features, plain.out_features)
    batch = rollouts()
    scorer = Scorer(model, 0.7, 64)
    scorer.prepare(batch)
    assert scorer.head_path == "chunked"
    got = scorer.score(batch).entropies
    scorer.lay_out(None)
    torch.testing.assert_close(got, scorer.score(batch).entropies, atol=2e-5, rtol=1e-5)


def test_padding_is_masked_in_every_call(monkeypatch):
    model, _ = policy("full")
    seen = []
    trunk = type(model.model)
    original = trunk.forward

    def watch(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        seen.append((input_ids, attention_mask))
        return original(self, input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(trunk, "forward", watch)
    batch = rollouts()
    scorer = Scorer(model, 1.0, 8192)
    scorer.prepare(batch)
    scorer.score(batch)
    ids, mask = seen[-1]
    assert sorted(mask.sum(1).tolist()) == sorted(batch.attention_mask.sum(1).tolist())
    assert not mask.bool().all()
    assert (ids[~mask.bool()] == 0).all()


def test_non_finite_scores_are_refused():
    model, optimizer = policy("full")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="expected finite log-probabilities, got non-finite ones in 40 sequences"):
        EntropyProbe(model, optimizer).run(update=rollouts(), evaluation=rollouts(40, seed=2, group=1))


def test_virtual_tokens_are_refused():
    """Prompt tuning puts tokens in front: logits would be read off by their number."""
    model, _ = tiny_policy()
    tuned = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(ValueError, match="adapters that add virtual tokens are not supported"):
        EntropyProbe(tuned, optimizer).run(update=rollouts(), evaluation=rollouts(40, seed=2, group=1))


def test_models_that_change_logits_use_their_own(monkeypatch):
    """A soft cap after the head leaves tiny logits nearly unchanged; it must be noticed all the same."""
    model, _ = policy("full", initializer_range=0.001)
    inner = type(model)
    original = inner.forward

    def capped(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out

    monkeypatch.setattr(inner, "forward", capped)
    scorer = Scorer(model, 1.0, 64)
    scorer.prepare(rollouts())
    assert scorer.head_path.startswith("logits (the model changes logits")


@pytest.mark.parametrize(("kind", "config"), KINDS, ids=IDS)
def test_prediction_agrees_with_measurement_as_the_step_shrinks(kind, config):
    model, optimizer = policy(kind, **config)
    update, evaluation = rollouts(), rollouts(40, seed=2, group=1)
    gaps = []
    for lr in (1e-3, 1e-4):
        result = EntropyProbe(model, optimizer, ProbeConfig(learning_rate=lr)).run(update=update, evaluation=evaluation)
        gaps.append(abs(result.difference.value) / abs(result.predicted.value))
        assert result.realized.status == "ok"
    assert gaps[0] < 0.7
    assert gaps[1] < 0.4 * gaps[0]


def to_float64(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The same policy and moments; float32 scores leave 1e-7 of noise in the change after a small step."""
    model.double()
    for state in optimizer.state.values():
        state |= {name: x.double() for name, x in state.items() if name != "step"}


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
@pytest.mark.parametrize(("kind", "config"), KINDS, ids=IDS)
def test_hooks_equal_one_backward_per_cluster(kind, config, dtype, monkeypatch):
    model, optimizer = policy(kind, **config)
    update, evaluation = rollouts(), rollouts(40, seed=2, group=1)
    if dtype == "float64":
        to_float64(model, optimizer)
    fast = EntropyProbe(model, optimizer).run(update=update, evaluation=evaluation)
    assert fast.diagnostics.per_sample_gradients == ("linear-layer hooks" if kind == "lora" else "hooks")
    monkeypatch.setattr("entropy_probe.analyses.policy.hookable", lambda *a: "switched off by a test")
    generic = numbers(EntropyProbe(model, optimizer).run(update=update, evaluation=evaluation))
    for key, value in numbers(fast).items():
        if dtype == "float64":
            assert generic[key] == pytest.approx(value, rel=1e-10, abs=1e-14), key
        elif "realized" not in key and "difference" not in key:
            assert generic[key] == pytest.approx(value, rel=1e-4, abs=1e-9), key


def test_a_weight_that_acts_outside_its_layer_is_noticed():
    model, optimizer = policy("lora")
    layer = next(m for n, m in model.named_modules() if n.endswith("q_proj.lora_A.default"))
    model.get_base_model().model.norm.register_forward_hook(lambda module, args, out: out + layer.weight[0])
    result = EntropyProbe(model, optimizer).predict(update=rollouts(), evaluation=rollouts(40, seed=2, group=1))
    assert "q_proj.lora_A.default.weight also acts outside its layer" in result.diagnostics.per_sample_gradients


@pytest.mark.parametrize(
    ("kind", "config"), [KINDS[0], pytest.param(*KINDS[1], marks=pytest.mark.slow), KINDS[2]], ids=IDS
)
def test_invariant_to_microbatches_padding_and_order(kind, config):
    model, optimizer = policy(kind, **config)
    update, evaluation = rollouts(), rollouts(40, seed=2, group=1)
    tight = Rollouts(*(getattr(evaluation, n)[:, evaluation.attention_mask.any(0)] for n in
                       ("input_ids", "attention_mask", "response_mask")), evaluation.prompt_ids)  # fmt: skip
    g = torch.Generator().manual_seed(3)
    expected = numbers(EntropyProbe(model, optimizer).run(update=update, evaluation=evaluation))
    others = [
        EntropyProbe(model, optimizer, ProbeConfig(max_tokens_per_microbatch=20)).run(update=update, evaluation=tight),
        EntropyProbe(model, optimizer).run(
            update=update.select(torch.randperm(len(update), generator=g)),
            evaluation=evaluation.select(torch.randperm(len(evaluation), generator=g)),
        ),
    ]
    for other in others:
        for key, value in numbers(other).items():
            # the paired difference is second order in a small step, where float32 leaves fewer digits
            rel = 5e-2 if "difference" in key else 1e-3
            assert value == pytest.approx(expected[key], rel=rel, abs=2e-7), key


def test_twice_in_a_row_is_identical_and_leaves_the_model_alone():
    model, optimizer = policy("lora")
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    update, evaluation = rollouts(), rollouts(40, seed=2, group=1)
    probe = EntropyProbe(model, optimizer)
    assert numbers(probe.run(update=update, evaluation=evaluation)) == numbers(
        probe.run(update=update, evaluation=evaluation)
    )
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_too_long_and_unknown_tokens_are_refused():
    model, optimizer = policy("full", max_position_embeddings=12)
    with pytest.raises(ValueError, match=r"expected at most 12 tokens per sequence \(the model's context\), got 1\d"):
        EntropyProbe(model, optimizer).run(update=rollouts(), evaluation=rollouts())
    model, optimizer = policy("full")
    batch = rollouts()
    batch.input_ids[0, 6] = 9999
    with pytest.raises(ValueError, match=r"expected token ids below \d+ \(the model's vocabulary\), got 9999"):
        EntropyProbe(model, optimizer).run(update=batch, evaluation=rollouts())


def test_low_precision_is_refused_unless_asked_for():
    model, optimizer = policy("full")
    model.bfloat16()
    with pytest.raises(ValueError, match=r"expected parameters of at least float32, got torch.bfloat16"):
        EntropyProbe(model, optimizer)


def test_a_model_on_several_devices_is_refused():
    model, optimizer = policy("lora")
    model.get_output_embeddings().to("meta")
    with pytest.raises(ValueError, match=r"expected all parameters on one device and with values, got .* cpu, meta"):
        EntropyProbe(model, optimizer)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_bfloat16_runs_when_asked_for(kind):
    model, _ = policy(kind)
    model.bfloat16()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for p in trained:
        p.grad = 1e-2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    optimizer.step()
    optimizer.zero_grad()
    config = ProbeConfig(dtype="bfloat16")
    result = EntropyProbe(model, optimizer, config).run(update=rollouts(), evaluation=rollouts(40, seed=2, group=1))
    assert result.diagnostics.per_sample_gradients == ("linear-layer hooks" if kind == "lora" else "hooks")
    assert any("quantised" in m for m in texts(result.diagnostics.notes))
    own = EntropyProbe(model, optimizer, config).one_batch(rollouts())
    assert own.horizons is None
    assert any("no profile over horizons" in m for m in texts(own.diagnostics.notes))
    full, _ = policy(kind)
    full.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    exact = torch.optim.AdamW([p for p in full.parameters() if p.requires_grad], lr=1e-3)
    exact.load_state_dict(optimizer.state_dict())
    reference = EntropyProbe(full, exact).predict(update=rollouts(), evaluation=rollouts(40, seed=2, group=1))
    assert result.predicted.value == pytest.approx(reference.predicted.value, rel=0.35)


def test_overflowing_gradients_are_refused():
    model, optimizer = policy("full")
    batch = rollouts()
    huge = Rollouts(batch.input_ids, batch.attention_mask, batch.response_mask, batch.prompt_ids,
                    advantages=batch.advantages * 1e22)  # fmt: skip
    with pytest.raises(ValueError, match="expected squares within range, got an overflow in"):
        EntropyProbe(model, optimizer, ProbeConfig(max_grad_norm=None)).run(update=huge, evaluation=rollouts())


def test_negative_tokens_are_refused():
    model, optimizer = policy("full")
    batch = rollouts()
    batch.input_ids[0, 6] = -100
    with pytest.raises(ValueError, match="expected token ids of at least 0, got -100"):
        EntropyProbe(model, optimizer).run(update=batch, evaluation=rollouts())


def test_microbatches_cover_every_row_once_within_the_bound():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 50, (200,), generator=g).tolist()
    groups = bounded_groups(lengths, 120)
    assert sorted(i for group in groups for i in group) == list(range(200))
    assert all(len(group) * max(lengths[i] for i in group) <= 120 for group in groups)
    assert len(bounded_groups(lengths, 1)) == 200


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shared_prompts_give_the_same_scores_and_gradients(architecture, gaps, dtype):
    model, _ = policy("lora", architecture)
    model.to(dtype)
    batch = long_prompts(gaps=gaps)
    scorer = Scorer(model, 0.9, 400)
    scorer.prepare(batch)
    assert scorer.prefix_sharing == "on"
    shared = list(scorer.microbatches(batch))
    assert any(b.position_ids is not None for b in shared)
    assert sum(b.input_ids.numel() for b in shared) < 0.6 * int(batch.attention_mask.sum())
    g = torch.Generator().manual_seed(6)
    a, c = (torch.randn(batch.input_ids.shape, generator=g, dtype=torch.float64) for _ in range(2))
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = []
    for width in (scorer.layout.width, None):
        scorer.lay_out(scorer.layout.split, width=width)
        scores = scorer.score(batch)
        for hooks in (hookable(scorer, parameters, batch), None):
            side = Side(TokenCoefficients(a, c), store=True)
            gradients = sample_gradients(scorer, parameters, batch, batch.prompt_ids, [side], hooks=hooks)[0].stored
            found.append((scores.logprobs, scores.entropies, gradients))
    # rotary embeddings and norms compute in float32 in any model
    tolerance = {"rtol": 1e-4, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 1e-5, "atol": 1e-5}
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            torch.testing.assert_close(x, y, **tolerance)


def test_shared_rows_keep_units_and_prompts_apart():
    """Sequences that are units of their own, or whose prompts differ, never share a row."""
    model, optimizer = policy("lora")
    batch = long_prompts()
    together = EntropyProbe(model, optimizer, ProbeConfig(evaluation_unit="sequence")).run(
        update=batch, evaluation=batch
    )
    alone = Rollouts(batch.input_ids, batch.attention_mask, batch.response_mask, torch.arange(len(batch)))
    apart = EntropyProbe(model, optimizer, ProbeConfig(evaluation_unit="sequence", merge_equal_prompts=False)).run(
        update=batch, evaluation=alone
    )
    for key, value in numbers(together).items():
        assert numbers(apart)[key] == pytest.approx(value, rel=1e-3, abs=2e-7), key
    same_id = Rollouts(batch.input_ids, batch.attention_mask, batch.response_mask, batch.prompt_ids * 0)
    groups = shared_prompts(same_id, torch.arange(len(batch)), 64, 8192)
    assert all(len({tuple(batch.input_ids[i, :40][batch.attention_mask[i, :40]].tolist()) for i in group}) == 1
               for group in groups)  # fmt: skip


def test_sharing_is_off_where_it_does_not_pay_or_does_not_hold(monkeypatch):
    assert shared_prompts(rollouts(group=1), torch.arange(24), 64, 8192) is None
    model, _ = policy("full")
    scorer = Scorer(model, 1.0, 400)
    scorer.prepare(rollouts(group=1))
    assert scorer.prefix_sharing == "off (no prompt has two responses of 3 tokens)"
    model.config.sliding_window = 16
    scorer.prepare(long_prompts())
    assert scorer.prefix_sharing == "off (the model does not attend to the whole context)"
    model.config.sliding_window = None
    trunk = type(model.model)
    original = trunk.forward

    def deaf(self, *args, attention_mask=None, **kwargs):
        return original(self, *args, attention_mask=None if attention_mask.dim() == 4 else attention_mask, **kwargs)

    deaf.__signature__ = inspect.signature(original)
    monkeypatch.setattr(trunk, "forward", deaf)
    scorer.prepare(long_prompts())
    assert scorer.prefix_sharing.startswith("off (the model treats a shared prompt differently: scores of a sequence")


def test_packed_targets_are_the_response_tokens():
    batch = long_prompts(gaps=True)
    device, rows = torch.device("cpu"), torch.arange(len(batch))
    groups = shared_prompts(batch, rows, 64, 8192)
    for packed in (pack(batch, rows, device), pack_shared(batch, groups, device, torch.float32)):
        assert torch.equal(packed.targets, packed.gather(batch.input_ids))
        assert sorted(packed.rows.tolist()) == rows.tolist()
        out = torch.zeros(batch.input_ids.shape, dtype=torch.long)
        packed.scatter(packed.targets, out)
        assert torch.equal(out, torch.where(batch.response_mask, batch.input_ids, 0))
