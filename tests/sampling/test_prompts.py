from __future__ import annotations

import codecs
import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from entropy_probe.sampling import Prompt, PromptSource, load_prompts


def _jsonl(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return path


def test_jsonl(tmp_path):
    path = _jsonl(tmp_path, {"prompt": "1+1=", "answer": "2"}, "", {"prompt": "é", "answer": 3}, {"prompt": "x"})
    assert load_prompts(PromptSource(jsonl=path)) == [Prompt(0, "1+1=", "2"), Prompt(1, "é", "3"), Prompt(2, "x")]


@pytest.mark.parametrize("text", ['{"prompt": "é"}\n{"prompt": "x"}', '[{"prompt": "é"},\n {"prompt": "x"}]'])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, text):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    assert load_prompts(PromptSource(jsonl=path)) == [Prompt(0, "é"), Prompt(1, "x")]


def test_fields_limit_and_messages(tmp_path):
    chat = [{"role": "system", "content": "add"}, {"role": "user", "content": "1+1"}]
    path = _jsonl(tmp_path, {"q": chat, "a": "2"}, {"q": "later"}, "not read")
    prompts = load_prompts(PromptSource(jsonl=path, prompt_field="q", limit=2))
    assert prompts == [Prompt(0, tuple(chat)), Prompt(1, "later")]
    prompts = load_prompts(PromptSource(jsonl=path, prompt_field="q", answer_field="a", limit=1))
    assert prompts[0].answer == "2"


@pytest.mark.parametrize(
    ("lines", "fields", "match"),
    [
        ([{"prompt": "a"}, "{oops"], {}, r"prompts\.jsonl:2: expected one JSON object per line, got invalid JSON"),
        (["7"], {}, r"prompts\.jsonl:1: expected an object with field 'prompt', got int"),
        (["[1, 2]"], {}, r"prompts\.jsonl, record 0: expected an object with field 'prompt', got int"),
        (["[{", "}, 2"], {}, r"prompts\.jsonl: expected an array of JSON objects, got invalid JSON"),
        ([{"prompt": "a"}, "", {"x": "b"}], {}, r"jsonl:3: expected field 'prompt', got fields x"),
        ([{"prompt": "a"}, {"prompt": None}], {}, r"jsonl:2: expected field 'prompt', got null; drop the record"),
        ([{"prompt": "a"}], {"answer_field": "gold"}, r"jsonl:1: expected field 'gold', got fields prompt"),
        ([{"prompt": ""}], {}, r"jsonl:1: expected a prompt, got empty text"),
        ([{"prompt": 7}], {}, r"jsonl:1: expected text or a list of messages, got int 7"),
        ([{"prompt": []}], {}, r"jsonl:1: expected text or a list of messages, got list"),
        ([{"prompt": [{"role": "user"}]}], {}, r"jsonl:1: expected messages with text fields 'role' and 'content'"),
        ([], {}, r"prompts\.jsonl: expected at least one prompt, got none"),
    ],
)
def test_bad_jsonl(tmp_path, lines, fields, match):
    with pytest.raises(ValueError, match=match) as raised:
        load_prompts(PromptSource(jsonl=_jsonl(tmp_path, *lines), **fields))
    assert "\n" not in str(raised.value)


def test_missing_jsonl(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: expected a JSONL file of prompts, found no such file"):
        load_prompts(PromptSource(jsonl=tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "exactly one of jsonl, parquet, dataset, callable, reasoning_gym, got none"),
        ({"jsonl": "a", "callable": "b:c"}, "got jsonl and callable"),
        ({"jsonl": "a", "split": "train"}, "split: expected only with dataset, got it with jsonl"),
        ({"dataset": "some/other"}, "expected prompt_field and split, which are known only for gsm8k, math, MATH"),
        ({"jsonl": "a", "limit": 0}, "greater than 0"),
        ({"jsonl": "a", "fields": "b"}, "Extra inputs"),
    ],
)
def test_bad_sources(fields, match):
    with pytest.raises(ValidationError, match=match):
        PromptSource(**fields)


@pytest.mark.parametrize(
    ("name", "called_with", "record"),
    [
        ("gsm8k", ("openai/gsm8k", "main", "train"), {"question": "q", "answer": "a"}),
        ("MATH", ("DigitalLearningGmbH/MATH-lighteval", "default", "train"), {"problem": "q", "solution": "a"}),
        ("math", ("DigitalLearningGmbH/MATH-lighteval", "default", "train"), {"problem": "q", "solution": "a"}),
    ],
)
def test_known_datasets(monkeypatch, name, called_with, record):
    datasets = pytest.importorskip("datasets")

    def load_dataset(path, config, *, split, trust_remote_code):
        assert (path, config, split, trust_remote_code) == (*called_with, False)
        return [record]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_prompts(PromptSource(dataset=name)) == [Prompt(0, "q", "a")]


