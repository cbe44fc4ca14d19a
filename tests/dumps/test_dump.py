"""What trainers leave of their rollouts, read into the batch that they trained on."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from entropy_probe.analyses.admission import admit
from entropy_probe.demo.policy import build_tokenizer
from entropy_probe.dumps import Dump, read_dump
from entropy_probe.rollouts.batch import Rollouts
from tests.dumps.written import (
    ADVANTAGES,
    ASKED,
    OF_TEXT,
    OLD,
    PROMPTS,
    RESPONSES,
    REWARDS,
    SAMPLED,
    STEP,
    TEXTS,
    WITH_IDS,
    jsonl,
    nemo_rl,
    open_instruct,
    pickled_batch,
    prime_rl,
    skyrl,
    slime,
    trl,
    verifiers,
    verl,
)

VERL = {"input": "a", "output": "b", "score": 1, "step": 1}
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>assistant: {% endif %}"
)


def chatty(template: str | None = CHAT):
    """A tokenizer with a chat template, whose marks are special tokens and whose roles stay when these are left out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<unk>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(characters)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    whole.add_special_tokens(
        {"eos_token": "<eos>", "additional_special_tokens": ["<|user|>", "<|system|>", "<|assistant|>"]}
    )
    whole.chat_template = template
    return whole


def responses_of(batch: Rollouts) -> list[list[int]]:
    starts = [len(prompt) for prompt in prompts_of(batch)]
    return [
        ids[there][n:].tolist() for ids, there, n in zip(batch.input_ids, batch.attention_mask, starts, strict=True)
    ]


def prompts_of(batch: Rollouts) -> list[list[int]]:
    first = (batch.response_mask.cumsum(1) > 0) | ~batch.attention_mask
    return [ids[~before].tolist() for ids, before in zip(batch.input_ids, first, strict=True)]


@pytest.mark.parametrize("trainer", WITH_IDS)
def test_token_ids_masks_and_log_probabilities_are_the_trainers(trainer, tmp_path):
    dump = read_dump(WITH_IDS[trainer](tmp_path))
    assert isinstance(dump, Dump)
    assert (dump.layout.name, dump.step, dump.needs_tokenizer) == (trainer, STEP, False)
    converted = dump.convert()
    batch = converted.rollouts
    assert prompts_of(batch) == list(PROMPTS)
    assert responses_of(batch) == list(RESPONSES)
    assert batch.prompt_ids.tolist() == [0, 0, 1, 1]
    assert batch.response_lengths.tolist() == list(map(len, RESPONSES))
    assert not batch.retokenised
    torch.testing.assert_close(batch.advantages, torch.tensor(ADVANTAGES), rtol=1e-5, atol=1e-5)
    expected = torch.tensor([x for own in SAMPLED for x in own])
    torch.testing.assert_close(batch.sampled_logprobs[batch.response_mask], expected)
    if trainer in ("NeMo-RL", "SkyRL"):
        expected = torch.tensor([x for own in OLD for x in own])
        torch.testing.assert_close(batch.old_logprobs[batch.response_mask], expected)
    else:
        assert batch.old_logprobs is None
    if trainer in ("open-instruct", "NeMo-RL"):
        assert converted.advantages == "the dump's, which are (r - mean) / std of each prompt's"
    if trainer == "slime":
        assert converted.advantages == "recomputed, (r - mean) / std of each prompt's + 1e-06"
    if trainer == "prime-rl":
        assert batch.microbatch_ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("trainer", OF_TEXT)
def test_texts_are_tokenized_again_and_given_their_end_tokens_back(trainer, tmp_path):
    tokenizer = build_tokenizer()
    dump = read_dump(OF_TEXT[trainer](tmp_path), after=STEP - 1)
    assert isinstance(dump, Dump)
    assert (dump.layout.name, dump.is_text) == (trainer, True)
    assert dump.step == (None if trainer == "verifiers" else STEP)
    converted = dump.convert(tokenizer, longest=8)
    ends = [[tokenizer.eos_token_id]] * 3 + [[]]
    expected = [tokenizer(text)["input_ids"] + end for text, end in zip(TEXTS, ends, strict=True)]
    assert responses_of(converted.rollouts) == expected
    assert prompts_of(converted.rollouts) == [tokenizer(text)["input_ids"] for text in ASKED]
    assert converted.rollouts.retokenised
    assert converted.notes[0].numbers == {"restored": 3, "sequences": 4, "failing": 0}
    scale = torch.tensor([x / 0.5**0.5 if trainer != "verifiers" else x for x in (0.5, -0.5)])
    torch.testing.assert_close(converted.rollouts.advantages[:2], scale, rtol=1e-5, atol=1e-5)


