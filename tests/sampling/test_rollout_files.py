from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from entropy_probe import Rollouts


def _rollouts(side="right", dtype=torch.float32, **changes):
    """Three sequences of different lengths; the second has a gap, the third attended tokens after its response."""
    rows = [
        ([5, 6], [7, 1], [1, 1]),
        ([8], [9, 10, 11, 1], [1, 0, 1, 1]),
        ([3, 4, 5], [6, 1, 12], [1, 1, 0]),
    ]
    length = 8
    values = {
        name: torch.zeros(3, length, dtype=torch.long) for name in ("input_ids", "attention_mask", "response_mask")
    }
    for i, (prompt, response, mask) in enumerate(rows):
        n = len(prompt) + len(response)
        at = slice(0, n) if side == "right" else slice(length - n, length)
        values["input_ids"][i, at] = torch.tensor(prompt + response)
        values["attention_mask"][i, at] = 1
        values["response_mask"][i, at] = torch.tensor([0] * len(prompt) + mask)
    sampled = -torch.arange(3.0 * length).view(3, length).to(dtype) / 7
    given = {
        "prompt_ids": torch.tensor([11, 4, 11]),
        "advantages": torch.tensor([0.1, -0.3, 2.0], dtype=dtype),
        "rewards": torch.tensor([1.0, 0.0, 0.3], dtype=dtype),
        "sampled_logprobs": sampled,
    }
    return Rollouts(**(values | given | changes))


def _assert_equivalent(a, b):
    """The same sequences with the same numbers at response tokens, whatever the padding."""
    assert len(a) == len(b)
    assert torch.equal(a.prompt_ids, b.prompt_ids)
    for i in range(len(a)):
        keep_a, keep_b = a.attention_mask[i], b.attention_mask[i]
        assert torch.equal(a.input_ids[i][keep_a], b.input_ids[i][keep_b])
        assert torch.equal(a.response_mask[i][keep_a], b.response_mask[i][keep_b])
    for name in ("advantages", "rewards", "sampled_logprobs"):
        x, y = getattr(a, name), getattr(b, name)
        if x is None or y is None:
            assert x is y
            continue
        assert x.dtype == y.dtype
        if x.dim() == 2:
            x, y = x[a.response_mask], y[b.response_mask]
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["left", "right"])
def test_round_trip(tmp_path, side, dtype):
    rollouts = _rollouts(side, dtype)
    rollouts.to_parquet(tmp_path / "sub" / "r.parquet")
    back = Rollouts.from_parquet(tmp_path / "sub" / "r.parquet")
    _assert_equivalent(rollouts, back)
    assert back.input_ids.shape == (3, 6)
    assert back.attention_mask[:, 0].all()  # right-padded
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["r.parquet"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_per_token_advantages(tmp_path, side):
    advantages = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    rollouts = _rollouts(side, advantages=advantages.masked_fill(torch.arange(8) == 99, 0.0))
    rollouts.to_parquet(tmp_path / "r.parquet")
    _assert_equivalent(rollouts, Rollouts.from_parquet(tmp_path / "r.parquet"))


def test_values_outside_the_response_are_not_stored(tmp_path):
    rollouts = _rollouts()
    garbage = rollouts.sampled_logprobs.masked_fill(~rollouts.response_mask, float("nan"))
    rollouts = _rollouts(sampled_logprobs=garbage)
    rollouts.to_parquet(tmp_path / "r.parquet")
    back = Rollouts.from_parquet(tmp_path / "r.parquet")
    _assert_equivalent(rollouts, back)
    assert back.sampled_logprobs[~back.response_mask].eq(0).all()


def test_absent_numbers_stay_absent(tmp_path):
    rollouts = _rollouts(advantages=None, rewards=None, sampled_logprobs=None)
    rollouts.to_parquet(tmp_path / "r.parquet")
    back = Rollouts.from_parquet(tmp_path / "r.parquet")
    assert back.advantages is back.rewards is back.sampled_logprobs is None
    _assert_equivalent(rollouts, back)


def test_half_precision_is_exact(tmp_path):
    rollouts = _rollouts(dtype=torch.bfloat16)
    rollouts.to_parquet(tmp_path / "r.parquet")
    back = Rollouts.from_parquet(tmp_path / "r.parquet")
    assert torch.equal(back.rewards, rollouts.rewards.float())


def test_columns_are_as_documented(tmp_path):
    _rollouts("left").to_parquet(tmp_path / "r.parquet")
    row = pq.read_table(tmp_path / "r.parquet").to_pylist()[1]
    assert row["prompt_id"] == 4
    assert row["prompt_token_ids"] == [8]
    assert row["response_token_ids"] == [9, 10, 11, 1]
    assert row["response_mask"] == [True, False, True, True]
    assert row["advantage"] == pytest.approx(-0.3)
    assert row["reward"] == 0.0
    assert len(row["sampled_logprobs"]) == 4


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.parquet"
    _rollouts().to_parquet(path)

    def fail(table, where):
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        _rollouts("left").to_parquet(path)
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]
    _assert_equivalent(Rollouts.from_parquet(path), _rollouts())


