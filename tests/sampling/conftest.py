from __future__ import annotations

import pytest

from entropy_probe.demo.policy import build_model, build_tokenizer


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model():
    """Five tokens: <pad> 0, <eos> 1, and the characters '0', '1', '2'; far from uniform."""
    return build_model(vocab_size=5, hidden_size=16, num_layers=1, initializer_range=0.3, seed=2)
