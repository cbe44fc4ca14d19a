"""The report in a real browser: nothing from the network, everything by keyboard, model text as text."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.notes import noted
from tests.report.results import run_page
from tests.report.sweeps import make_sweep, sweep_page
from tests.report.tables import result_of, write_tables

NASTY = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    texts = {
        (3, 0): NASTY,
        (3, 1): " \"double\" 'single' `tick` &amp; ${x} {{ y }}",
        (3, 2): "👍🏽👩\u200d👧",
        (3, 3): "abc\u202egnp\u202c",
        (3, 4): "\x00",
        (3, 5): "</script>\u2028",
    }
    tables = write_tables(directory, prompts=7, group=4, tokens=12, texts=texts, prompt_texts={0: f"Ask\x1b {NASTY}"})
    path = directory / "report.html"
    config = f"checkpoint: {NASTY}\n"
    result = result_of(
        tables, notes=noted(f"update: 3 prompts have equal rewards, so their advantages are 0 {NASTY}", remedy=NASTY)
    )
    path.write_text(run_page(result, tables=tables, config=config, name=f"a/{NASTY}"), encoding="utf-8")
    return path


def ids(page) -> list[int]:
    return [int(text.split()[1]) for text in page.locator(".response h3").all_text_contents()]


def choose(page, control: str, label: str) -> None:
    page.select_option(f"#{control}", label=label)


def response(page, number: int):
    return page.locator(".response", has=page.get_by_role("heading", name=f"Response {number}", exact=True))


def test_the_page_opens_without_a_complaint(open_page, report):
    page = open_page(report)
    assert page.locator("h1").text_content() == "Entropy change of the next step"
    assert page.locator("#shown").text_content() == "Responses 1 to 12 of 28"
    assert page.locator("#list .response").count() == 12
    assert page.title().startswith("Entropy change")


def test_it_is_readable_without_javascript(open_page, report):
    page = open_page(report, java_script_enabled=False)
    assert page.locator("noscript").text_content()
    assert not page.locator("#viewer").is_visible()
    assert page.locator("#layers table").first.is_visible()


def test_sorting(open_page, report):
    page = open_page(report)
    sums = page.evaluate(
        "Object.fromEntries(JSON.parse(document.getElementById('responses-data').textContent)"
        ".responses.map((r) => [r.id, r.contribution]))"
    )
    values = {int(key): value for key, value in sums.items()}
    for label, order in {
        "size of the contribution": sorted(values, key=lambda r: (-abs(values[r]), r)),
        "most negative first": sorted(values, key=lambda r: (values[r], r)),
        "most positive first": sorted(values, key=lambda r: (-values[r], r)),
        "order in the batch": sorted(values),
        "prompt": sorted(values),
    }.items():
        choose(page, "sort", label)
        assert ids(page) == order[:12], label
    choose(page, "sort", "advantage")
    assert ids(page)[0] % 2 == 1


def test_filtering(open_page, report):
    page = open_page(report)
    choose(page, "prompt", "101")
    assert sorted(ids(page)) == [4, 5, 6, 7]
    choose(page, "sign", "positive")
    assert sorted(ids(page)) == [5, 7]
    choose(page, "sign", "zero")
    assert ids(page) == []
    assert page.locator("#shown").text_content() == "No response fits these filters"
    choose(page, "prompt", "106")
    assert sorted(ids(page)) == [24, 25, 26, 27]
    choose(page, "sign", "any")
    choose(page, "prompt", "all")
    choose(page, "size", "50% of the largest")
    assert 0 < len(ids(page)) < 12


def test_a_prompt_of_the_chart_shows_its_responses(open_page, report):
    page = open_page(report)
    page.get_by_role("button", name="Prompt 103").focus()
    page.keyboard.press("Enter")
    assert sorted(ids(page)) == [12, 13, 14, 15]
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_pages(open_page, report):
    page = open_page(report)
    choose(page, "sort", "order in the batch")
    next_button = page.get_by_role("button", name="Next").first
    assert page.get_by_role("button", name="Previous").first.is_disabled()
    next_button.click()
    assert ids(page) == list(range(12, 24))
    next_button.click()
    assert ids(page) == list(range(24, 28))
    assert page.locator("#shown").text_content() == "Responses 25 to 28 of 28"
    assert next_button.is_disabled()


def test_tokens_by_keyboard_and_by_pointer(open_page, report):
    page = open_page(report)
    choose(page, "sort", "order in the batch")
    tip = page.locator("#tip")
    assert tip.is_hidden()
    tokens = response(page, 0).locator("[data-k]")
    tokens.nth(0).focus()
    assert tip.is_visible()
    assert tip.text_content().endswith("index of sampled token0")
    for key, position in [("ArrowRight", 1), ("ArrowDown", 11), ("ArrowRight", 11), ("ArrowLeft", 10), ("Home", 0),
                          ("End", 11)]:  # fmt: skip
        page.keyboard.press(key)
        assert tip.text_content().endswith(f"index of sampled token{position}"), key
        assert page.evaluate("document.activeElement.dataset.k") == str(position)
        assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    tokens.nth(4).hover()
    assert tip.text_content().endswith("index of sampled token4")
    assert "nats/token" in tip.text_content()
    # one stop of the Tab key for each response
    assert page.locator('.response [tabindex="0"]').count() == 12


def test_the_skip_link_comes_first(open_page, report):
    page = open_page(report)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_every_control_has_a_name(open_page, report):
    page = open_page(report)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, select, a, summary, [role=region], figure')].filter((e) =>
            !(e.textContent.trim() || e.getAttribute('aria-label') || (e.labels && e.labels.length))).length"""
    )
    assert nameless == 0


