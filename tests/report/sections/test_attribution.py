"""What the page says of the attribution tables, and that nothing else is read as one."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from entropy_probe.report import run_sections
from entropy_probe.report.payload import MAX_TOKENS, responses_payload, script_json
from entropy_probe.report.sections.attribution import (
    attribution_sections,
    culprits,
    layers_section,
    prompt_sentences,
    prompts_section,
)
from entropy_probe.report.sections.base import BarChart, HeatMap, Rows
from entropy_probe.report.svg import heat_cells
from entropy_probe.report.tables import check_tables, read_tables
from entropy_probe.results.attribution import AttributionSummary
from tests.report.results import make_result, shown
from tests.report.tables import result_of, write_tables

SUMMARY = AttributionSummary(
    unit="nats/token",
    method="forward-mode",
    num_tokens=1535,
    gradient=-3.34e-4,
    momentum=-2.2e-3,
    weight_decay=0.0,
    positive_advantages=-1.22e-4,
    negative_advantages=-2.12e-4,
    rank_correlation_with_covariance=-0.36,
    seconds=0.5,
)


def show(**changes) -> str:
    return shown(run_sections(make_result().model_copy(update={"attribution": SUMMARY.model_copy(update=changes)})))


def test_signs_and_covariance_without_tables():
    text = show()
    assert " Which tokens did it\n" in text
    assert "from 1,535 tokens." in text
    assert "advantages > 0   -1.22e-4" in text
    assert "advantages < 0   -2.12e-4" in text
    assert "covariance term  -0.36" in text
    assert "lowering" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "undefined" in show(rank_correlation_with_covariance=None)
    assert "reverse-mode (no rule for [x])" in show(method="reverse-mode (no rule for [x])")


def test_top_prompts_from_the_table():
    contributions = [-2e-4, 1e-5, -1e-4, 3e-5, -6e-5, -1.4e-5, 0.0]
    columns = {
        "prompt_id": np.arange(7),
        "prompt": ["1+1=", None, "[bold]\x1b[31m", "x" * 60 + "end", "d", "e", "f"],
        "num_responses": [4] * 7,
        "num_tokens": [9] * 7,
        "mean_reward": np.array([0.5, *[np.nan] * 6]),
        "contribution": np.array(contributions),
        "standard_error": np.array([1e-5, *[np.nan] * 6]),
        "covariance": np.zeros(7),
    }
    lines = shown([prompts_section(columns, "nats/token", 8)]).splitlines()
    first = next(i for i, line in enumerate(lines) if "lowering entropy most" in line)
    assert "1+1=" in lines[first + 1]
    assert "-2.00e-4 ± 0.10e-4" in lines[first + 1]
    assert "reward 0.50" in lines[first + 1]
    assert r"[bold]\x1b[31m" in lines[first + 2]
    assert "d " in lines[first + 3]
    assert "raising entropy most" in lines[first + 4]
    assert "…" in lines[first + 5]
    assert "end" in lines[first + 5]
    assert "prompt 1" in lines[first + 6]
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize(
    ("contributions", "rows", "share"),
    [
        ([-6.0, -3.0, -1.0], [0], 0.6),
        ([-2.0, -5.0, 0.0, -3.0], [1], 0.5),
        ([-3.0, -3.0, -2.0, -2.0], [0, 1], 0.6),
        ([-4.0, 3.0, -4.0, -2.0], [0, 2], 0.8),  # what pushes up does not count against them
        ([4.0, -1.0], [0], 1.0),
        ([0.0, 0.0], [], 0.0),
    ],
)
def test_culprits_are_the_fewest_that_give_half(contributions, rows, share):
    found, reached = culprits(np.array(contributions))
    assert found == rows
    assert reached == pytest.approx(share)


def test_culprits_agree_with_trying_every_subset():
    random = np.random.default_rng(3)
    for _ in range(30):
        values = random.normal(size=7) - 0.5
        pushing = np.maximum(values * np.sign(values.sum()), 0)
        subsets = [[i for i in range(7) if mask >> i & 1] for mask in range(1, 2**7)]
        enough = [s for s in subsets if pushing[s].sum() >= 0.5 * pushing.sum()]
        best = min(enough, key=lambda s: (len(s), -pushing[s].sum()))
        found, reached = culprits(values)
        assert sorted(found) == best
        assert reached == pytest.approx(pushing[best].sum() / pushing.sum())


def prompts(contributions, **more):
    count = len(contributions)
    columns = {
        "prompt_id": np.arange(count) + 10,
        "contribution": np.array(contributions),
        "standard_error": np.full(count, np.nan),
        "mean_reward": np.full(count, np.nan),
        "covariance": np.zeros(count),
        "num_responses": [4] * count,
        "num_tokens": [9] * count,
        "prompt": [None] * count,
    }
    return columns | {name: np.array(values) for name, values in more.items()}


def test_prompts_are_called_by_what_differs_between_them():
    names = ["Work out 3 * 4 and reply\nwith the number.", "Work out 12 and reply with the number.", None]
    columns = {
        "prompt_id": np.arange(3),
        "prompt": ["", "", "a text"],
        "name": names,
        "num_responses": [4] * 3,
        "num_tokens": [9] * 3,
        "mean_reward": np.array([np.nan] * 3),
        "contribution": np.array([-3e-4, -2e-4, -1e-4]),
        "standard_error": np.array([np.nan] * 3),
        "covariance": np.zeros(3),
    }
    lines = [line.strip() for line in shown([prompts_section(columns, "nats/token", None)]).splitlines()]
    assert [line[:12].strip() for line in lines if line.endswith("4 responses")] == ["…3 * 4 …", "…12 …", "a text"]


def test_the_sentence_names_who_did_it():
    said = prompt_sentences(prompts([-5e-4, 1e-4, -3e-4, 0.0, -2e-4, 1e-4]))
    assert said[0] == "One of 6 prompts causes 50% of all that pushes entropy down in this batch: 10."
    assert said[1] == "Another 2 prompts push it up, by 2.0e-4 together."
    assert said[2].startswith("One prompt contributes nothing")
    assert prompt_sentences(prompts([-5e-4, 1e-4]))[1] == "Another prompt pushes it up, by 1.0e-4."
    both = prompt_sentences(prompts([3.0, 3.0, 2.0, 2.0]))
    assert both == ["2 of 4 prompts cause 60% of all that pushes entropy up in this batch: 10 and 11."]
    assert "No prompt" in prompt_sentences(prompts([0.0, 0.0]))[0]


def test_many_prompts_show_both_ends():
    columns = prompts([float(k) for k in range(-20, 20)], standard_error=np.full(40, 0.5))
    section = prompts_section(columns, "nats/token", 8)
    chart = next(block for block in section.blocks if isinstance(block, BarChart))
    assert [bar.value for bar in chart.bars] == [*range(-20, -12), *range(12, 20)]
    assert chart.bars[0].row.value == "-20.00 ± 0.50"
    assert chart.bars[0].prompt == 10
    named = next(block for block in section.blocks if isinstance(block, Rows)).rows
    assert [row.label for row in named] == ["lowering entropy most", "prompt 10", "prompt 11", "prompt 12",
                                            "raising entropy most", "prompt 49", "prompt 48", "prompt 47"]  # fmt: skip


def test_the_grids_add_up(tmp_path):
    layers = write_tables(tmp_path, layers=2).layers
    grid, parts = (block for block in layers_section(layers, "nats/token").blocks if isinstance(block, HeatMap))
    assert grid.columns[1:] == ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head")
    for (name, numbers), total in zip(grid.rows, grid.totals, strict=True):
        own = layers["total"][[layer == name for layer in layers["layer"]]]
        assert [x is None for x in numbers] == [(name == "lm_head") != (m == "lm_head") for m in grid.columns[1:]]
        assert [x for x in numbers if x is not None] == pytest.approx(own.tolist())
        assert total == pytest.approx(own.sum())
    for name, numbers in parts.rows:
        own = [layers[part][[m == name for m in layers["module"]]].sum() for part in
               ("gradient", "momentum", "weight_decay", "total")]  # fmt: skip
        assert numbers == pytest.approx(own)


def test_heat_follows_sign_and_size(tmp_path):
    grid = next(block for block in layers_section(write_tables(tmp_path).layers, "nats/token").blocks)
    rows, scale = heat_cells(grid)
    power = float(scale.split(" ")[0].replace("×10⁻", "1e-").translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")))
    for (_, numbers), total, (_, cells) in zip(grid.rows, grid.totals, rows, strict=True):
        for x, cell in zip((*numbers, total), cells, strict=True):
            assert (x is None) == (cell is None)
            if cell is not None:
                assert float(cell.text.replace("−", "-")) * power == pytest.approx(x, abs=0.006 * power)
                assert not cell.level or (cell.level > 0) == (x > 0)
    assert max(abs(cell.level) for _, cells in rows for cell in cells[:-1] if cell) == 6


def test_the_payload_holds_every_token(tmp_path):
    tables = write_tables(tmp_path, prompts=3, group=2, tokens=5, texts={(1, 2): "\x00<"}, prompt_texts={1: None})
    payload = responses_payload(tables, "nats/token")
    assert payload["total"] == len(payload["responses"]) == 6
    assert [one["id"] for one in payload["responses"]] == list(range(6))
    assert [one["prompt"] for one in payload["responses"]] == [0, 0, 1, 1, 2, 2]
    assert payload["prompts"][0] == {"id": 100, "name": None, "text": [("text", ["What is 0 + 1?"])]}
    assert payload["prompts"][1] == {"id": 101, "name": None, "text": None}
    assert payload["special"] == []
    flat = {key: [x for one in payload["responses"] for x in one[key]] for key in "tcvlh"}
    assert flat["c"] == pytest.approx(tables.tokens["contribution"].tolist(), rel=1e-3)
    assert flat["v"] == pytest.approx(tables.tokens["covariance"].tolist(), rel=1e-3)
    assert flat["l"] == pytest.approx(tables.tokens["logprob"].tolist(), rel=1e-3)
    assert flat["h"] == pytest.approx(tables.tokens["entropy"].tolist(), rel=1e-3)
    texts = [payload["texts"][row] for row in flat["t"]]
    assert texts[7] == ["", "NUL", "<"]
    plain = [text for text in tables.tokens["text"] if text.isprintable()]
    assert [text for text in texts if isinstance(text, str)] == plain
    sums = [one["contribution"] for one in payload["responses"]]
    assert sum(sums) == pytest.approx(tables.tokens["contribution"].sum(), rel=1e-3)
    assert "a" not in payload["responses"][0]


def test_advantages_by_token_are_kept(tmp_path):
    tables = write_tables(tmp_path, prompts=2, group=1, tokens=3)
    tables.tokens["advantage"][:3] = [1.0, 2.0, 3.0]
    first = responses_payload(tables, "nats/token")["responses"][0]
    assert first["a"] == [1.0, 2.0, 3.0]
    assert first["advantage"] == 2.0


def test_a_large_batch_shows_what_contributes_most(tmp_path, monkeypatch):
    tables = write_tables(tmp_path, prompts=3, group=2, tokens=5)
    monkeypatch.setattr("entropy_probe.report.payload.MAX_TOKENS", 12)
    payload = responses_payload(tables, "nats/token")
    sums = np.abs(tables.tokens["contribution"].reshape(6, 5).sum(1))
    assert [one["id"] for one in payload["responses"]] == sorted(np.argsort(-sums)[:2].tolist())
    assert payload["total"] == 6
    assert MAX_TOKENS > 512 * 200


def test_json_cannot_leave_its_element():
    text = script_json({"a": "</script><!--\u2028\u2029&"})
    assert not set("<>&\u2028\u2029") & set(text)
    assert text == '{"a":"\\u003c/script\\u003e\\u003c!--\\u2028\\u2029\\u0026"}'
    with pytest.raises(ValueError, match="JSON compliant"):
        script_json([float("nan")])


def test_the_sign_split_is_in_the_rows(tmp_path):
    tables = write_tables(tmp_path, prompts=2, group=2, tokens=2)
    tables.tokens["advantage"][:] = [1, 1, -1, -1, 0, 0, 0, 0]
    tables.tokens["contribution"][:] = [-1e-4, -2e-4, 5e-5, 0, 0, 0, 0, 0]
    _, tokens, _ = attribution_sections(result_of(tables), tables)
    assert tokens.sentences == ("The gradient part comes from 8 tokens of 4 responses.",)
    said = {row.label: row.value for block in tokens.blocks if isinstance(block, Rows) for row in block.rows}
    assert said == {"advantages > 0": "-3.00e-4", "advantages < 0": "0.50e-4", "covariance term": "-0.43"}


def test_a_run_without_attribution_has_no_tables(tmp_path):
    assert read_tables(tmp_path) is None


def test_an_incomplete_set_of_tables_is_refused(tmp_path):
    write_tables(tmp_path)
    for name in ("layers.parquet", "tokens.parquet"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        line = (
            rf"{name}: expected a table of the attribution beside \w+\.parquet, found no such file; put it back or run"
        )
        with pytest.raises(ValueError, match=line):
            read_tables(tmp_path)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "layers.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"layers\.parquet: expected a table of an attribution"):
        read_tables(tmp_path)
    shutil.copy(tmp_path / "prompts.parquet", tmp_path / "layers.parquet")
    with pytest.raises(ValueError, match=r"layers\.parquet: .* got one without layer; run again"):
        read_tables(tmp_path)


def test_tables_of_another_run_are_refused(tmp_path):
    mine, others = (write_tables(tmp_path, seed=seed) for seed in (0, 1))
    others.layers["momentum"][:] = 1.5 * mine.layers["momentum"]
    result = result_of(mine)
    check_tables(mine, result)
    for name in ("tokens", "prompts", "layers"):
        with pytest.raises(ValueError, match=rf"{name}\.parquet: expected sums as in the result, got others"):
            check_tables(replace(mine, **{name: getattr(others, name)}), result)
    with pytest.raises(ValueError, match="a result with an attribution beside it, got one without"):
        check_tables(mine, make_result())


def test_a_response_in_two_pieces_is_refused(tmp_path):
    tables = write_tables(tmp_path, prompts=2, group=1, tokens=4)
    tables.tokens["response_id"][:] = [0, 0, 1, 1, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="each response in consecutive rows"):
        responses_payload(tables, "nats/token")
