"""Reward functions are called as the trainers that they were written for call them."""

from __future__ import annotations

import functools
import json
import sys
import types
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from entropy_probe.sampling import (
    Prompt,
    PromptSource,
    Rewards,
    load_prompts,
    load_reward,
    load_rewards,
    score_responses,
)

CHAT = ({"role": "user", "content": "1+1"},)
PROMPTS = [
    Prompt(7, "q", "2", {"prompt": "q", "answer": 2, "solution": "two"}),
    Prompt(8, "r", "3", {"prompt": "r", "answer": 3, "level": "hard"}),
]


def score(reward, prompts=PROMPTS, responses=("2", "x"), **more):
    return score_responses(reward, prompts, responses, **more).tolist()


@pytest.fixture
def my(monkeypatch):
    """A module of rewards, by the name ``my``."""
    module = types.ModuleType("my")
    monkeypatch.setitem(sys.modules, "my", module)
    return module


def trl(completions, answer, **kwargs):
    return [float(c == str(a)) for c, a in zip(completions, answer, strict=True)]


def in_order(completions, prompts, /, *, solution):
    assert (prompts, solution) == (["q", "r"], ["two", None])
    return [float(c == "2") for c in completions]


def with_default(completions, tolerance=0.5, level=None):
    assert (tolerance, level) == (0.5, [None, "hard"])
    return [float(c == "2") for c in completions]


def from_kwargs(prompts, **kwargs):
    assert set(kwargs) == {"completions", "completion_ids", "answer", "solution", "level", "log_extra", "log_metric"}
    kwargs["log_extra"]("answer", kwargs["answer"])
    kwargs["log_metric"]("mean", 0.5)
    assert kwargs["answer"] == [2, 3]
    return [float(c == "2") for c in kwargs["completions"]]


def ids(completion_ids):
    return [float(i == [4, 1]) for i in completion_ids]


def own(prompts, responses):
    return [float(p.answer == r) for p, r in zip(prompts, responses, strict=True)]


def own_with_column(responses, level):
    return [float(lv is None) for lv in level]


def verl(data_source, solution_str, ground_truth, extra_info=None):
    assert (data_source, extra_info) == (None, {})
    return float(solution_str == ground_truth)


def verl_short(solution_str, ground_truth, method="strict"):
    return {"score": np.float32(solution_str == ground_truth and method == "strict"), "acc": True}


def verl_batch(data_sources, solution_strs, ground_truths, extra_infos, **kwargs):
    assert not kwargs
    return [{"score": float(s == g)} for s, g in zip(solution_strs, ground_truths, strict=True)]


async def later(completions, **kwargs):
    return [float(c == "2") for c in completions]


async def verl_later(solution_str, ground_truth):
    return float(solution_str == ground_truth)


class Callable_:
    def __call__(self, completions, **kwargs):
        return tuple(c == "2" for c in completions)

    def method(self, completions):
        return (Decimal(c == "2") for c in completions)