@pytest.fixture
def local_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "sums"
    directory.mkdir()
    rows = [json.dumps({"q": f"{i}+1", "a": str(i + 1)}) for i in range(4)]
    (directory / "train.jsonl").write_text("\n".join(rows))
    return str(directory)


def test_local_dataset(local_dataset):
    source = PromptSource(dataset=local_dataset, split="train", prompt_field="q", answer_field="a", limit=2)
    assert load_prompts(source) == [Prompt(0, "0+1", "1"), Prompt(1, "1+1", "2")]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"split": "test"}, "cannot load .*split test"),
        ({"config": "other"}, "cannot load .*config other"),
        ({"prompt_field": "question"}, "record 0: expected field 'question', got fields q, a"),
    ],
)
def test_bad_datasets(local_dataset, fields, match):
    source = PromptSource(**({"dataset": local_dataset, "split": "train", "prompt_field": "q"} | fields))
    with pytest.raises(ValueError, match=match) as raised:
        load_prompts(source)
    assert "\n" not in str(raised.value)


def test_unreadable_dataset(local_dataset, tmp_path):
    (tmp_path / "sums" / "train.jsonl").write_text('{"q": "1"}\n{"q": [')
    with pytest.raises(ValueError, match="cannot load") as raised:
        load_prompts(PromptSource(dataset=local_dataset, split="train", prompt_field="q"))
    assert "\n" not in str(raised.value)


def test_datasets_library_is_named_when_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'entropy-probe\[datasets\]'"):
        load_prompts(PromptSource(dataset="gsm8k"))


def test_callable(monkeypatch):
    module = types.ModuleType("my_prompts")
    module.records = lambda: ({"prompt": str(i), "answer": str(i)} for i in range(3))
    module.text = lambda: "one prompt"
    module.numbers = lambda: [1]
    monkeypatch.setitem(sys.modules, "my_prompts", module)
    prompts = load_prompts(PromptSource(callable="my_prompts:records", limit=2))
    assert prompts == [Prompt(0, "0", "0"), Prompt(1, "1", "1")]
    with pytest.raises(ValueError, match="callable my_prompts:text: expected an iterable of mappings, got str"):
        load_prompts(PromptSource(callable="my_prompts:text"))
    with pytest.raises(ValueError, match="callable my_prompts:numbers, record 0: expected an object"):
        load_prompts(PromptSource(callable="my_prompts:numbers"))
    with pytest.raises(ValueError, match=r"prompts\.callable: expected a function 'nothing'"):
        load_prompts(PromptSource(callable="my_prompts:nothing"))


VERL = {
    "data_source": "some/math",
    "prompt": [{"role": "user", "content": "1+1"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": 2},
    "extra_info": {"index": 0, "answer": "so it is 2"},
}


def _parquet(tmp_path, *rows):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def test_parquet_of_verl(tmp_path):
    second = VERL | {"reward_model": {"style": "rule", "ground_truth": 3}, "extra_info": {"index": 1, "answer": "3!"}}
    path = _parquet(tmp_path, VERL, second)
    first, other = load_prompts(PromptSource(parquet=path))
    assert (first.prompt, first.answer, other.answer) == (({"role": "user", "content": "1+1"},), "2", "3")
    assert first.columns == VERL
    (named,) = load_prompts(PromptSource(parquet=path, answer_field="extra_info.answer", limit=1))
    assert named.answer == "so it is 2"
    with pytest.raises(
        ValueError, match=r"train\.parquet, row 0: expected field 'extra_info\.gold', got fields data_source"
    ):
        load_prompts(PromptSource(parquet=path, answer_field="extra_info.gold"))


def test_bad_parquet(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.parquet: expected a Parquet file of prompts, found no such file"):
        load_prompts(PromptSource(parquet=tmp_path / "nowhere.parquet"))
    with pytest.raises(ValueError, match=r"prompts\.jsonl: expected a Parquet file of prompts, cannot read it: "):
        load_prompts(PromptSource(parquet=_jsonl(tmp_path, {"prompt": "a"})))


def test_nulls_that_parquet_fills_in_are_left_out(tmp_path):
    """Columns of one type give every message, call and tool the fields of all others."""
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    other = {"function": {"name": "neg", "arguments": {"b": 2}}}
    turns = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call, other]},
        {"role": "tool", "content": "3", "name": "add"},
    ]
    tools = [{"name": "add"}, {"name": "neg", "strict": True}]
    (prompt,) = load_prompts(PromptSource(parquet=_parquet(tmp_path, {"prompt": turns, "tools": tools})))
    assert list(prompt.prompt) == [turns[0], {"role": "assistant", "tool_calls": [call, other]}, turns[2]]
    assert list(prompt.tools) == tools


