from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from entropy_probe import Rollouts
from entropy_probe.rollouts.batch import LOGPROBS
from entropy_probe.sampling import unused_columns


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
        "old_logprobs": sampled - 1,
        "reference_logprobs": sampled - 2,
        "microbatch_ids": torch.tensor([1, 0, 1]),
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
    for name in ("advantages", "rewards", "microbatch_ids", "trajectory_ids", *LOGPROBS):
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
    _read_error(path, f"got .*microbatch_id and no {name}; rename or add")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.rename_columns({"advantage": "advantages"}), "got also advantages and no advantage; rename it"),
        (
            lambda t: t.append_column("trajectory_ids", pa.array([1, 2, 3])),
            "got also trajectory_ids and no trajectory_id",
        ),
        (lambda t: t.slice(0, 0), "at least one sequence, got an empty file"),
        (_set("reward", pa.array([1.0, None, 2.0])), "column reward: expected a value in every row, got 1 nulls"),
        (_set("reward", pa.array(["a", "b", "c"])), "column reward: expected numbers without nulls, got string"),
        (_set("reward", pa.array([1.0, float("nan"), 2.0])), "rewards are not finite in 1 of 3 sequences"),
        (_set("reward", pa.array([[1.0] * n for n in (2, 4, 3)])), "rewards: expected shape"),
        (_set("prompt_id", pa.array([1.0, 2.5, 3.0])), "prompt_id: expected integers .* got double; cast"),
        (_set("prompt_token_ids", pa.array([1, 2, 3])), "column prompt_token_ids: expected lists, got int64"),
        (_set("prompt_token_ids", pa.array([[1], [None], [2]])), "column prompt_token_ids: .* with 1 nulls"),
        (_set("prompt_token_ids", pa.array([[1], [], [2]], pa.list_(pa.int64()))), "response starts at the first"),
        (_set("response_mask", pa.array([[True], [True], [True]])), "response_mask: expected 2 entries in row 0"),
        (_set("response_mask", pa.array([[False] * n for n in (2, 4, 3)])), "a response_mask that is false everywhere"),
        (
            _set("response_mask", pa.array([[2] * n for n in (2, 4, 3)])),
            "response_mask: expected 0 and 1, got numbers up to 2",
        ),
        (_set("response_token_ids", pa.array([[7.5] * n for n in (2, 4, 3)])), "response_token_ids: expected integers"),
        (_set("prompt_id", pa.array(["a", None, "b"])), "column prompt_id: expected a value in every row, got 1 nulls"),
        (_set("advantage", pa.array([1.0, None, 2.0])), r"advantages are not finite in 1 of 3 sequences \(index 1\)"),
        (
            _set("sampled_logprobs", pa.array([[-0.1, None], [-0.1, None, -0.2, -0.3], [-0.1, -0.2, None]])),
            r"sampled_logprobs are not finite \(or missing\) at response tokens in 1 of 3 sequences \(index 0\)",
        ),
        (
            lambda t: pa.table({"prompt": ["a"], "completion": ["b"], "advantage": [0.1], "step": [3]}),
            "expected token ids .* got texts, as in the completions that TRL logs",
        ),
        (_set("sampled_logprobs", pa.array([[0.0] * n for n in (2, 4, 2)])), "sampled_logprobs: expected 3 .* row 2"),
    ],
)
def test_inconsistent_files(tmp_path, change, match):
    path = tmp_path / "r.parquet"
    _rollouts().to_parquet(path)
    _rewrite(path, change)
    _read_error(path, match)


def test_a_later_schema_is_refused_and_the_first_is_read(tmp_path):
    path = tmp_path / "r.parquet"
    _rollouts().to_parquet(path)
    for version, match in (("1", None), ("2", None), ("4", "expected rollouts of schema 3 at most, got 4")):
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({"entropy_probe.rollouts_schema": version}), path)
        if match is None:
            _assert_equivalent(Rollouts.from_parquet(path), _rollouts())
        else:
            _read_error(path, match)