def test_ids_that_trl_was_made_to_log_are_exact(tmp_path):
    """Then only prompts are tokenized, and the tokens are those that were sampled."""
    path = trl(tmp_path, completion_ids=[np.array(r) for r in RESPONSES])
    dump = read_dump(path)
    assert isinstance(dump, Dump)
    batch = dump.convert(build_tokenizer(), longest=4, mask_truncated=True).rollouts
    assert not batch.retokenised
    assert [ids for ids, n in zip(responses_of(batch), batch.response_lengths, strict=True) if n] == list(RESPONSES)
    cut = dump.convert(build_tokenizer(), longest=2, mask_truncated=True).rollouts  # the last has no end token
    assert cut.response_lengths.tolist() == [3, 2, 4, 0]


def test_a_chat_is_rebuilt_from_what_is_left_of_it(tmp_path):
    """verl and older TRL leave out the special tokens of the template; what is rebuilt has to give the text back."""
    tokenizer = chatty()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text == "system: Be brief.user: 1+1?assistant: "
    records = [
        {"input": text, "output": answer, "score": score, "step": 1} for answer, score in (("2", 1.0), ("3", 0.0))
    ]
    batch = read_dump(jsonl(tmp_path / "1.jsonl", records)).convert(tokenizer, longest=9).rollouts
    assert prompts_of(batch) == [ids, ids]
    as_messages = [{**record, "input": messages} for record in records]
    batch = read_dump(jsonl(tmp_path / "1.jsonl", as_messages)).convert(tokenizer, longest=9).rollouts
    assert prompts_of(batch) == [ids, ids]
    path = jsonl(tmp_path / "1.jsonl", [{**record, "input": "assistant: b user: c"} for record in records])
    with pytest.raises(ValueError, match="prompt: expected one that can be tokenized again without doubt, got 0 conv"):
        read_dump(path).convert(tokenizer, longest=9)


def test_rendered_prompts_keep_their_special_tokens(tmp_path):
    tokenizer = chatty()
    text = "<|user|>user: 1+1?<eos><|assistant|>assistant: "
    table = {"prompt": [text] * 2, "completion": ["2", "3"], "advantages": [1.0, -1.0], "step": ["4", "4"]}
    batch = read_dump(jsonl(tmp_path / "completions.jsonl", [table])).convert(tokenizer, longest=9).rollouts
    assert tokenizer.decode(prompts_of(batch)[0]) == text


def test_responses_that_do_not_give_their_text_back_are_refused(tmp_path):
    records = [{"input": "1+1=", "output": x, "score": 1.0, "step": 1} for x in ("2", "é3", "4", "5")]
    dump = read_dump(jsonl(tmp_path / "1.jsonl", records))
    with pytest.raises(ValueError, match=r"1.jsonl:2: expected responses that give their text back .* got 1 of 4"):
        dump.convert(chatty(None), longest=9)
    with pytest.raises(ValueError, match="expected the trainer's limit on response tokens"):
        dump.convert(chatty(None))
    with pytest.raises(ValueError, match="expected a tokenizer, since the dump has texts"):
        dump.convert()


def test_texts_are_an_update_batch_with_a_note_and_no_evaluation_batch(tmp_path):
    batch = read_dump(verl(tmp_path)).convert(build_tokenizer(), longest=8).rollouts
    batch.to_parquet(tmp_path / "kept.parquet")
    kept = read_dump(tmp_path / "kept.parquet")
    assert isinstance(kept, Rollouts)
    assert kept.retokenised
    assert kept.select(torch.tensor([0, 1])).retokenised
    assert [note.code for note in admit(kept, "update", True, [1], 8).notes] == ["retokenised"]
    for role in ("evaluation", "batch"):
        with pytest.raises(ValueError, match="expected the tokens that the policy sampled, since entropy is taken on"):
            admit(kept, role, True, [1], 8)


@pytest.mark.parametrize(
    ("after", "code"), [(STEP - 1, None), (STEP, "other_step"), (STEP - 2, "other_step"), (None, "step_not_known")]
)
def test_the_next_batch_of_a_checkpoint_is_that_of_the_step_after(after, code, tmp_path):
    dump = read_dump(open_instruct(tmp_path))
    assert isinstance(dump, Dump)
    note = dump.alignment(after)
    assert (None if note is None else note.code) == code


def test_steps_are_chosen_and_never_guessed(tmp_path):
    both = [json.loads(line) for line in open_instruct(tmp_path).read_text().splitlines()]
    path = jsonl(tmp_path / "both.jsonl", both + [{**record, "step": 9} for record in both])
    with pytest.raises(ValueError, match="expected one step, got those of 7, 9; pass a file of one step"):
        read_dump(path)
    with pytest.raises(ValueError, match="expected rollouts of step 8, got those of 7, 9"):
        read_dump(path, after=7)
    assert read_dump(path, after=8).step == read_dump(path, step=9).step == 9


