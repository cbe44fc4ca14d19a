"""The report as a file: complete, self-contained, the same bytes for the same result."""

import base64
import hashlib
import html
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

from entropy_probe.report import figure_files, run_sections, timeline_sections
from entropy_probe.report import page as page_of
from entropy_probe.report.sections.base import Axis, Bar, Row, bar_charts
from entropy_probe.report.sections.run import cautions
from entropy_probe.report.svg import draw_bars
from entropy_probe.results.probe import PolicyFit, SamplerMismatch
from entropy_probe.results.validation import RankCorrelation, SubsetStep, Validation
from tests.notes import noted
from tests.report.results import make_cross_prompt, make_result, run_page
from tests.report.sweeps import make_sweep, sweep_page
from tests.report.tables import result_of, write_tables
from tests.report.timelines import make_timeline

ROOT = Path(__file__).parents[2]
VOID = {"meta", "link", "br", "input", "img", "hr"}


class Checker(HTMLParser):
    """Tags in balance, ids unique, and what a browser would run or load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.inline: dict[str, list[str]] = {"style": [], "script": []}
        self.text: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert not [name for name in given if name.startswith("on")], f"{tag}: inline handler"
        assert "style" not in given, f"{tag}: inline style, which the policy forbids"
        assert "src" not in given, f"{tag}: loads something"
        self.links += [value for name, value in attrs if name in ("href", "action", "data", "poster") and value]
        self.ids += [given["id"]] if given.get("id") else []
        if tag not in VOID:
            self.open.append(tag)
        if tag in self.inline and given.get("type") != "application/json":
            self.inline[tag].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        if tag in self.inline:
            if self.inline[tag]:
                self.inline[tag][-1] += data
        else:
            self.text.append(data)


def pages() -> dict[str, str]:
    cross = make_cross_prompt()
    mismatch = SamplerMismatch(mean=0.1, max=2.0, ess_fraction=0.4)
    two = make_result()
    diagnostics = two.diagnostics.model_copy(update={"mismatch": mismatch, "clip_factor": 0.2})
    zero = ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    return {
        "two batches": run_page(two),
        "refused": run_page(make_result(status="low_ess")),
        "heavy tail": run_page(make_result(status="high_pareto_k")),
        "below noise": run_page(make_result(status="below_noise_floor", noise_floor=1.0)),
        "prediction": run_page(make_result(realized=None, difference=None)),
        "measurement": run_page(make_result(predicted=None, difference=None)),
        "one batch": run_page(make_result(None, None, None, cross_prompt=cross)),
        "both": run_page(make_result(cross_prompt=cross)),
        "nothing moves": run_page(make_result(*zero)),
        "mismatch": run_page(two.model_copy(update={"diagnostics": diagnostics, "config": {"max_mismatch": 0.05}})),
        "sweep": sweep_page({"": make_sweep()}),
        "sweep without a range": sweep_page({"": make_sweep(end=None, fit=None, power_law=None)}),
        "timeline": page_of(timeline_sections([make_timeline()])),
        "timeline with an alarm": page_of(timeline_sections([make_timeline(20, -0.012)])),
        "timelines": page_of(timeline_sections([make_timeline(), make_timeline(50, -0.01, "runs/b", 10)])),
        "log alone": page_of(timeline_sections([make_timeline(every=1000)])),
        "sweeps": sweep_page({"checkpoint-1": make_sweep(), "checkpoint-2": make_sweep(a=4.0)}),
    }


@pytest.fixture(scope="module", params=pages().items(), ids=lambda item: item[0])
def page(request) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def attributed(tmp_path_factory) -> str:
    tables = write_tables(tmp_path_factory.mktemp("tables"))
    return run_page(result_of(tables), tables=tables)


def test_every_kind_of_result_has_a_sound_page(page):
    checker = Checker(page[1])
    assert page[1].startswith("<!doctype html>\n")
    assert len(set(checker.ids)) == len(checker.ids)
    inside = [link[1:] for link in checker.links if link.startswith("#")]
    assert set(inside) <= set(checker.ids)
    assert all(link.startswith("#") or link == "data:," for link in checker.links)
    text = "".join(checker.text)
    assert "None" not in text
    assert "nan" not in re.findall(r"\b(?:nan|inf)\b", text)
    assert not re.search(r"\de[-+]?\d", text), "a number as computers write it"


def test_an_attributed_page_is_sound_too(attributed):
    checker = Checker(attributed)
    assert len(set(checker.ids)) == len(checker.ids)
    assert {"prompts", "responses", "layers", "diagnostics", "optimizer", "settings"} <= set(checker.ids)
    assert "https://" not in attributed
    assert "http://" not in attributed
    assert "@import" not in attributed
    assert "url(" not in attributed


def test_the_policy_allows_the_page_itself_and_nothing_else(attributed):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', attributed)
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].replace("&#39;", "'").split(";"))
    assert rules["default-src"] == "'none'"
    inline = Checker(attributed).inline
    for kind in ("style", "script"):
        (content,) = inline[kind]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    assert "unsafe" not in policy[1]
    # before anything that it governs
    assert policy.start() < attributed.index("<style>")


def test_the_numbers_are_those_of_the_result():
    text = "".join(Checker(run_page(make_result())).text)
    for number in (
        "(−1.432 ± 0.081)×10⁻³", "(−1.380 ± 0.080)×10⁻³", "0.842 ± 0.012", "(−0.520 ± 0.030)×10⁻³",
        "(−0.912 ± 0.060)×10⁻³", "(0.052 ± 0.030)×10⁻³", "0.964", "6.0×10⁻⁵", "5.4×10⁻⁵", "98.3%", "0.31",
        "at most 0.58",
    ):  # fmt: skip
        assert number in text, number
    assert "64% of that comes from momentum" in text
    assert "z −0.4surprisal − entropy −3.1×10⁻³ nats/token" in text
    assert "Policy fit, update" in text
    assert "attribution=true" in text


def test_a_headline_does_not_stand_without_what_spoils_it():
    result = make_result()
    off = result.diagnostics.policy_fit.update
    assert off is not None
    assert off.status == "off_policy"
    fits = PolicyFit(evaluation=off, update=off.model_copy(update={"status": "selected"}))
    parts = ("the KL term to a reference policy (the log has kl, 0.1 last)",)

    def found(**more):
        return result.model_copy(update={"diagnostics": result.diagnostics.model_copy(update=more)})

    assert cautions(found(policy_fit=PolicyFit())) == ()
    said = ("The evaluation rollouts do not fit the policy, so the numbers are biased.",)
    assert cautions(found(policy_fit=fits)) == said
    page = run_page(found(not_modelled=parts))
    headline = html.unescape(page[: page.index('id="result"')])
    assert "The update rollouts do not fit the policy; the step is taken on them as given." in headline
    assert "One part of the trainer's step is not in these numbers." in headline


def test_parts_that_work_against_each_other_are_said_to():
    result = make_result()
    parts = result.components
    parts = parts | {"gradient": parts["gradient"].model_copy(update={"value": 0.4e-3})}
    assert "this batch&#39;s gradient works against it" in run_page(result.model_copy(update={"components": parts}))


def test_every_problem_comes_with_advice():
    notes = noted("update: 3 of 16 prompts have equal rewards, so their advantages are 0", remedy="Draw others.")
    text = " ".join("".join(Checker(run_page(make_result(notes=notes))).text).split())
    assert f"{notes[0].text}What to do: Draw others." in text
    refused = pages()["refused"]
    assert 'class="check bad"' in refused
    assert "set probe.on_low_ess to resample" in refused
    assert pages()["mismatch"].count('class="check look"') == pages()["two batches"].count('class="check look"') + 1


def test_what_is_not_modelled_is_on_the_page():
    assert "Not modelled" not in run_page(make_result())
    result = make_result()
    diagnostics = result.diagnostics.model_copy(update={"not_modelled": ("dropout of up to 0.1", "<b>")})
    page = run_page(result.model_copy(update={"diagnostics": diagnostics}))
    assert "<h3>Not modelled</h3>" in page
    assert "<li><p>dropout of up to 0.1</p></li>" in page
    assert "&lt;b&gt;" in page


def test_text_of_files_is_escaped_and_made_visible():
    bad = "<script>alert(1)</script>\x1b[2J\u202e\x00&"
    result = make_result(notes=noted(bad, remedy=bad))
    state = result.optimizer_state.model_copy(update={"mapping": bad})
    page = run_page(result.model_copy(update={"optimizer_state": state}), config=f"a: {bad}\nb: 1\n", name=bad)
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 6
    assert not {"\x1b", "\u202e", "\x00"} & set(page)
    assert "\nb: 1\n" in page


def test_the_page_says_how_the_attribution_was_validated(tmp_path):
    tables = write_tables(tmp_path)
    step = SubsetStep(
        kept=(1, 2), forecasts={}, contributions_by_half=(0.0, 0.0), realized=1.0, realized_by_half=(1.0, 1.0)
    )
    validation = Validation(
        unit="nats/token",
        num_prompts=4,
        num_sequences=2048,
        seed=0,
        measured_on="halves",
        reliability=0.97,
        correlations={
            "contributions": RankCorrelation(value=0.981, low=0.95, high=0.993, ceiling=0.99),
            "covariance": RankCorrelation(value=-0.12, low=-0.4, high=0.2, ceiling=0.99),
            "advantages": None,
        },
        steps=(step,) * 40,
        notes=noted("few halves", remedy="Use more update prompts."),
    )
    text = "".join(Checker(run_page(result_of(tables), tables=tables, validation=validation)).text)
    assert "few halvesWhat to do: Use more update prompts." in text
    assert "40 real steps on 2 of 4 prompts: are they ranked as forecast?" in text
    assert re.search(r"contributions\s*0.981\s*0.950 to 0.993\s*0.99", text)
    assert re.search(r"negated covariance terms\s*−0.120\s*−0.400 to 0.200\s*−0.12", text)
    assert "Changes are measured on one half of 2,048 evaluation sequences and forecast from the other" in text
    assert "reliability of the measured changes: 0.970" in text


def test_the_same_result_gives_the_same_bytes(attributed, tmp_path):
    tables = write_tables(tmp_path)
    assert run_page(result_of(tables), tables=tables) == attributed


def test_a_page_needs_neither_torch_nor_the_network():
    code = (
        "import sys, socket; socket.socket = None\n"
        "from entropy_probe.report import figure_files, page, run_sections\n"
        "from tests.report.results import make_result\n"
        "sections = run_sections(make_result()); page(sections); figure_files(sections)\n"
        "sys.exit(' '.join(m for m in ('torch', 'transformers', 'scipy') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_figures_for_papers(tmp_path):
    tables = write_tables(tmp_path)
    result = result_of(tables)
    found = figure_files(run_sections(result, tables))
    assert found.keys() == {f"{n}.{k}" for n in ("change", "parts", "prompts", "layers") for k in ("png", "svg")}
    assert all(content[1:4] == b"PNG" for name, content in found.items() if name.endswith("png"))
    assert b"Prompt 100" in found["prompts.svg"] or b"<svg" in found["prompts.svg"]
    assert figure_files(run_sections(result, tables)) == found
    assert figure_files(run_sections(make_result(predicted=None, difference=None))).keys() == {
        "change.png",
        "change.svg",
    }


def test_bars_lie_where_their_values_are():
    bars = [Bar(Row("a"), -2.0, 0.5), Bar(Row("b"), -1.0, start=-2.0, linked=True), Bar(Row("c"), 1.0, look="total")]
    (chart,) = bar_charts("", bars, "nats", "")
    rows, _, _ = draw_bars(chart)
    low, high = -3.0, 1.0
    axis = Axis(low - 0.04 * 4, high + 0.04 * 4)
    for (bar, drawing), (left, right) in zip(rows, [(-2.0, 0.0), (-3.0, -2.0), (0.0, 1.0)], strict=True):
        found = re.search(r'<rect class="([a-z ]+)" x="([\d.]+)%" width="([\d.]+)%"', drawing)
        assert found
        assert float(found[2]) == pytest.approx(100 * axis.at(left), abs=2e-3)
        assert float(found[3]) == pytest.approx(100 * (axis.at(right) - axis.at(left)), abs=2e-3)
        assert found[1].split()[0] == ("up" if bar.value > 0 else "down")
    whiskers = re.findall(r'<line class="whisker" x1="([\d.]+)%" x2="([\d.]+)%"', rows[0][1])
    ends = [100 * axis.at(-2.0 + k * 0.5) for k in (-1, 1)]
    assert [float(x) for x in whiskers[0]] == pytest.approx(ends, abs=2e-3)
    assert bar_charts("", [Bar(Row("zero"), 0.0)], "nats", "") == ()


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(-2.9, 0.1), [-2.0, -1.0, 0.0]),
        (Axis(-0.13, 0.26), [-0.1, 0.0, 0.1, 0.2]),
        (Axis(0.0, 1.0), [0.0, 0.25, 0.5, 0.75, 1.0]),
        (Axis(1e-6, 1e-2, logarithmic=True), [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]),
        (Axis(2e-7, 3e-2, logarithmic=True), [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(axis, ticks):
    assert axis.ticks() == pytest.approx(ticks)
    places = [axis.at(tick) for tick in axis.ticks()]
    assert places == sorted(places)
    assert places[0] >= 0
    assert places[-1] <= 1


def test_the_wheel_holds_template_style_and_script(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    for name in ("page.html", "page.css", "page.js"):
        assert f"entropy_probe/report/assets/{name}" in names