def test_model_text_is_shown_literally(open_page, report):
    page = open_page(report)
    choose(page, "prompt", "100")
    shown = response(page, 3).locator("[data-k]").all_text_contents()
    assert shown[0] == NASTY
    assert shown[1] == " \"double\" 'single' `tick` &amp; ${x} {{ y }}"
    assert shown[2] == "👍🏽👩ZWJ👧"
    assert shown[3] == "abcRLOgnpPDF"
    assert shown[4] == "NUL"
    assert shown[5] == "</script>U+2028"
    assert response(page, 3).locator(".tokens .name").all_text_contents()[:4] == ["ZWJ", "RLO", "PDF", "NUL"]
    assert response(page, 3).locator(".source").text_content() == f"AskESC {NASTY}"
    assert NASTY in page.locator(".eyebrow").text_content()
    assert page.locator("#list script, #list img, .eyebrow script, pre script").count() == 0
    assert page.title() != "owned"
    page.locator("summary", has_text="Resolved configuration").click()
    assert page.locator("#settings pre").text_content() == f"checkpoint: {NASTY}\n"


def test_colours_follow_sign_and_term(open_page, report):
    page = open_page(report)

    def wrong(term: str) -> int:
        return page.evaluate(
            """(term) => [...document.querySelectorAll('#list [data-k]')].filter((e) => {
                const value = e.parentElement.response[term][e.dataset.k];
                return e.className && e.className.replace(/[0-9]/, '') !== (value > 0 ? 'up' : 'down');
            }).length""",
            term,
        )

    assert page.locator("#list [class^=up]").count() > 10
    assert page.locator("#list [class^=down]").count() > 10
    assert wrong("c") == 0
    choose(page, "colour", "covariance term (Cui et al. 2025)")
    assert wrong("v") == 0
    assert "nats" not in page.locator("#legend-low").text_content()
    # the sign shows without colour: a line below or above
    low, high = (
        page.locator(f"#legend .{name}6").evaluate("e => getComputedStyle(e).boxShadow") for name in ("down", "up")
    )
    assert "-3px" in low
    assert "-3px" not in high
    assert "3px" in high


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_mode_and_its_button(open_page, report, scheme):
    page = open_page(report, color_scheme=scheme)

    def brightness() -> int:
        return page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)[0]"
        )

    button = page.get_by_role("button", name="Dark")
    assert (brightness() < 60) == (scheme == "dark")
    assert button.get_attribute("aria-pressed") == str(scheme == "dark").lower()
    button.click()
    assert (brightness() < 60) == (scheme != "dark")
    assert button.get_attribute("aria-pressed") == str(scheme != "dark").lower()