def _read_error(path, match):
    with pytest.raises(ValueError, match=match) as raised:
        Rollouts.from_parquet(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_unreadable_files(tmp_path):
    path = tmp_path / "r.parquet"
    _read_error(path, "found no such file")
    path.write_text('{"prompt": "a"}\n')
    _read_error(path, "is not Parquet or is truncated")
    path.write_bytes(b"")
    _read_error(path, "is not Parquet or is truncated")
    _rollouts().to_parquet(path)
    whole = path.read_bytes()
    for length in (4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        _read_error(path, "is not Parquet or is truncated")


def _rewrite(path, change, metadata=True):
    table = pq.read_table(path)
    schema_metadata = table.schema.metadata
    table = change(table)
    pq.write_table(table.replace_schema_metadata(schema_metadata if metadata else None), path)


def _set(name, values):
    return lambda t: t.set_column(t.column_names.index(name), name, values)


@pytest.mark.parametrize("name", ["prompt_id", "prompt_token_ids", "response_token_ids", "response_mask"])
def test_missing_column(tmp_path, name):
    path = tmp_path / "r.parquet"
    _rollouts().to_parquet(path)
    _rewrite(path, lambda t: t.drop_columns([name]))
    _read_error(path, f"got a file without {name}")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.append_column("step", pa.array([1, 2, 3])), "got also step"),
        (lambda t: t.slice(0, 0), "at least one sequence, got an empty file"),
        (_set("reward", pa.array([1.0, None, 2.0])), "column reward: expected a value in every row, got 1 nulls"),
        (_set("reward", pa.array(["a", "b", "c"])), "column reward: expected float or double without nulls, got str"),
        (_set("reward", pa.array([1.0, float("nan"), 2.0])), "rewards are not finite in 1 of 3 sequences"),
        (_set("reward", pa.array([[1.0] * n for n in (2, 4, 3)])), "rewards: expected shape"),
        (_set("prompt_id", pa.array([1.0, 2.0, 3.0])), "column prompt_id: expected int64 without nulls, got double"),
        (_set("prompt_token_ids", pa.array([1, 2, 3])), "column prompt_token_ids: expected lists, got int64"),
        (_set("prompt_token_ids", pa.array([[1], [None], [2]])), "column prompt_token_ids: .* with 1 nulls"),
        (_set("prompt_token_ids", pa.array([[1], [], [2]], pa.list_(pa.int64()))), "response starts at the first"),
        (_set("response_mask", pa.array([[True], [True], [True]])), "response_mask: expected 2 entries in row 0"),
        (_set("response_mask", pa.array([[False] * n for n in (2, 4, 3)])), "response is empty in 3 of 3"),
        (_set("sampled_logprobs", pa.array([[0.0] * n for n in (2, 4, 2)])), "sampled_logprobs: expected 3 .* row 2"),
    ],
)
def test_inconsistent_files(tmp_path, change, match):
    path = tmp_path / "r.parquet"
    _rollouts().to_parquet(path)
    _rewrite(path, change)
    _read_error(path, match)


def test_other_schema(tmp_path):
    path = tmp_path / "r.parquet"
    _rollouts().to_parquet(path)
    _rewrite(path, lambda t: t, metadata=False)
    _read_error(path, "expected rollouts of schema 1, got none")
