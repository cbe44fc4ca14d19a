"""Every architecture is right or refused by name, as docs/architectures.md says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures import REFUSED, RIGHT, document, examine, line, walk
from tests.tiny_architectures import VARIANTS, register

TABLE = Path(__file__).parents[1] / "docs" / "architectures.md"
pytestmark = pytest.mark.filterwarnings("ignore")

# Plain attention, windows, tied and learned positions, mixtures, states of every kind, no cache, and no policy at all.
SOME = {
    "llama": RIGHT,
    "gemma3_text": RIGHT,
    "gpt_neo": RIGHT,
    "openai-gpt": RIGHT,
    "bart": RIGHT,
    "falcon, alibi": RIGHT,
    "deepseek_v3": RIGHT,
    "qwen3_5_text": RIGHT,
    "falcon_h1": RIGHT,
    "mamba": RIGHT,
    "minimax": RIGHT,
    "rwkv": RIGHT,
    "phi3, LongRoPE": RIGHT,
    "phi3, LongRoPE, crossed": REFUSED,
    "cpmant": REFUSED,
}


@pytest.mark.parametrize("name", [name for name in SOME if name in (*register(), *VARIANTS)])
def test_some_architectures(name):
    row = examine(name)
    assert (row.verdict, row.detail if SOME[name] == RIGHT else "") == (SOME[name], "")


@pytest.mark.slow
def test_every_architecture_is_as_the_table_says():
    rows = list(walk())
    assert {row.verdict for row in rows} == {RIGHT, REFUSED}, [
        line(row) for row in rows if row.verdict not in SOME.values()
    ]
    assert document(rows) == TABLE.read_text(), "write it again: python -m tests.architectures > docs/architectures.md"
