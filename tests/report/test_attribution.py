"""What the page says of the attribution tables, and that nothing else is read as one."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from entropy_probe.report.attribution import culprits, layer_grid, prompt_chart, prompt_sentence, token_sentence
from entropy_probe.report.payload import MAX_TOKENS, responses_payload, script_json
from entropy_probe.report.tables import check_tables, read_tables
from tests.report.results import make_result
from tests.report.tables import result_of, write_tables


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
        "prompt": [None] * count,
    }
    return columns | {name: np.array(values) for name, values in more.items()}


def test_the_sentence_names_who_did_it():
    said = prompt_sentence(prompts([-5e-4, 1e-4, -3e-4, 0.0, -2e-4, 1e-4]))
    assert said[0] == "One of 6 prompts causes 50% of all that pushes entropy down in this batch: 10."
    assert said[1] == "Another 2 prompts push it up, by 2.0×10⁻⁴ together."
    assert said[2].startswith("One prompt contributes nothing")
    both = prompt_sentence(prompts([3.0, 3.0, 2.0, 2.0]))
    assert both == ["2 of 4 prompts cause 60% of all that pushes entropy up in this batch: 10 and 11."]
    assert "No prompt" in prompt_sentence(prompts([0.0, 0.0]))[0]


def test_many_prompts_show_both_ends():
    chart = prompt_chart(prompts([float(k) for k in range(-20, 20)], standard_error=np.full(40, 0.5)), "nats/token", 8)
    assert chart is not None
    assert [bar.value for bar, _ in chart.rows] == [*range(-20, -12), *range(12, 20)]
    assert chart.rows[0][0].text == "−20.00 ± 0.50"
    assert chart.rows[0][0].key == 10


def test_the_grid_adds_up(tmp_path):
    layers = write_tables(tmp_path, layers=2).layers
    grid = layer_grid(layers, "nats/token")
    assert grid.modules == ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head")
    power = float(grid.scale.split(" ")[0].replace("×10⁻", "1e-").translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")))

    def number(cell) -> float:
        return float(cell.text.replace("−", "-")) * power

    for name, cells, total in grid.layers:
        own = layers["total"][[layer == name for layer in layers["layer"]]]
        assert [cell is None for cell in cells] == [(name == "lm_head") != (m == "lm_head") for m in grid.modules]
        assert [number(cell) for cell in cells if cell] == pytest.approx(own.tolist(), abs=0.006 * power)
        assert number(total) == pytest.approx(own.sum(), abs=0.006 * power)
    for name, cells in grid.parts:
        own = [layers[part][[m == name for m in layers["module"]]].sum() for part in
               ("gradient", "momentum", "weight_decay", "total")]  # fmt: skip
        assert [number(cell) for cell in cells] == pytest.approx(own, abs=0.006 * power)
        assert all((cell.level > 0) == (number(cell) > 0) for cell in cells if cell.level)
    levels = [abs(cell.level) for _, cells, _ in grid.layers for cell in cells if cell]
    assert max(levels) == 6


def test_the_payload_holds_every_token(tmp_path):
    tables = write_tables(tmp_path, prompts=3, group=2, tokens=5, texts={(1, 2): "\x00<"}, prompt_texts={1: None})
    payload = responses_payload(tables, "nats/token")
    assert payload["total"] == len(payload["responses"]) == 6
    assert [one["id"] for one in payload["responses"]] == list(range(6))
    assert [one["prompt"] for one in payload["responses"]] == [0, 0, 1, 1, 2, 2]
    assert payload["prompts"][1] == {"id": 101, "text": None}
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


def test_the_sign_split_is_in_the_sentence(tmp_path):
    tables = write_tables(tmp_path, prompts=2, group=2, tokens=2)
    result = result_of(tables)
    tables.tokens["advantage"][:] = [1, 1, -1, -1, 0, 0, 0, 0]
    tables.tokens["contribution"][:] = [-1e-4, -2e-4, 5e-5, 0, 0, 0, 0, 0]
    said = token_sentence(tables, result)
    assert "8 tokens of 4 responses" in said
    assert "positive advantage add −3.0×10⁻⁴ nats/token" in said
    assert "negative one 5.0×10⁻⁵" in said
    assert "(2025): −0.43," in said


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
