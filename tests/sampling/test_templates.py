"""How prompts become token ids: templates with everything that a record says, and text."""

from __future__ import annotations

import json

import pytest
from tokenizers import processors

from entropy_probe.sampling import Prompt, PromptSource, encode_prompts, load_prompts, prompt_notes

TEMPLATE = (
    "{% if tools %}T{{ tools | tojson }};{% endif %}"
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or [] %}{% set f = c['function'] %}!{{ f['name'] }}{{ f['arguments'] | tojson }}"
    "{% endfor %}"
    ";{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
PARTS = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}[{{ part['text'] }}]{% endfor %}{% endif %}{% endfor %}"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "1+1"}


def _text(tokenizer, prompt, template=TEMPLATE):
    tokenizer.chat_template = template
    (ids,) = encode_prompts(tokenizer, [prompt])
    return tokenizer.decode(ids)


def _rendered(tokenizer, tmp_path, record, **source):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(record))
    (prompt,) = load_prompts(PromptSource(jsonl=path, **source))
    return _text(tokenizer, prompt)


def test_messages_use_the_chat_template(tokenizer):
    with pytest.raises(ValueError, match="prompt 5: expected a tokenizer with a chat template"):
        encode_prompts(tokenizer, [Prompt(5, (USER,))])
    assert _text(tokenizer, Prompt(5, (USER,))) == "user:1+1;A:"


def test_tools_and_arguments_of_record_and_config(tokenizer, tmp_path):
    record = {"prompt": [USER]}
    assert _rendered(tokenizer, tmp_path, record, chat_template_kwargs={"enable_thinking": False}) == "user:1+1;<no>A:"
    own = record | {"chat_template_kwargs": {"enable_thinking": True}}
    assert _rendered(tokenizer, tmp_path, own, chat_template_kwargs={"enable_thinking": False}) == "user:1+1;A:"
    with_tools = _rendered(tokenizer, tmp_path, record, tools=[ADD])
    assert with_tools.startswith('T[{"')
    assert '"add"' in with_tools
    # as a column of JSON text; the record's come first, and a column can be left out of the prompt
    mul = json.dumps([ADD | {"function": {"name": "mul"}}])
    assert '"mul"' in _rendered(tokenizer, tmp_path, record | {"tools": mul}, tools=[ADD])
    assert _rendered(tokenizer, tmp_path, record | {"tools": mul}, ignore=["tools"]) == "user:1+1;A:"
    assert _rendered(tokenizer, tmp_path, record | {"tools": []}) == "user:1+1;A:"


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        (Prompt(3, (USER,), chat_template_kwargs={"enable_thinkin": False}), "3: .* that uses enable_thinkin, got one"),
        (Prompt(4, (USER,), tools=(ADD,)), "prompt 4: expected a chat template that uses tools, got one that never"),
    ],
)
def test_what_the_template_would_leave_out_is_refused(tokenizer, prompt, match):
    with pytest.raises(ValueError, match=match):
        _text(tokenizer, prompt, PARTS)


def test_tool_turns_and_null_content(tokenizer, tmp_path):
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "name": "add", "tool_call_id": "x", "content": "2", "tool_calls": None},
    ]
    assert _rendered(tokenizer, tmp_path, {"prompt": turns}) == 'user:1+1;assistant:!add{"a": 1};tool:2;A:'


TEXT_ONLY = "{% for m in messages %}<{{ m['content'] if m['content'] is string }}>{% endfor %}"
PARTS_ONLY = "{% for m in messages %}{% for part in m['content'] %}[{{ part['text'] }}]{% endfor %}{% endfor %}"
CONCATENATES = "{% for m in messages %}{{ 'u:' + m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "of_parts", "of_text"),
    [
        (TEMPLATE, "user:1+1;A:", "user:1+1;A:"),  # prints a list as it stands
        (PARTS, "[1+][1]", "1+1"),  # reads both
        (TEXT_ONLY, "<1+1>", "<1+1>"),  # leaves a list out
        (PARTS_ONLY, "[1+][1]", "[1+1]"),  # leaves text out
        (CONCATENATES, "u:1+1", "u:1+1"),  # fails on a list
    ],
)
def test_text_and_parts_as_the_template_reads_them(tokenizer, template, of_parts, of_text):
    parts = {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]}
    assert _text(tokenizer, Prompt(0, (parts,)), template) == of_parts
    assert _text(tokenizer, Prompt(0, (USER,)), template) == of_text


def test_a_template_that_leaves_the_question_out_is_refused(tokenizer):
    with pytest.raises(ValueError, match="prompt 6: expected a chat template that shows the last user message"):
        _text(tokenizer, Prompt(6, (USER,)), "{% for m in messages %}{{ m['role'] }}{% endfor %}")


def test_a_template_that_refuses_is_one_line(tokenizer):
    with pytest.raises(ValueError, match=r"prompt 2: .* got roles user and TemplateError: no system"):
        _text(tokenizer, Prompt(2, (USER,)), "{{ raise_exception('no system') }}")


@pytest.fixture
def with_bos(tokenizer):
    """The tokenizer with a BOS token, 'b', that it puts before text."""
    tokenizer.add_special_tokens({"bos_token": "b"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="b $A", special_tokens=[("b", bos)]
    )
    return tokenizer


def test_no_second_bos(with_bos):
    bos = with_bos.bos_token_id
    counts = [
        (Prompt(0, "01"), 1),
        (Prompt(1, "b01"), 1),  # rendered beforehand
        (Prompt(2, "b01", add_special_tokens=True), 2),
        (Prompt(3, "01", add_special_tokens=False), 0),
        (Prompt(4, ({"role": "user", "content": "01"},)), 1),
        (Prompt(5, "01b"), 2),
    ]
    with_bos.chat_template = "{{ bos_token }}" + PARTS
    prompts = [prompt for prompt, _ in counts]
    assert [ids.count(bos) for ids in encode_prompts(with_bos, prompts)] == [count for _, count in counts]
    (note,) = prompt_notes(with_bos, prompts)
    assert note.text.startswith("1 of 6 prompts are text that begins with the BOS token b")
    assert prompt_notes(with_bos, prompts[2:]) == ()


def test_a_prompt_that_ends_with_an_answer_is_noted(tokenizer):
    answered = Prompt(1, (USER, {"role": "assistant", "content": "1"}))
    (note,) = prompt_notes(tokenizer, [Prompt(0, (USER,)), answered, Prompt(2, "q")])
    assert note.text.startswith("1 of 3 prompts end with an assistant's turn")


def test_a_tokenizer_that_takes_responses_apart_is_noted_for_conversations(tokenizer):
    assert prompt_notes(tokenizer, [Prompt(0, (USER,))]) == ()
    tokenizer.response_schema = {"type": "object"}
    (note,) = prompt_notes(tokenizer, [Prompt(0, "q"), Prompt(1, (USER,))])
    assert "rewards get the whole text as content" in note.text
    assert prompt_notes(tokenizer, [Prompt(0, "q")]) == ()