def test_folders_lead_to_the_step(tmp_path):
    folder = prime_rl(tmp_path)
    of_one_rank, of_all = read_dump(folder / "rank_1.jsonl"), read_dump(folder.parent, after=STEP - 1)
    assert isinstance(of_one_rank, Dump)
    assert isinstance(of_all, Dump)
    assert len(of_one_rank.samples) == len(of_all.samples) == 4
    with pytest.raises(ValueError, match="expected step 3, got those of 7"):
        read_dump(folder.parent, after=2)
    (folder / "STABLE").unlink()
    with pytest.raises(ValueError, match="expected the file STABLE, which prime-rl writes once every rank is done"):
        read_dump(folder)
    with pytest.raises(ValueError, match="expected files of rollouts"):
        read_dump((tmp_path / "empty").mkdir() or tmp_path / "empty")
    with pytest.raises(ValueError, match="found no such file"):
        read_dump(tmp_path / "nothing")


def in_parts(whole: Path, *parts: str) -> Path:
    """The lines of a file, cut into others beside or below it."""
    lines = whole.read_text().splitlines(keepends=True)
    whole.unlink()
    for i, part in enumerate(parts):
        file = whole.parent / part
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(lines[i :: len(parts)]))
    return whole.parent


@pytest.mark.parametrize(
    ("write", "name", "parts"),
    [
        (open_instruct, "open-instruct", ("run_rollouts_000000.jsonl", "run_rollouts_000001.jsonl")),
        (verl, "verl", (f"step_{STEP}/part-0.jsonl", f"step_{STEP}/part-1.jsonl")),
        (verifiers, "verifiers", (f"global_step_{STEP}/a.jsonl", f"global_step_{STEP}/b.jsonl")),
    ],
)
def test_several_files_are_one_step(write, name, parts, tmp_path):
    dump = read_dump(in_parts(write(tmp_path), *parts), after=STEP - 1)
    assert isinstance(dump, Dump)
    assert (dump.layout.name, dump.step, len(dump.samples)) == (name, STEP, 4)


def test_compressed_files_are_unpacked(tmp_path):
    whole = read_dump(nemo_rl(tmp_path)).convert().rollouts
    file = tmp_path / f"train_data_step{STEP}.jsonl"
    packed = gzip.compress(file.read_bytes())
    file.unlink()
    (tmp_path / f"{file.name}.gz").write_bytes(packed)
    dump = read_dump(tmp_path, after=STEP - 1)
    assert torch.equal(dump.convert().rollouts.input_ids, whole.input_ids)
    (tmp_path / f"{file.name}.gz").write_bytes(packed[:-20])
    with pytest.raises(ValueError, match=r"\.gz: expected an intact gzip file, got: .*; copy it again"):
        read_dump(tmp_path)
    (tmp_path / "1.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd and more")
    with pytest.raises(ValueError, match=r"got what zstd compressed; unpack it \(zstd -d 1.jsonl.zst\)"):
        read_dump(tmp_path / "1.jsonl.zst")


