import unicodedata

import pytest

from entropy_probe.report.text import printable, visible_parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain <b> & \"q\" 'q' é 漢 👍🏽", ["plain <b> & \"q\" 'q' é 漢 👍🏽"]),
        ("", [""]),
        ("a\x00b", ["a", "NUL", "b"]),
        ("\x1b[2J\x7f", ["", "ESC", "[2J", "DEL", ""]),
        ("a\nb\tc", ["a", "↵", "\nb", "TAB", "\tc"]),
        ("x\u202ecba\u202c", ["x", "RLO", "cba", "PDF", ""]),
        ("a\u200b\u2066b", ["a", "ZWSP", "", "LRI", "b"]),
        ("👩\u200d👧", ["👩", "ZWJ", "👧"]),
        ("\u2028\U000e0041\ud800", ["", "U+2028", "", "U+E0041", "", "U+D800", ""]),
        ("\u3164❤\ufe0f", ["", "U+3164", "❤\ufe0f"]),
    ],
)
def test_what_does_not_show_gets_a_name(text, parts):
    assert visible_parts(text) == parts


@pytest.mark.unchecked
def test_no_control_or_format_character_is_left():
    everything = "".join(map(chr, range(0x110000)))
    plain = "".join(visible_parts(everything)[::2])
    left = {unicodedata.category(c) for c in plain} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert left == {"Cc"}
    assert {c for c in plain if unicodedata.category(c) == "Cc"} == {"\n", "\t"}
    assert set("aé漢👍❤") <= set(plain)


def test_printable_escapes_for_terminals():
    assert printable("a\x1b\u202eb") == "a\\x1b\\u202eb"
