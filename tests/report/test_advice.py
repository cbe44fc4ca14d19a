"""Every message that the package can put into a result has advice."""

import ast
from pathlib import Path

import pytest

from entropy_probe.report.advice import ADVICE, advice

SOURCE = Path(__file__).parents[2] / "src" / "entropy_probe"
LISTS = ("messages", "notes", "self.messages", "self._messages")


def text_of(node: ast.expr) -> str | None:
    """The literal text of a string or f-string, 1 in place of what is filled in; None if it is neither."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "1" for part in node.values)
    return None


def appended() -> list[tuple[str, str]]:
    """File and text of every message appended to a list of messages, or yielded as a doubt about a checkpoint."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
                said = text_of(node.args[0]) if ast.unparse(node.func.value) in LISTS else None
            elif isinstance(node, ast.Yield) and path.name == "examination.py" and node.value is not None:
                said = text_of(node.value)
            else:
                continue
            if said is not None:
                found.append((path.name, said))
    return found


def test_messages_are_found():
    assert len(appended()) > 25


@pytest.mark.parametrize(("file", "message"), appended())
def test_every_message_has_advice(file, message):
    remedy = advice(message)
    assert remedy is not None, f"{file}: add to ADVICE: {message}"
    # settings are the same for every command and in Python, options are not
    assert "--" not in message + remedy


@pytest.mark.parametrize(
    "message",
    [
        "the step moves the policy too far for these rollouts: effective sample size 5 of 256; no change is given",
        "out of memory: max_tokens_per_microbatch was lowered to 512",
        "sampling ran out of memory: the batch size was lowered to 8",
        "no fit: expected at least 3 rates up to 0.1, got 1; add smaller rates",
        "sampled_logprobs differ from the policy's by 0.2 nats per token on average, 3 at most, so results are biased",
        "one batch: the preconditioner scales the product of the mean gradients by 1e+05: a few elements may dominate",
        "the optimizer state of a and b seems exchanged: the weights have moved along each other's moments",
        "evaluation: 12.0% of the responses hit the largest length",
    ],
)
def test_messages_put_together_elsewhere_have_advice(message):
    assert advice(message) is not None


def test_advice_is_a_sentence_and_unknown_messages_have_none():
    assert all(remedy.endswith(".") for _, remedy in ADVICE)
    assert advice("all is well") is None