def test_a_plain_file_with_these_columns_is_read(tmp_path):
    """As pandas or an engine's exporter would write them: other widths, other lists, text ids, null off the mask."""
    path, expected = tmp_path / "r.parquet", _rollouts()
    row = pa.array([[5, 6], [8], [3, 4, 5]], pa.large_list(pa.int32()))
    columns = {
        "group": pa.array(["x", "y", "x"]),
        "prompt_id": pa.array(["7f-b", "03-a", "7f-b"]).dictionary_encode(),
        "prompt_token_ids": row,
        "response_token_ids": pa.array([[7, 1], [9, 10, 11, 1], [6, 1, 12]], pa.list_(pa.uint16())),
        "response_mask": pa.array([[1, 1], [1, 0, 1, 1], [1, 1, 0]], pa.list_(pa.int8())),
        "advantage": pa.array([0.1, -0.3, 2.0], pa.float64()),
        "reward": pa.array([1, 0, 1]),
        "sampled_logprobs": pa.array(
            [[-0.5, -0.25], [-1.0, None, -1.0, -2.0], [-0.5, -0.5, None]], pa.list_(pa.float32())
        ),
        "trajectory_id": pa.array([4, 4, 2], pa.int16()),
    }
    pq.write_table(pa.table(columns), path)
    back = Rollouts.from_parquet(path)
    assert back.prompt_ids.tolist() == [0, 1, 0]
    assert back.trajectory_ids is not None
    assert back.trajectory_ids.tolist() == [4, 4, 2]
    same = replace(
        back, prompt_ids=expected.prompt_ids, trajectory_ids=None, rewards=None, advantages=None, sampled_logprobs=None
    )
    absent = dict.fromkeys(("rewards", "advantages", "microbatch_ids", *LOGPROBS))
    _assert_equivalent(same, _rollouts(**absent))
    assert back.sampled_logprobs is not None
    assert back.sampled_logprobs.dtype == torch.float32
    assert back.sampled_logprobs[back.response_mask].tolist() == [-0.5, -0.25, -1.0, -1.0, -2.0, -0.5, -0.5]
    assert (back.sampled_logprobs[~back.response_mask] == 0).all()
    assert unused_columns(path) == ("group",)
    back.to_parquet(tmp_path / "again.parquet")
    _assert_equivalent(Rollouts.from_parquet(tmp_path / "again.parquet"), back)
    assert torch.equal(Rollouts.from_parquet(tmp_path / "again.parquet").trajectory_ids, back.trajectory_ids)


def test_pandas_makes_floats_of_whole_numbers(tmp_path):
    path = tmp_path / "r.parquet"
    _rollouts().to_parquet(path)
    expected = Rollouts.from_parquet(path)

    def as_floats(table):
        for name in ("prompt_id", "response_token_ids", "response_mask"):
            kind = pa.float64() if name == "prompt_id" else pa.list_(pa.float16())
            values = [[float(x) for x in row] if isinstance(row, list) else row for row in table[name].to_pylist()]
            halves = pa.array([[np.float16(x) for x in v] if isinstance(v, list) else v for v in values], kind)
            table = _set(name, halves)(table)
        return table.append_column("__index_level_0__", pa.array([4, 1, 2]))

    _rewrite(path, as_floats)
    _assert_equivalent(Rollouts.from_parquet(path), expected)
    assert unused_columns(path) == ()


def test_masked_out_responses_are_kept_as_rows(tmp_path):
    rollouts = _rollouts()
    rollouts = replace(rollouts, response_mask=rollouts.response_mask & (torch.arange(3) != 1)[:, None],
                       advantages=torch.tensor([0.1, torch.nan, 2.0]))  # fmt: skip
    path = tmp_path / "r.parquet"
    rollouts.to_parquet(path)
    row = pq.read_table(path).to_pylist()[1]
    # nothing says where its response began
    assert (row["prompt_token_ids"], row["response_token_ids"]) == ([8, 9, 10, 11, 1], [])
    back = Rollouts.from_parquet(path)
    assert back.response_lengths.tolist() == [2, 0, 2]
    assert back.token_advantages.isfinite().all()
    _rewrite(path, _set("sampled_logprobs", pa.array([[-0.5, -0.5], None, [-0.5, -0.5, -0.5]])))
    assert Rollouts.from_parquet(path).sampled_logprobs[back.response_mask].tolist() == [-0.5] * 4