@pytest.mark.parametrize(
    "width", [360, pytest.param(390, marks=pytest.mark.slow), pytest.param(768, marks=pytest.mark.slow)]
)
def test_nothing_sticks_out_on_a_phone(open_page, report, width):
    page = open_page(report, width=width, height=740)
    for details in page.locator("summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("window.scrollTo(50, 0)")
    assert page.evaluate("window.scrollX") == 0
    page.locator("#list [data-k]").nth(3).click()
    box = page.locator("#tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


def test_reduced_motion_is_respected(open_page, report):
    page = open_page(report, reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    animated = "[...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).animationName !== 'none').length"
    assert page.evaluate(animated) == 0


def test_conversations(open_page, tmp_path):
    """Prompts by what the user says; roles and special tokens in frames, which can be hidden; what is long folds."""
    question = "Why is the sky blue? " + "Think. " * 100
    rendered = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
    tables = write_tables(
        tmp_path, prompts=2, group=1, tokens=400, texts={(0, 0): "<|im_end|>"}, prompt_texts={0: rendered}
    )
    tables = replace(
        tables,
        markup=frozenset({"<|im_start|>", "<|im_end|>"}),
        prompts={**tables.prompts, "name": [question, None]},
    )
    path = tmp_path / "report.html"
    path.write_text(run_page(result_of(tables), tables=tables), encoding="utf-8")
    page = open_page(path)
    assert "Why is the sky blue?" in page.locator("#prompts .row", has_text="prompt 100").first.text_content()
    one = response(page, 0)
    assert one.locator("summary").all_text_contents()[0].startswith("Why is the sky blue? Think.")
    assert one.locator(".source").count() == 0
    one.get_by_text("Whole prompt").click()
    assert one.locator(".source").text_content().replace("↵", "") == rendered
    assert one.locator(".source .role").all_text_contents() == ["system", "user"]
    assert one.locator(".source .special").count() == 4
    token = one.locator(".tokens .special")
    assert token.text_content() == "<|im_end|>"
    assert one.locator(".tokens span[data-k]").count() == 300
    page.get_by_label("Roles and special tokens").uncheck()
    assert not token.is_visible()
    assert not one.locator(".source .role").first.is_visible()
    one.get_by_role("button", name="Show all 400 tokens").click()
    assert one.locator(".tokens span[data-k]").count() == 400
    assert response(page, 1).locator("summary").count() == 0


def test_text_stands_out_from_its_background(open_page, report):
    """WCAG 2's contrast of body text and of the strongest token colours, in both schemes."""
    for scheme in ("light", "dark"):
        page = open_page(report, color_scheme=scheme)
        ratios = page.evaluate(CONTRAST, [".lead", ".small", ".remedy", ".meaning", "#legend .up6", "#legend .down6"])
        assert min(ratios.values()) >= 4.5, (scheme, ratios)


CONTRAST = """(selectors) => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const paint = (...colours) => {
    canvas.clearRect(0, 0, 1, 1);
    colours.forEach((colour) => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); });
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((x) => x / 255)
      .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  };
  const luminance = ([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b;
  const page = getComputedStyle(document.body);
  return Object.fromEntries(selectors.map((selector) => {
    const element = document.querySelector(selector);
    const own = getComputedStyle(element);
    const ink = selector.startsWith('#legend') ? page.color : own.color;
    const [a, b] = [luminance(paint(ink)), luminance(paint(page.backgroundColor, own.backgroundColor))];
    return [selector, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  }));
}"""


def test_a_sweep(open_page, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(sweep_page({"": make_sweep()}, name="a/b"), encoding="utf-8")
    page = open_page(path, width=390)
    assert page.locator("#sweep tbody").first.locator("tr").count() == len(make_sweep().points)
    assert page.locator(".line-chart").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