def passes_on(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def narrows(function):
    @functools.wraps(function)
    def wrapper(prompts, completions):
        return function(completions, ["2", "2"])

    return wrapper


def hides(function):
    return lambda *args, **kwargs: function(*args, **kwargs)


FUNCTIONS = {
    "TRL": trl,
    "positional and keyword only": in_order,
    "defaults": with_default,
    "kwargs": from_kwargs,
    "ids": ids,
    "own": own,
    "own with a column": own_with_column,
    "verl": verl,
    "verl short": verl_short,
    "verl batch": verl_batch,
    "async": later,
    "verl async": verl_later,
    "instance": Callable_(),
    "method": Callable_().method,
    "partial": functools.partial(lambda wanted, completions: [float(c == wanted) for c in completions], "2"),
    "partial keyword": functools.partial(lambda completions, wanted: [c == wanted for c in completions], wanted="2"),
    "passes on": passes_on(in_order),
    "narrows": narrows(trl),
    "hides": hides(trl),
    "lambda": lambda completions: torch.tensor([float(c == "2") for c in completions], requires_grad=True),
    "numpy": lambda completions: np.array([c == "2" for c in completions]),
    "tensors": lambda completions: [torch.tensor(float(c == "2")) for c in completions],
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_kind_of_function_is_called_as_it_expects(function):
    assert score(function, token_ids=[(4, 1), (5, 1)]) == [1.0, 0.0]


def test_conversations_get_conversations():
    seen = {}

    def reward(prompts, completions, **kwargs):
        seen["prompts"] = [json.loads(json.dumps(p)) for p in prompts]
        seen["completions"] = [json.loads(json.dumps(c)) for c in completions]
        prompts[0][0]["content"] = "changed"
        return [float(len(c[0]["content"])) for c in completions]

    prompts = [Prompt(0, CHAT), Prompt(1, CHAT)]
    assert score(reward, prompts, ("a", "bcd")) == [1.0, 3.0]
    assert seen["prompts"] == [list(CHAT)] * 2
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in ("a", "bcd")]
    assert score(reward, prompts, ("a", "bcd")) == [1.0, 3.0]
    assert seen["prompts"][0][0]["content"] == "1+1"  # what a function changes is its own


def test_a_field_given_as_the_answer_is_a_column_of_that_name_too(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "q", "gold": 5}\n{"prompt": "r", "gold": 6}')
    prompts = load_prompts(PromptSource(jsonl=path, answer_field="gold"))
    given = {}
    assert score(lambda completions, **kwargs: given.update(kwargs) or [0.0, 1.0], prompts) == [0.0, 1.0]
    assert (given["gold"], given["answer"]) == ([5, 6], ["5", "6"])


def test_verl_layout_and_what_it_passes():
    record = {"data_source": "d", "reward_model": {"ground_truth": ["2", "two"]}, "extra_info": {"index": 4}}
    prompts = [Prompt(0, "q", "other", record)]

    def compute_score(data_source, solution_str, ground_truth, extra_info):
        assert (data_source, extra_info) == ("d", {"index": 4})
        return solution_str in ground_truth

    assert score(compute_score, prompts, ("two",)) == [1.0]


def test_trainer_state():
    def reward(completions, trainer_state):
        return [trainer_state.global_step * len(c) for c in completions]

    single = Rewards.of(reward)
    with pytest.raises(ValueError, match=r"reward reward: .* got trainer_state; available are answer, solution"):
        single.check(PROMPTS)
    state = SimpleNamespace(global_step=20)
    assert score(Rewards(single.functions, (0.5,), state), responses=("a", "bc")) == [10.0, 20.0]


def test_several_rewards_are_summed_with_weights_over_those_that_apply(my):
    my.first = lambda completions: [1.0, None, 3.0]
    my.second = lambda solution_str: None if solution_str == "c" else 10.0
    three = [Prompt(i, "q") for i in range(3)]
    assert score(load_rewards(["my:first", "my:second"]), three, ("a", "b", "c")) == [11.0, 10.0, 3.0]
    weighted = load_rewards(["my:first", "my:second"], [2.0, -0.5])
    assert score(weighted, three, ("a", "b", "c")) == [-3.0, -5.0, 6.0]
    my.second = lambda responses: [None] * 3
    with pytest.raises(ValueError, match=r"reward my:first and my:second: .* got None for 'b' to prompt 1"):
        score(load_rewards(["my:first", "my:second"]), three, ("a", "b", "c"))
    with pytest.raises(ValueError, match="reward_weights: expected one for each of 2 rewards, got 1"):
        load_rewards(["my:first", "my:second"], [1.0])


def test_sums_do_not_make_equal_rewards_differ():
    parts = [0.1, 0.2, 0.3, 0.7]
    functions = [lambda responses, x=x: [x] * len(responses) for x in parts]
    one = Rewards.of(functions[0]).functions
    several = Rewards(tuple(f for g in functions for f in Rewards.of(g).functions), (1.0,) * 4)
    assert len(one) == 1
    assert score(several) == [np.float32(1.3)] * 2


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda p, r: [], r"expected a parameter named completions \(TRL.* got \(p, r\); rename the parameters"),
        (lambda prompts: [], r"got \(prompts\); rename"),
        (lambda *args: [], r"got \(\); rename"),
        (lambda completions, test_cases: [], "got test_cases; available are answer, solution, level, prompts, compl"),
        (lambda solution_str, reference: 0.0, "got reference; available are data_source, solution_str, ground_truth"),
        (Callable_, "got the class Callable_; name a function or an instance"),
        (torch.nn.Linear(1, 1), "expected a function, got a model"),
        (len, r"expected a parameter named .* got \(obj\)"),
        (max, "expected a function with a signature, got none"),
    ],
)
def test_a_signature_that_fits_none_is_refused_before_it_is_called(function, match):
    with pytest.raises(ValueError, match=match) as raised:
        Rewards.of(function).check(PROMPTS)
    assert "\n" not in str(raised.value)


def test_verl_needs_a_ground_truth_for_every_prompt():
    with pytest.raises(ValueError, match=r"expected reward_model\.ground_truth or a reference answer for prompt 9"):
        Rewards.of(verl).check([*PROMPTS, Prompt(9, "q")])
    Rewards.of(lambda solution_str: 0.0).check([Prompt(9, "q")])


