"""The last user message of a prompt's text, for the templates that trl ships and two that set off turns in words."""

import re
from importlib.resources import files

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from entropy_probe.analyses.chat import UserTurn, markup_tokens, user_turn
from entropy_probe.demo.policy import build_tokenizer

MESSAGE = "What is 3 + 4?\nSay only <b>the</b> number."
IN_WORDS = {
    "vicuna": "{{ bos_token }}You are good. {% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}ASSISTANT:",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
}
SHIPPED = sorted(
    (file for file in files("trl").joinpath("chat_templates").iterdir() if file.name.endswith(".jinja")),
    key=lambda file: file.name,
)
SPECIAL = re.compile(
    r"<\|[^|\s<>]+\|>|<｜[^<>]+?｜>|<(?:start|end)_of_\w+>|<\|?turn\|?>|\[/?INST\]|</?tool_call>|</?think>"
)


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """Bytes, and what in the template looks like a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={character: k for k, character in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="</s>", pad_token="<pad>")
    made.add_tokens(sorted(set(SPECIAL.findall(template))), special_tokens=True)
    made.chat_template = template
    return made


def last_message(tokenizer, *turns: tuple[str, str], as_parts: bool = False) -> str | None:
    turn = user_turn(tokenizer)
    assert turn is not None
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text} for role, text in turns
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return turn.last_message(tokenizer.decode(ids))


@pytest.mark.parametrize("name", [*IN_WORDS, *(file.name for file in SHIPPED)])
def test_the_last_user_message_of_every_template(name):
    template = IN_WORDS.get(name) or files("trl").joinpath("chat_templates", name).read_text(encoding="utf-8")
    tokenizer = tokenizer_of(template)
    as_parts = re.search(r"idefics|llava|smolvlm", name) is not None  # read nothing but lists of parts
    for turns in ([], [("user", "First."), ("assistant", "Yes.")], [("user", "A"), ("assistant", "B")] * 2):
        assert last_message(tokenizer, *turns, ("user", MESSAGE), as_parts=as_parts) == MESSAGE, turns


@pytest.mark.parametrize("name", ["qwen2_5.jinja", "llama3.jinja", "phi3.jinja", "lfm2.jinja"])
def test_the_system_text_is_left_out(name):
    tokenizer = tokenizer_of(files("trl").joinpath("chat_templates", name).read_text(encoding="utf-8"))
    assert last_message(tokenizer, ("system", "You are the user's friend."), ("user", MESSAGE)) == MESSAGE


def test_results_of_tools_are_no_question():
    turn = UserTurn("<|im_start|>user\n", "<|im_end|>")
    text = f"<|im_start|>user\n{MESSAGE}<|im_end|>\n<|im_start|>assistant\n<tool_call>a()</tool_call><|im_end|>\n"
    result = "<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert turn.last_message(text + result) == MESSAGE
    assert turn.last_message(result) is None
    assert turn.last_message("4+7=") is None


def test_a_template_that_cannot_be_read_names_nothing():
    assert user_turn(None) is None
    tokenizer = build_tokenizer()
    assert user_turn(tokenizer) is None
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert user_turn(tokenizer) is None
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert user_turn(tokenizer) is None


def test_markup_is_special_and_added_tokens_but_no_white_space():
    tokenizer = tokenizer_of("<|im_start|><|im_end|>")
    tokenizer.add_tokens(["<tool_call>", "   ", "word"])
    assert {"<|im_start|>", "<|im_end|>", "<bos>", "</s>", "<pad>", "<tool_call>"} == set(markup_tokens(tokenizer))
