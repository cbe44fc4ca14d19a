"""What AReaL dumps: texts with their special tokens, and how many tokens they are."""

import json

import pytest

from entropy_probe.demo.policy import build_tokenizer
from entropy_probe.dumps import read_dump

TOKENIZER = build_tokenizer()


def written(folder, version, task, **change):
    """Two responses to one prompt, in the file of their task."""
    file = folder / str(version) / f"{task}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, response in enumerate((f"{task}{TOKENIZER.eos_token}", "12")):
        prompt = f"{task}+1="
        counts = [len(TOKENIZER(text, add_special_tokens=False)["input_ids"]) for text in (prompt, response)]
        rows.append({
            "task_id": task, "sample_idx": i, "seqlen": sum(counts), "prompt_len": counts[0], "head_version": version,
            "tail_version": version, "reward": float(i), "prompt": prompt, "completion": response,
        } | change)  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_texts_are_their_tokens_again_and_nothing_is_put_back(tmp_path):
    written(tmp_path, 3, 5)
    for task in (4, 7):
        written(tmp_path, 4, task)
    dump = read_dump(tmp_path, after=4)
    assert (dump.layout.name, dump.step, len(dump.samples)) == ("AReaL", 5, 4)
    assert dump.alignment(4) is None
    assert dump.alignment(3).code == "other_step"
    converted = dump.convert(TOKENIZER)
    batch = converted.rollouts
    rows = zip(batch.input_ids, batch.response_mask, strict=True)
    ends = [row[mask].tolist()[-1] == TOKENIZER.eos_token_id for row, mask in rows]
    assert ends == [True, False, True, False]
    assert batch.prompt_ids.tolist() == [0, 0, 1, 1]
    assert batch.advantages.tolist() == pytest.approx([-0.7071, 0.7071] * 2, abs=1e-4)
    assert batch.retokenised
    assert TOKENIZER.decode(batch.input_ids[0][batch.response_mask[0]]) == f"4{TOKENIZER.eos_token}"


def test_the_folder_of_a_version_is_one_step(tmp_path):
    written(tmp_path, 4, 7)
    assert read_dump(tmp_path / "4").step == 5
    with pytest.raises(ValueError, match=r"expected step 6, got those of 5; pass a file of one step"):
        read_dump(tmp_path, step=6)


@pytest.mark.parametrize("change", [{"seqlen": 9}, {"prompt_len": 2}])
def test_counts_that_do_not_come_out_are_refused(tmp_path, change):
    dump = read_dump(written(tmp_path, 4, 7, **change))
    with pytest.raises(ValueError, match=r"expected responses that give their text back .*, got 2 of 2 that do not"):
        dump.convert(TOKENIZER)


def test_counts_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tail_version, seqlen, prompt_len: expected whole numbers, got"):
        read_dump(written(tmp_path, 4, 7, seqlen="9"))
