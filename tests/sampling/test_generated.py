"""Tasks of reasoning-gym: the same problems for the same seed, scored by their own verifiers."""

import sys

import pytest

from entropy_probe.sampling import Prompt, PromptSource, load_prompts, load_rewards, score_responses

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def problems(task="chain_sum", **fields):
    return load_prompts(PromptSource(reasoning_gym=task, **({"size": 6, "config": ONE_DIGIT} | fields)))


def test_a_seed_gives_the_same_problems():
    one, again, other = problems(seed=1), problems(seed=1), problems(seed=2)
    assert [p.prompt for p in one] == [p.prompt for p in again]
    assert [p.prompt for p in one] != [p.prompt for p in other]
    for prompt in one:
        expression = prompt.columns["metadata"]["expression"]
        assert str(prompt.prompt).endswith(f"{expression} =")
        assert eval(expression) == int(prompt.answer)  # two one-digit numbers and a sign


def test_settings_of_prompts_apply():
    prompts = problems(chat=True, system="Be brief.", limit=2)
    assert len(prompts) == 2
    assert [message["role"] for message in prompts[0].prompt] == ["system", "user"]
    assert len(load_prompts(PromptSource(reasoning_gym="chain_sum"))) == 500


def test_the_answer_is_the_tagged_text_else_the_final_number():
    prompt = problems(seed=3)[0]
    right, wrong = prompt.answer, "77"
    assert int(right) < 70
    responses = {
        right: 1.0,
        f"Let me see: 1 and 2.\nThe answer is {right}.": 1.0,
        f"{right} or rather {wrong}": 0.0,
        f"<answer>{right}</answer>, not {wrong}": 1.0,
        f"{right}, so <answer>5</answer> <answer>{wrong}</answer>": 0.0,
        "I do not know.": 0.0,
        "": 0.0,
    }
    rewards = load_rewards("reasoning_gym")
    rewards.check([prompt])
    scores = score_responses(rewards, [prompt] * len(responses), list(responses))
    assert dict(zip(responses, scores.tolist(), strict=True)) == responses


def test_other_answers_are_the_whole_response():
    prompts = problems("spell_backward", config={"min_word_len": 4, "max_word_len": 4})
    answers = [f" {prompt.answer}\n" for prompt in prompts]
    rewards = load_rewards("reasoning_gym")
    assert score_responses(rewards, prompts, answers).tolist() == [1.0] * 6
    assert score_responses(rewards, prompts, ["zzzz"] * 6).max() < 1


def test_verifiers_that_need_the_problem_have_it():
    """Its answer is one of many: any right path through the numbers counts."""
    prompts = problems("countdown", config={"min_numbers": 3, "max_numbers": 3})
    answers = [prompt.columns["metadata"]["expression"] for prompt in prompts]
    swapped = [f"<answer>({answer})</answer>" for answer in answers]
    assert score_responses(load_rewards("reasoning_gym"), prompts, swapped).tolist() == [1.0] * 6


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"reasoning_gym": "chain_summ"}, "expected a task of reasoning-gym, got 'chain_summ'; did you mean chain_sum"),
        ({"reasoning_gym": "chain_sum", "config": {"terms": 3}}, "chain_sum: raised TypeError: .*'terms'"),
        ({"reasoning_gym": "chain_sum", "config": {"min_terms": 9}}, "raised AssertionError: max_terms must be"),
        ({"reasoning_gym": "chain_sum", "config": "main"}, "config: expected a mapping of settings with reasoning_gym"),
        ({"reasoning_gym": "chain_sum", "config": {"seed": 1}}, "config: expected seed beside config"),
        ({"reasoning_gym": "chain_sum", "split": "train"}, "split: expected only with dataset, got it with reasoning"),
        ({"jsonl": "a", "size": 3}, "size: expected only with reasoning_gym, got it with jsonl"),
        ({"dataset": "gsm8k", "config": {"a": 1}}, "config: expected the name of a configuration with dataset"),
    ],
)
def test_what_cannot_be_used_is_one_line(fields, match):
    with pytest.raises(ValueError, match=match):
        load_prompts(PromptSource(**fields))


def test_the_reward_is_for_its_own_prompts():
    with pytest.raises(ValueError, match=r"expected prompts of reasoning-gym, .* got prompt 4 without; set prompts"):
        load_rewards("reasoning_gym").check([Prompt(4, "1+1=", "2")])


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"expected the package reasoning-gym.*pip install 'entropy-probe\[real\]'"):
        problems(size=7)


def test_a_config_comes_back_from_its_yaml():
    source = PromptSource(reasoning_gym="products", size=3, seed=1, config=ONE_DIGIT, chat=True)
    assert PromptSource.model_validate(source.model_dump(mode="json")) == source