def test_an_array_in_a_json_file(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": "a"}, {"prompt": "b", "answer": [1, 2]}], indent=1))
    assert load_prompts(PromptSource(jsonl=path)) == [Prompt(0, "a"), Prompt(1, "b", [1, 2])]


@pytest.mark.parametrize(
    ("record", "fields", "expected"),
    [
        ({}, {"chat": True}, [("user", "q")]),
        ({}, {"system": "add"}, [("system", "add"), ("user", "q")]),
        ({"system": "mul"}, {"system_field": "system"}, [("system", "mul"), ("user", "q")]),
        ({"s": {"t": "mul"}}, {"system_field": "s.t"}, [("system", "mul"), ("user", "q")]),
        ({"system": None}, {"system_field": "system"}, [("user", "q")]),
        ({"system": "mul"}, {"ignore": ["system"], "chat": True}, [("user", "q")]),
    ],
)
def test_system_messages(tmp_path, record, fields, expected):
    (prompt,) = load_prompts(PromptSource(jsonl=_jsonl(tmp_path, {"prompt": "q"} | record), **fields))
    assert [(m["role"], m["content"]) for m in prompt.prompt] == expected


@pytest.mark.parametrize(
    ("record", "fields", "match"),
    [
        ({"images": ["x.png"]}, {}, r"jsonl:1: expected a prompt of text alone, got a field 'images'; .* \[images\]"),
        ({"system_prompt": "add"}, {}, "got a field 'system_prompt', which changes the prompt.*system_field to"),
        ({"tools": [{"name": "f"}]}, {}, r"expected messages, which tools and .* got text; set prompts\.chat: true"),
        ({"chat_template_kwargs": {"x": 1}}, {}, "expected messages, which tools and"),
        ({"tools": "a hammer"}, {}, "expected tools as a list of JSON schemas, got 'a hammer'"),
        ({"chat_template_kwargs": [1]}, {}, "expected chat_template_kwargs as a mapping, got "),
        (
            {"chat_template_kwargs": {"tokenize": False}},
            {"chat": True},
            "jsonl:1: chat_template_kwargs: .* got tokenize",
        ),
        ({}, {"ignore": ["images"]}, r"prompts\.ignore: expected fields of the records, got images"),
        ({"s": 1}, {"system_field": "s"}, "expected text in field 's', got int"),
        ({"prompt": [{"role": "system", "content": "a"}]}, {"system": "b"}, "without a system message.* got both"),
        ({"prompt": [{"from": "human", "value": "a"}]}, {}, "expected messages with text fields 'role' and 'content'"),
        ({"prompt": [{"role": "user", "content": None}]}, {}, "content may be null beside tool_calls"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            {},
            "expected content as text or a list of text parts",
        ),
    ],
)
def test_what_would_change_the_prompt_is_used_or_refused(tmp_path, record, fields, match):
    with pytest.raises(ValueError, match=match) as raised:
        load_prompts(PromptSource(jsonl=_jsonl(tmp_path, {"prompt": "q"} | record), **fields))
    assert "\n" not in str(raised.value)


def test_settings_that_exclude_each_other():
    with pytest.raises(ValidationError, match="expected one of system and system_field, got both"):
        PromptSource(jsonl="a", system="b", system_field="c")
    with pytest.raises(ValidationError, match="got add_generation_prompt; leave them out"):
        PromptSource(jsonl="a", chat_template_kwargs={"add_generation_prompt": False})


def test_a_callable_that_fails_is_one_line(monkeypatch):
    def records():
        yield {"prompt": "a"}
        raise RuntimeError("no network")

    module = types.ModuleType("my_prompts")
    module.records, module.nothing = records, lambda: 1 / 0
    monkeypatch.setitem(sys.modules, "my_prompts", module)
    with pytest.raises(ValueError, match=r"my_prompts:records: raised RuntimeError: no network \(test_prompts"):
        load_prompts(PromptSource(callable="my_prompts:records"))
    with pytest.raises(ValueError, match="callable my_prompts:nothing: raised ZeroDivisionError"):
        load_prompts(PromptSource(callable="my_prompts:nothing"))
