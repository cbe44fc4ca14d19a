from __future__ import annotations

import sys
import threading
import types

import pytest
import torch

from entropy_probe.sampling import Prompt, load_reward, score_responses


def _one(name, answer, response):
    (score,) = load_reward(name)([Prompt(0, "q", answer)], [response])
    return score


@pytest.mark.parametrize(("answer", "response", "score"), [("42", " 42\n", 1.0), ("42", "42.", 0.0)])
def test_exact_match(answer, response, score):
    assert _one("exact_match", answer, response) == score


GSM8K_RIGHT = [
    ("5 * 4 = <<5*4=20>>20\n#### 20", "so it is 20"),
    ("#### 1200", "#### $1,200.00"),
    ("#### 1,200", "1200"),
    ("#### -3", "The answer is −3."),
    ("18", "She makes 9 * 2 = $18 every day."),
    ("5", "20-15 = 10-5"),
    ("3", "#### 3 apples, not 4"),
    ("3", "1,2,3"),
    ("0.5", ".5"),
    ("-7", "-$7"),
    ("1234567", "1,234,567"),
]


@pytest.mark.parametrize(("answer", "response"), GSM8K_RIGHT)
def test_gsm8k_right(answer, response):
    assert _one("gsm8k", answer, response) == 1.0


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("#### 20", "20 then 21"),
        ("#### 20", ""),
        ("#### 20", "20 #### forty"),
        ("#### 20", "#### 200"),
        ("#### 3", "-3"),
        ("#### 12", "1,2"),
    ],
)
def test_gsm8k_wrong(answer, response):
    assert _one("gsm8k", answer, response) == 0.0


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        (r"so we get \boxed{\frac{1}{2}}.", r"The answer is \boxed{0.5}", 1.0),
        (r"\frac12", r"$\frac{1}{2}$", 1.0),
        ("$x^2+1$", "$1 + x^2$", 1.0),
        ("(1,2)", r"\boxed{(1, 2)}", 1.0),
        (r"\boxed{3}", r"\boxed{4}", 0.0),
        (r"\boxed{3}", "", 0.0),
    ],
)
def test_math(answer, response, score):
    pytest.importorskip("math_verify")
    assert _one("math", answer, response) == score


def test_math_works_outside_the_main_thread():
    pytest.importorskip("math_verify")
    scores = []
    thread = threading.Thread(target=lambda: scores.append(_one("math", "3", r"\boxed{3}")))
    thread.start()
    thread.join()
    assert scores == [1.0]


def test_math_refuses_an_answer_that_cannot_be_parsed():
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match="expected a LaTeX answer for prompt 0"):
        _one("math", "", "3")


def test_math_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"pip install 'entropy-probe\[math\]'"):
        load_reward("math")


def test_gsm8k_refuses_an_answer_without_number():
    with pytest.raises(ValueError, match="expected a number in the answer of prompt 0, got 'none'"):
        _one("gsm8k", "none", "3")


@pytest.mark.parametrize("name", ["exact_match", "gsm8k"])
def test_missing_answer(name):
    with pytest.raises(ValueError, match="expected a reference answer for prompt 0, got none; set answer_field"):
        _one(name, None, "3")


def test_function_by_path(monkeypatch):
    module = types.ModuleType("my_rewards")
    module.length = lambda prompts, responses: [float(len(r)) for r in responses]
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    scores = score_responses(load_reward("my_rewards:length"), [Prompt(0, "q"), Prompt(1, "q")], ["a", "bcd"])
    assert scores.tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("accuracy", "expected exact_match, gsm8k, math, reasoning_gym or package.module:function, got 'accuracy'"),
        ("no_such_module_here:f", "cannot import 'no_such_module_here:f'"),
        ("math:no_such_function", "expected a function 'no_such_function' in module math, got None"),
        ("math:pi", "expected a function 'pi' in module math, got an object of type float"),
        (":f", "expected package.module:function, got ':f'"),
    ],
)
def test_unknown_rewards(name, match):
    with pytest.raises(ValueError, match=match):
        load_reward(name)


@pytest.mark.parametrize(
    ("output", "match"),
    [
        ([1.0], "expected a list of 2 numbers, one per response, got 1 of them"),
        (torch.ones(2, 1), r"expected a number for a response to prompt 7, got \[1.0\]"),
        ([0.0, float("nan")], "expected a finite number for a response to prompt 8, got nan; return None"),
        ([float("inf"), 0.0], "expected a finite number for a response to prompt 7, got inf"),
        ([1.0, None], "expected a number for every response, got None for 'y' to prompt 8"),
        ([1.0, "0"], "expected a number for a response to prompt 8, got '0'"),
        ([1.0, 1j], "expected a number for a response to prompt 8, got 1j"),
        (None, "expected a list of 2 numbers, one per response, got NoneType"),
        (0.5, "expected a list of 2 numbers, one per response, got float 0.5"),
        (torch.tensor(0.5), "expected a list of 2 numbers, one per response, got float 0.5"),
        ({"rewards": [1.0, 0.0]}, "expected a list of 2 numbers, one per response, got dict"),
        ("10", "expected a list of 2 numbers, one per response, got str"),
    ],
)
def test_bad_reward_output(output, match):
    with pytest.raises(ValueError, match=match):
        score_responses(lambda prompts, responses: output, [Prompt(7, "a"), Prompt(8, "b")], ["x", "y"])