def test_a_step_may_be_in_the_name_or_a_float_and_a_run_has_its_completions(tmp_path):
    records = [json.loads(line) for line in verl(tmp_path).read_text().splitlines()]
    jsonl(tmp_path / "4.jsonl", [{k: x for k, x in record.items() if k != "step"} for record in records])
    jsonl(tmp_path / "5.jsonl", [record | {"step": 5.0} for record in records])
    assert [read_dump(tmp_path / f"{step}.jsonl").step for step in (4, 5)] == [4, 5]
    run = tmp_path / "run"
    run.mkdir()
    trl(run)
    assert read_dump(run, after=STEP - 1).step == STEP


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ([{"question": "a", "answer": "b"}], "expected the fields of a known dump, got answer, question; known are T"),
        ([dict.fromkeys([*VERL, "example_id", "prompt", "completion", "reward"])], "those of verl .* and verifiers"),
        ([5], "expected a record with names of fields, got int"),
        ([], "expected at least one rollout, got an empty file"),
        ([VERL, {"input": "a"}], r"1.jsonl:2: expected the fields of verl"),
        ([VERL | {"score": "high"}], "score: expected a number, got 'high'"),
        ([VERL | {"step": 1.5}], "step: expected a whole number, got 1.5"),
        ([VERL | {"output": 3}], "output: expected token ids or text, got 3"),
    ],
)  # fmt: skip
def test_what_is_no_dump_is_named(records, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        read_dump(jsonl(tmp_path / "1.jsonl", records))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"generation_logprobs": [0.0]}, "generation_logprobs: expected 3 entries, one for each token"),
        ({"token_loss_mask": [1, 1]}, "token_loss_mask: expected an entry for each of the 6 tokens, got 2"),
        ({"token_loss_mask": [1] * 8}, "token_ids: expected a prompt before the response"),
        ({"generation_logprobs": [None] * 8}, "sampled_logprobs are not finite"),
        ({"advantages": None}, "expected advantages in all rollouts or none, got 1 without"),
    ],
)
def test_lists_that_do_not_fit_are_refused(change, match, tmp_path):
    path = nemo_rl(tmp_path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    jsonl(path, [records[0] | change, *records[1:]])
    with pytest.raises(ValueError, match=match):
        read_dump(path).convert()


def test_what_the_trainer_masks_out_stays_and_counts(tmp_path):
    path = nemo_rl(tmp_path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    jsonl(path, [records[0] | {"sample_loss_mask": 0.0}, *records[1:]])
    batch = read_dump(path).convert().rollouts
    assert batch.response_lengths.tolist() == [0, 2, 4, 2]


def test_turns_and_tools_that_a_text_cannot_tell_are_refused(tmp_path):
    path = verifiers(tmp_path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[1]["completion"] += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "No."}]
    with pytest.raises(ValueError, match="completion: expected one turn of the assistant, got 3 turns"):
        read_dump(jsonl(path, records))
    path = open_instruct(tmp_path)
    records = [json.loads(line) | {"request_info": {"tool_calleds": True}} for line in path.read_text().splitlines()]
    with pytest.raises(ValueError, match="expected no calls of tools"):
        read_dump(jsonl(path, records))


def test_advantages_that_no_rule_gives_are_kept_and_said(tmp_path):
    tokenizer = build_tokenizer()
    own = read_dump(trl(tmp_path, advantage=[0.3, -0.3, 1.0, -1.0])).convert(tokenizer, longest=8)
    assert own.rollouts.advantages.tolist() == pytest.approx([0.3, -0.3, 1.0, -1.0])
    assert [note.code for note in own.notes] == ["end_tokens_restored", "other_advantages"]
    weighted = trl(tmp_path, length=[0.0, 9.0, 2.0, 1.0])
    both = read_dump(weighted).convert(tokenizer, longest=8)
    assert both.rollouts.rewards is None  # of two columns nobody knows the weights
    told = read_dump(weighted).convert(tokenizer, longest=8, weights=(1.0, 0.0))
    assert told.rollouts.rewards.tolist() == list(REWARDS)
    assert told.advantages == "the dump's, which are (r - mean) / std of each prompt's"
    with pytest.raises(ValueError, match="expected 3 rewards, as there are weights, got columns correct, length"):
        read_dump(weighted).convert(tokenizer, longest=8, weights=(1.0, 0.0, 1.0))


def test_groups_of_other_sizes_are_said(tmp_path):
    records = [{"input": "1+1=", "output": "2", "score": i % 2, "step": 1} for i in range(6)]
    records += [{"input": "2+2=", "output": "4", "score": i, "step": 1} for i in range(2)]
    converted = read_dump(jsonl(tmp_path / "1.jsonl", records)).convert(build_tokenizer(), longest=8)
    assert [note.code for note in converted.notes][1:] == ["advantages_recomputed", "uneven_groups"]


class Payload:
    def __reduce__(self):
        return (open, ("owned", "w"))


def test_nothing_in_a_pickle_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {"batch_dict": {"sequences": Payload()}, "batch_size": 1, "device": None, "metadata": None}
    (tmp_path / "global_step_1.pkl").write_bytes(pickled_batch("skyrl_train.training_batch", state))
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Payload()))
    torch.save({"rollout_id": 1, "samples": [Payload()]}, tmp_path / "1.pt")
    for name in ("global_step_1.pkl", "plain.pkl", "1.pt"):
        with pytest.raises(ValueError, match="nothing in it was run"):
            read_dump(tmp_path / name)
    assert not (tmp_path / "owned").exists()
    slime(tmp_path).write_bytes(slime(tmp_path).read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"expected an archive written by torch\.save"):
        read_dump(tmp_path / f"rollout_{STEP}.pt")
    state["batch_dict"] = {"sequences": {"data": b"1234", "shape": (9,), "dtype": "int64"}}
    (tmp_path / "x.pkl").write_bytes(pickled_batch("skyrl_train.training_batch", state))
    with pytest.raises(ValueError, match="expected an intact pickled batch"):
        read_dump(tmp_path / "x.pkl")


def test_an_older_module_of_skyrl(tmp_path):
    dump = read_dump(skyrl(tmp_path, "skyrl_train.training_batch"))
    assert isinstance(dump, Dump)
    assert len(dump.samples) == 4
