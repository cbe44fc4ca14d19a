from __future__ import annotations

import pytest

from entropy_probe.cli.yaml_settings import apply_overrides, dump_yaml, load_yaml


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8e-7", 8e-7),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("3", 3),
        ("null", None),
        ("", None),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("'8e-7'", "8e-7"),
        ("2026-11-20", "2026-11-20"),
        ("[1, 2e-3]", [1, 2e-3]),
        ("e7", "e7"),
        ("-", None),
    ],
)
def test_scalars_mean_what_they_look_like(tmp_path, text, value):
    if text == "-":
        assert load_yaml(write(tmp_path / "a.yaml", "a:\n  -"))["a"] == [None]
        return
    loaded = load_yaml(write(tmp_path / "a.yaml", f"a: {text}"))["a"]
    assert loaded == value
    assert type(loaded) is type(value)


def test_what_is_dumped_reads_back_the_same(tmp_path):
    settings = {
        "rate": 8e-7,
        "text": ["8e-7", "no", "null", "1", "0x1f", "a: b", "δ", "", " x", "2026-11-20"],
        "none": None,
        "nested": {"off": False, "n": 3, "big": 1e300},
    }
    assert load_yaml(write(tmp_path / "a.yaml", dump_yaml(settings))) == settings


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: 1\nb: {c: 1, c: 2}", r"a\.yaml, line 2: not valid YAML: duplicate key 'c'$"),
        ("a: 1\na: 1", r"line 2: .*duplicate key 'a'"),
        ("a: [1", r"a\.yaml, line 1: not valid YAML"),
        ("a: !!python/object:os.system x", "not valid YAML: could not determine a constructor"),
        ("[1, 2]", "expected `key: value` settings, got list"),
        ("", "expected `key: value` settings, got NoneType"),
        ("? [1]\n: 2", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_bad_files_give_one_line(tmp_path, text, match):
    with pytest.raises(ValueError, match=match) as caught:
        load_yaml(write(tmp_path / "a.yaml", text))
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"b\.yaml: expected a YAML file, found no such file"):
        load_yaml(tmp_path / "b.yaml")
    with pytest.raises(ValueError, match="found a directory"):
        load_yaml(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="cannot be read as text"):
        load_yaml(tmp_path / "c.yaml")


def test_overrides_replace_single_values_in_order_and_leave_the_original():
    settings = {"a": {"b": 1, "c": 2}, "d": None}
    changed = apply_overrides(settings, ["a.b=8e-7", "d.e.f=null", "g=[1, x]", "a.b=5", "h=k=v"])
    assert changed == {"a": {"b": 5, "c": 2}, "d": {"e": {"f": None}}, "g": [1, "x"], "h": "k=v"}
    assert settings == {"a": {"b": 1, "c": 2}, "d": None}


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("a", "expected an override key=value"),
        ("=1", "expected an override key=value"),
        ("a..b=1", "expected an override key=value"),
        ("x.y.z=1", r"x\.y\.z=1: x holds 3, which has no keys inside"),
        ("a=[", r"a=\[, line 1: not valid YAML"),
    ],
)
def test_bad_overrides_are_refused(override, match):
    with pytest.raises(ValueError, match=match):
        apply_overrides({"x": 3}, [override])