def test_built_in_rewards_ask_for_answers_before_sampling():
    with pytest.raises(ValueError, match="expected a reference answer for prompt 9, got none; set answer_field"):
        load_rewards("exact_match").check([*PROMPTS, Prompt(9, "q")])
    with pytest.raises(ValueError, match="reward gsm8k: expected a number in the answer of prompt 9, got 'two'"):
        load_rewards("gsm8k").check([*PROMPTS, Prompt(9, "q", "two")])
    with pytest.raises(ValueError, match=r"answer of prompt 9 as text or a number, got list \['a'\]"):
        load_rewards("gsm8k").check([*PROMPTS, Prompt(9, "q", ["a"])])


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (
            lambda completions, **kwargs: kwargs["test_cases"],
            r"as text.*raised KeyError: 'test_cases' \(test_reward",
        ),
        (lambda completions: [c[0]["content"] for c in completions], "raised TypeError: string indices must be"),
        (lambda solution_str: 1 / 0, "called with solution_str: raised ZeroDivisionError: division by zero"),
        (lambda completions: (1 / 0 for c in completions), "raised ZeroDivisionError"),
        (lambda solution_str: {"acc": 1.0}, "expected a number, or a mapping with 'score',.* got {'acc': 1.0}"),
        (lambda completions: [{"score": 1.0}] * 2, "expected a number for a response to prompt 7, got {'score': 1.0}"),
        (lambda completions: {1.0, 0.0}, "got set"),
        (lambda completions: [[1.0], [0.0]], r"got \[1.0\]; return numbers"),
        (lambda completions: [1e300, 0.0], r"expected a finite number .* prompt 7, got 1e\+300; return.* scale down"),
        (lambda completions: [0.0, 10**400], "prompt 8, got 10000"),
        (lambda completions: [0.0, Decimal("nan")], "prompt 8, got NaN"),
        (lambda completions: sys.exit(0), r"raised SystemExit: 0 \(test_reward_calls.py"),
    ],
)
def test_an_error_inside_is_one_line_with_the_function_and_the_place(function, match):
    with pytest.raises(ValueError, match=match):
        score(function)


def test_weights_do_not_carry_a_sum_beyond_float32(my):
    my.large = lambda completions: [1e38, 2.0]
    with pytest.raises(ValueError, match=r"expected sums .* float32 holds, got 1e\+41; scale the weights down"):
        score(load_rewards("my:large", [1e3]))


def test_a_function_may_change_what_it_is_given():
    """Each response of a prompt, each function and each call has nested columns of its own, as with TRL's data sets."""
    record = {"prompt": "q", "info": {"tests": [1, 2, 3]}, "extra_info": {"tests": [1, 2, 3]}}
    prompt = Prompt(0, ({"role": "user", "content": [{"type": "text", "text": "q"}]},), ["a"], record)

    def taking(prompts, completions, answer, info):
        return [
            float(len(p[0]["content"]) + len(p[0]["content"].pop()) + len(i["tests"]) + i["tests"].pop() + len(a.pop()))
            for p, i, a in zip(prompts, info, answer, strict=True)
        ]

    def compute_score(solution_str, ground_truth, extra_info):
        return float(len(extra_info["tests"]) + extra_info["tests"].pop() + len(ground_truth.pop()))

    for function, expected in ((taking, 10.0), (compute_score, 7.0)):
        twice = Rewards(Rewards.of(function).functions * 2, (1.0, 1.0))
        assert [score(twice, [prompt] * 2) for _ in range(2)] == [[2 * expected] * 2] * 2
    assert record["info"]["tests"] == record["extra_info"]["tests"] == [1, 2, 3]


def test_extra_info_is_passed_as_it_stands():
    for given, expected in (('{"a": 1}', '{"a": 1}'), ([1], [1]), (None, {}), ({"a": (1,)}, {"a": [1]})):

        def compute_score(solution_str, extra_info, expected=expected):
            return float(extra_info == expected)

        assert score(compute_score, [Prompt(0, "q", "2", {"extra_info": given})] * 2) == [1.0, 1.0]


def test_cached_functions_are_called_by_their_own_names():
    @functools.cache
    def compute_score(solution_str, ground_truth):
        return float(solution_str == ground_truth)

    assert score(compute_score) == [1.0, 0.0]


def test_what_a_reward_switches_in_torch_is_put_back(tmp_path, monkeypatch):
    source = "import torch\ndef switch(completions=()):\n    torch.set_grad_enabled(False)\n"
    source += "    torch.set_default_dtype(torch.float64)\n    return [0.0] * len(completions)\nswitch()\n"
    (tmp_path / "switching.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert score(load_reward("switching:switch")) == [0.0, 0.0]
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_an_interrupt_is_no_error_of_the_reward():
    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted)


def test_loading_what_is_no_reward(my, tmp_path, monkeypatch):
    my.Group = type("Group", (), {"f": staticmethod(trl)})
    assert load_reward("my:Group.f") is trl
    (tmp_path / "bad_syntax.py").write_text("def f(:\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "bad_import.py").write_text("\nraise RuntimeError('no key')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, match in {
        f"{tmp_path}/my.py:f": f"got the file .*; set PYTHONPATH={tmp_path} and write my:f",
        "bad_syntax:f": "cannot import 'bad_syntax:f': SyntaxError: invalid syntax",
        "bad_import:f": r"cannot import 'bad_import:f': RuntimeError: no key \(bad_import.py:2\)",
        "script:f": r"cannot import 'script:f': SystemExit: 3 \(script.py:2\)",
        ".my:f": "expected package.module:function, got '.my:f'",
        "my:Group.g": "expected a function 'Group.g' in module my, got None",
    }.items():
        with pytest.raises(ValueError, match=match):
            load_reward(name)
