from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropy_probe.demo.policy import build_model, build_tokenizer
from entropy_probe.demo.train import quiet_single_thread


def test_tokenizer_round_trip(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    text = "12 + 7=19, so  (A) is\n<eos>"
    ids = loaded(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert len(ids) == len(text) - len("<eos>") + 1
    assert loaded.decode(ids) == text
    assert loaded.decode(ids, skip_special_tokens=True) == text.removesuffix("<eos>")
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.padding_side) == (0, 1, "left")


def test_tokenizer_refuses_unknown_characters():
    with pytest.raises(Exception, match="UNK"):
        build_tokenizer()("é")


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_model_is_reproducible_and_survives_saving(tmp_path, architecture, tied):
    state = torch.get_rng_state()
    model = build_model(architecture, tie_word_embeddings=tied, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with quiet_single_thread():
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    again, other = (build_model(architecture, tie_word_embeddings=tied, seed=s) for s in (3, 4))
    ids = torch.randint(2, 98, (2, 7))
    logits = model(input_ids=ids).logits
    assert logits.dtype == torch.float32
    assert torch.equal(loaded(input_ids=ids).logits, logits)
    assert torch.equal(again(input_ids=ids).logits, logits)
    assert not torch.equal(other(input_ids=ids).logits, logits)
